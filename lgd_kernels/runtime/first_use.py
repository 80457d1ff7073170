"""Import submodules, such as `lgd_kernels.metrics`, on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable


def lazily(package: str, *modules: str, **homes: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports on first use.

    `modules` are submodules. `homes` maps a public name to a module below the package. The name stands for the module
    itself if the module ends in it (`rules="guidance.rules"`), else for what the module defines
    (`sample="sampling.sampler"`).
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
