"""Builds lgd_kernels._C, the CPU kernels, and, where nvcc is found, lgd_kernels._C_cuda. Metadata: pyproject.toml."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from types import SimpleNamespace

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError, CompileError, ExecError
from setuptools.modified import newer_group

builds = SimpleNamespace(**runpy.run_path("lgd_kernels/runtime/builds.py"))  # importing the package would import torch
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
# csrc/common/instruction_set_cpu.cpp wraps libgcc's detection of the processor.
linking = [*threads, "-Wl,--wrap=__cpu_indicator_init"] if sys.platform == "linux" else []
if os.environ.get("LGD_SANITIZE") == "1":  # `make sanitize`; the last -O wins
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    arithmetic += ["-O1", "-g", *sanitizers]
    linking += sanitizers
LOOP = """
int total(int n) {
  int sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += i;
  return sum;
}
"""


class BuildExtensions(build_ext):
    """Extends setuptools: compiles the digest of the sources into each extension, builds _C_cuda with nvcc, builds _C
    without OpenMP if the compiler has none, and writes a note of a command that failed for `info`."""

    def run(self):
        self.failed = []  # (command, output) of each that failed
        inplace, built = self.inplace, Path(self.build_lib, "lgd_kernels")
        for name in builds.NEEDS:
            if f"lgd_kernels.{name}" not in (extension.name for extension in self.extensions):
                builds.note_path(built, name).unlink(missing_ok=True)
        try:
            super().run()
        finally:
            for name in builds.NEEDS if inplace else ():
                made, note = builds.note_path(built, name), builds.note_path(Path("lgd_kernels"), name)
                note.unlink(missing_ok=True)
                if made.is_file():
                    shutil.copyfile(made, note)

    def build_extension(self, extension):
        out, on_cpu = Path(self.get_ext_fullpath(extension.name)), extension.name == cpu.name
        digest = builds.digest(Path())
        current = builds.digest_in(out) == digest and not newer_group(extension.sources + HEADERS, str(out))
        if on_cpu and current and not self.force:
            return
        note = builds.note_path(out.parent, extension.name.rpartition(".")[2])
        for path in (out, note):  # a failed build must not leave the result of an earlier one
            path.unlink(missing_ok=True)
        for folder in (out.parent, Path(self.build_temp)):
            folder.mkdir(parents=True, exist_ok=True)
        Path(self.build_temp, "source_digest.h").write_text(f'#define LGD_SOURCE_DIGEST "{digest}"\n')
        extension.include_dirs.append(self.build_temp)
        try:
            if on_cpu:
                self.leave_out_what_is_missing(extension, note)
                super().build_extension(extension)
            else:
                self.build_cuda(extension, out)
        except (BaseError, CCompilerError) as error:
            note.unlink(missing_ok=True)
            self.write(note, "its build failed", str(error))
            raise CompileError(f"{extension.name}: {note.read_text()}") from error

    def leave_out_what_is_missing(self, extension, note):
        """Build without -fopenmp or -fopenmp-simd if the compiler does not support it, and write that into the note."""
        if self.compiler.compiler_type != "unix":
            return
        if sys.platform != "darwin":  # there setuptools sets the deployment target for each command
            self.compiler.spawn = self.compiler.call = self.call  # `call` since setuptools 84
        flags = [flag for flag in ("-fopenmp", "-fopenmp-simd") if flag in extension.extra_compile_args]
        if self.compiles(flags):
            return
        self.failed.clear()
        if not self.compiles([]):
            raise CompileError("the C++ compiler cannot build a module of ten lines")
        for flag in flags:
            if not self.compiles([flag]):
                lost = "OpenMP, to run on one thread" if flag == "-fopenmp" else flag
                self.write(note, f"built without {lost}", "")
                for arguments in (extension.extra_compile_args, extension.extra_link_args):
                    arguments[:] = [one for one in arguments if one != flag]

    def compiles(self, flags):
        """Whether the compiler can build a module with a parallel loop with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "loop.cpp"), Path(folder, "loop.so")
            source.write_text(LOOP)
            try:
                made = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_shared_object(made, str(out), extra_postargs=flags, target_lang="c++")
            except (BaseError, CCompilerError):
                return False
            return True

    def build_cuda(self, extension, out):
        """setuptools knows no nvcc: it compiles the kernels and links the module."""
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
            self.call([*common, *(targets if source.endswith(".cu") else []), "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(JOBS or os.cpu_count()) as threads:
            objects = list(threads.map(compiled, extension.sources))
        self.call([NVCC, "-shared", "-cudart", "static", *objects, "-o", str(out)])

    def call(self, command, **options):
        """Run a command of the build; print its output when it ends, and keep it if the command failed."""
        command = [str(part) for part in command]
        self.announce(subprocess.list2cmdline(command), level=20)
        try:
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", **options)
            status, output = run.returncode, run.stdout
        except OSError as error:
            status, output = "none", f"error: {command[0]} cannot be run: {error.strerror}"
        if output.strip():
            print(output, file=sys.stderr, flush=True)
        if status:
            self.failed.append((command, output))
            raise ExecError(f"{command[0]} failed with exit status {status}")

    def write(self, note, words, otherwise):
        """Write what happened in one line, the command, and its last lines; `otherwise` if no command was kept."""
        command, output = self.failed[0] if self.failed else ([], otherwise)
        self.failed.clear()
        lines = [line.rstrip() for line in output.splitlines() if line.strip()] or ["it printed nothing"]
        telling = (line for line in lines if re.search(r"error|cannot|not found|unrecogni|unsupported", line, re.I))
        shown = [f"$ {subprocess.list2cmdline(command)}"] if command else []
        earlier = note.read_text() if note.is_file() else ""
        said = [f"{words}: {next(telling, lines[-1]).strip()}", *shown, *lines[-30:]]
        note.write_text("\n".join([*said, earlier]))


def nvcc_version():
    lines = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.split("release ")[1].split(",")[0] for line in lines if "release " in line), "unknown")


def readme():
    """Return README.md for a package index. Relative links lead nowhere there, so they become text."""
    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(
        r"(?<!!)\[([^\[\]]*)\]\((?!https?:)[^)]*\)", r"\1", re.sub(r"^!\[.*\n\n\*[^*]+\*\n", "", text, flags=re.M)
    )


cpu = Pybind11Extension(
    "lgd_kernels._C",
    sorted(glob("csrc/*/*_cpu.cpp") + glob("python/*.cpp")),
    depends=HEADERS,  # built again when these change
    cxx_std=17,
    extra_compile_args=warnings + arithmetic + threads,
    extra_link_args=linking,
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
setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[cpu, *([cuda] if NVCC else [])],
    cmdclass={"build_ext": BuildExtensions},
)
