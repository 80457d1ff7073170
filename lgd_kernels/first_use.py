"""Submodules that are imported when they are first named: `lgd_kernels.metrics` without an import of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable


def lazily(package: str, *modules: str, **homes: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, for submodules, and for names with the submodule that each is from."""

    def get(name: str) -> object:
        if name not in modules and name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = importlib.import_module(f"{package}.{homes.get(name, name)}")
        if name in homes:
            found = getattr(found, name)
            setattr(sys.modules[package], name, found)  # the import system does so for a submodule
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *modules, *homes})
