"""Build CUDA kernels for a CPU: a C++ compiler takes csrc/ and, for what is CUDA's, include/; simulator.cpp runs them.

`install()` makes `impl="cuda"` take CPU tensors in this process. `use_order` sets the order in which threads run.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from lgd_kernels.runtime import builds, impls, memory

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "tests" / "cuda"
CACHE = ROOT / "build" / "simulated"
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
HEADERS = ("csrc/*/*.h", "csrc/*/*.cuh", "python/*.h", "python/cuda/*.h")
Units = Mapping[Path, Sequence[str]]  # flags of a source, beside those of all
ORDERS = ("forward", "reverse", "shuffled")


def missing() -> str:
    """Return why nothing can be simulated here, or ""."""
    if os.uname().machine != "x86_64":
        return "the simulator switches fibers by x86-64 instructions"
    return "" if shutil.which(COMPILER) else f"{COMPILER} was not found"


def extension(source: Path = ROOT, flags: Sequence[str] = (), kernels: Units | None = None) -> Path:
    """Return the path of `_C_cuda`, built from the kernels and bindings of a tree, or from other `kernels`."""
    import pybind11

    if kernels is None:
        kernels = units(source.glob("csrc/*/*_cuda.cu"))
    races = ("-fno-sanitize=thread", "-DFIND_RACES") if "-fsanitize=thread" in flags else ()
    others = {**units(source.glob("python/cuda/*.cpp")), CUDA / "simulator.cpp": races}
    headers = [path for pattern in HEADERS for path in source.glob(pattern)]
    include = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    options = [*flags, *(f"-I{path}" for path in include), '-DLGD_NVCC="simulated"']
    return library("_C_cuda" + sysconfig.get_config_var("EXT_SUFFIX"), {**kernels, **others}, headers, options)


def units(paths: Iterable[Path]) -> Units:
    """Return sources without flags of their own."""
    return dict.fromkeys(paths, ())


def library(name: str, units: Units, headers: list[Path], flags: Sequence[str] = ()) -> Path:
    """Compile and link. Objects and the result are cached by digests of sources, compiler and flags."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    headers = sorted([*headers, *CUDA.glob("include/*")])
    common = digest(version, sys.version, *flags, *(path.read_bytes() for path in headers))
    made = {unit: CACHE / f"{unit.stem}-{digest(common, unit.read_bytes(), *more)}.o" for unit, more in units.items()}
    found = CACHE / digest(name, *sorted(map(str, made.values()))) / name
    found.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if found.is_file():
            return found
        (CACHE / "source_digest.h").write_text(f'#define LGD_SOURCE_DIGEST "{builds.digest(ROOT)}"\n')
        compile = [COMPILER, *FLAGS, *flags, f"-I{CUDA / 'include'}", f"-I{CACHE}", "-x", "c++", "-c"]

        def compiled(unit: Path) -> None:
            if not made[unit].is_file():
                unfinished = made[unit].with_suffix(".unfinished")
                run([*compile, *units[unit], str(unit), "-o", str(unfinished)])
                unfinished.rename(made[unit])

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(compiled, units))
        unfinished = found.with_suffix(".unfinished")
        run([COMPILER, "-shared", *flags, *map(str, made.values()), "-o", str(unfinished)])
        unfinished.rename(found)
    return found


def digest(*parts: str | bytes) -> str:
    """Return a name for these contents."""
    found = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def run(command: list[str]) -> None:
    """Run a command; raise with what it printed if it fails."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise RuntimeError(f"{subprocess.list2cmdline(command)}\n{ended.stdout}")


def install(path: Path | str | None = None) -> ModuleType:
    """Make `impl="cuda"` run the simulated kernels, on CPU tensors, and return the module."""
    spec = importlib.util.spec_from_file_location("lgd_kernels._C_cuda", path or extension())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def launch(function, *arguments, like):
        function(*arguments, 0)

    impls.cuda_extension = lambda: module
    impls._unfit["cuda"] = lambda device: () if device == "cpu" else (f"simulated kernels take no {device} tensors",)
    memory.launch_cuda = launch
    return module


def use_order(library: str, order: str, seed: int = 0) -> None:
    """Set the order in which threads and blocks of this library's kernels run: one of ORDERS."""
    ctypes.CDLL(library).simulator_order(ORDERS.index(order), seed)
