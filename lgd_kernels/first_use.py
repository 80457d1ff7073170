"""Submodules that are imported on first use, such as `lgd_kernels.metrics`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable


def lazily(package: str, *modules: str, **homes: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package. `modules` are submodules; `homes` maps names to submodules."""

    def get(name: str) -> object:
        if name not in modules and name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = importlib.import_module(f"{package}.{homes.get(name, name)}")
        if name in homes:
            found = getattr(found, name)
            setattr(sys.modules[package], name, found)  # the import system does so for a submodule
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *modules, *homes})
