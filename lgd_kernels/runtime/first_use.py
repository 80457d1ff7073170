"""Submodules that are imported on first use, such as `lgd_kernels.metrics`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable


def lazily(package: str, *modules: str, **homes: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package.

    `modules` are submodules. `homes` maps a public name to the module below the package that it is, if the module ends
    in that name, or that defines it: `rules="guidance.rules"`, `sample="sampling.sampler"`.
    """

    def get(name: str) -> object:
        if name not in modules and name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes.get(name, name)
        found = importlib.import_module(f"{package}.{home}")
        if home.split(".")[-1] != name:
            found = getattr(found, name)
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *modules, *homes})
