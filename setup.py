"""Builds lgd_kernels._C, the CPU kernels, and, where nvcc is found, lgd_kernels._C_cuda. Metadata: pyproject.toml."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

HEADERS = sorted(glob("csrc/*/*.h") + glob("csrc/*/*.cuh") + glob("python/*.h") + glob("python/cuda/*.h"))
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))
# Machine code for Ampere to Blackwell, and PTX that later GPUs compile for themselves.
ARCHITECTURES = os.environ.get("LGD_CUDA_ARCH", "80;90;100;120").split(";")

JOBS = int(os.environ.get("LGD_BUILD_JOBS", 0))  # files at once; 0: as many as there are cores

ParallelCompile(default=JOBS).install()
warnings = ["-Wall", "-Wextra"]
# No -march: each row loop carries its own instruction sets (csrc/common/scalar.h). FMA contraction is said aloud.
arithmetic = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]
threads = ["-fopenmp"] if sys.platform == "linux" else []


class BuildExtensions(build_ext):
    """setuptools knows no nvcc: _C_cuda's kernels are compiled, and the module linked, by it."""

    def build_extension(self, extension):
        if extension.name != "lgd_kernels._C_cuda":
            return super().build_extension(extension)
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        includes = [f"-I{path}" for path in self.compiler.include_dirs + extension.include_dirs]
        at_once = "--threads=1" if JOBS else "--threads=0"  # of one file's architectures
        common = [NVCC, "-std=c++17", "-O3", at_once, "-Xcompiler=-fPIC,-fvisibility=hidden", *includes]
        common.append(f'-DLGD_NVCC="{nvcc_version()}"')

        def compiled(source):
            made = str(folder / (source.replace("/", "_") + ".o"))
            self.run_nvcc([*common, *(targets if source.endswith(".cu") else []), "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(JOBS or os.cpu_count()) as threads:
            objects = list(threads.map(compiled, extension.sources))
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        self.run_nvcc([NVCC, "-shared", "-cudart", "static", *objects, "-o", str(out)])

    def run_nvcc(self, command):
        if subprocess.run(command).returncode:
            raise CompileError(" ".join(command))


def nvcc_version():
    lines = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.split("release ")[1].split(",")[0] for line in lines if "release " in line), "unknown")


cpu = Pybind11Extension(
    "lgd_kernels._C",
    sorted(glob("csrc/*/*_cpu.cpp") + glob("python/*.cpp")),
    depends=HEADERS,  # built again when these change
    cxx_std=17,
    extra_compile_args=warnings + arithmetic + threads,
    extra_link_args=threads,
    # Without a compiler the package still installs, and says so in `python -m lgd_kernels info`.
    optional=os.environ.get("LGD_REQUIRE_EXT", "0") != "1",
)
cuda = Pybind11Extension(
    "lgd_kernels._C_cuda",
    sorted(glob("csrc/*/*_cuda.cu") + glob("python/cuda/*.cpp")),
    depends=HEADERS,
    cxx_std=17,  # said, so that pybind11 does not ask a compiler that may be missing
    optional=True,
)
setup(ext_modules=[cpu, *([cuda] if NVCC else [])], cmdclass={"build_ext": BuildExtensions})
