"""Let GPU calls run on a machine without a GPU, up to the driver: for `python -m benchmarks host`.

Tensors of the CPU take the place of a GPU's. Triton's own C launcher links to a libcuda that does nothing
(libcuda_stub.c). The bindings in python/cuda/ link to launchers that do nothing, made from the headers in csrc/.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

from lgd_kernels.runtime import checks, impls, memory

ROOT = Path(__file__).parents[1]
LIBCUDA = Path(__file__).with_name("libcuda_stub.c")
CUDA_HEADER = """
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
"""
LAUNCHER = re.compile(r"^(int|int64_t) (\w+)\(([^()]*)\);", re.MULTILINE)  # a declaration in csrc/*/*_cuda.h


@contextlib.contextmanager
def triton_launches() -> Iterator[None]:
    """Let Triton compile for sm_90 and launch on the stub of libcuda."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        soname = f"-Wl,-soname,{library.name}"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", soname, LIBCUDA, "-o", library], check=True)
        library.with_name("libcuda.so").symlink_to(library)
        cuda = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        here = {"TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache", "TRITON_DEFAULT_FP_FUSION": "1"}
        with mock.patch.dict(os.environ, here):
            target = GPUTarget("cuda", 90, 32)
            gpu = SimpleNamespace(
                utils=nvidia.CudaUtils(),
                launcher_cls=nvidia.CudaLauncher,
                get_current_target=lambda: target,
                get_current_device=functools.partial(int, 0),
                get_current_stream=lambda device: 0,
                allocate_default_profile_scratch=lambda *_: None,
            )
            try:
                with mock.patch.object(driver, "_active", gpu), tensors_on_a_gpu("triton"):
                    yield
            finally:
                for kernel in gc.get_objects():
                    if type(kernel) is CompiledKernel:
                        kernel.module = None  # or it would unload it where there is no driver any more
        if not ctypes.c_int.in_dll(cuda, "launches").value:
            raise RuntimeError("nothing was launched on the stub of libcuda")


@contextlib.contextmanager
def cuda_launches() -> Iterator[None]:
    """Let impl="cuda" run python/cuda/ as it is, compiled anew, on launchers that do nothing."""
    with tempfile.TemporaryDirectory() as folder:
        module = _bindings(Path(folder))
        stream = mock.patch.object(memory, "_raw_stream", lambda index: 0)
        with mock.patch.object(impls, "cuda_extension", lambda: module), stream, tensors_on_a_gpu("cuda"):
            yield


@contextlib.contextmanager
def tensors_on_a_gpu(impl: str) -> Iterator[None]:
    """Let `impl` take tensors of the CPU, as if they were on the current GPU."""
    index = functools.partial(int, 0)

    def on_current_device(tensor: torch.Tensor) -> bool:  # as much work as the question on a GPU
        return tensor.is_cpu and tensor.get_device() + 1 == index()

    with (
        mock.patch.object(memory, "on_current_device", on_current_device),
        mock.patch.object(checks, "readable", lambda tensor: not tensor.is_cpu),  # a GPU's values are not looked at
        mock.patch.dict(impls._unfit, {impl: lambda device: ()}),
        mock.patch.object(impls, "_choose", functools.cache(impls._choose.__wrapped__)),
    ):
        yield


def _bindings(folder: Path) -> ModuleType:
    """Compile python/cuda/ with launchers that do nothing, and load it."""
    import pybind11

    (folder / "cuda_runtime_api.h").write_text(CUDA_HEADER)
    headers = sorted(ROOT.glob("csrc/*/*_cuda.h"))
    lines = [f'#include "{header}"' for header in headers] + ["namespace lgd {"]
    for header in headers:
        for kind, name, parameters in LAUNCHER.findall(header.read_text()):
            lines.append(f"{kind} {name}({parameters}) {{ return {int(kind != 'int')}; }}")
    nothing = folder / "launchers.cpp"
    nothing.write_text("\n".join([*lines, "}", ""]))
    includes = [f"-I{path}" for path in (folder, pybind11.get_include(), sysconfig.get_paths()["include"])]
    options = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", '-DLGD_NVCC=""', *includes]
    sources = [*sorted(ROOT.glob("python/cuda/*.cpp")), nothing]
    objects = [folder / f"{source.stem}.o" for source in sources]

    compiler = os.environ.get("CXX", "c++")

    def compile(source: Path, made: Path) -> None:
        subprocess.run([compiler, *options, "-c", source, "-o", made], check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile, sources, objects))
    library = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_C_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
