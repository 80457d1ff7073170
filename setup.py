"""Builds lgd_kernels._C, the CPU kernels. The metadata is in pyproject.toml."""

import os
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

warnings = ["-Wall", "-Wextra"]
# No -march: each row loop carries its own instruction sets (csrc/common/scalar.h). FMA contraction is said aloud.
arithmetic = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]
threads = ["-fopenmp"] if sys.platform == "linux" else []

setup(
    ext_modules=[
        Pybind11Extension(
            "lgd_kernels._C",
            sorted(glob("csrc/*/*_cpu.cpp") + glob("python/*.cpp")),
            depends=sorted(glob("csrc/*/*.h") + glob("python/*.h")),  # built again when these change; in the sdist
            cxx_std=17,
            extra_compile_args=warnings + arithmetic + threads,
            extra_link_args=threads,
            # Without a compiler the package still installs, and says so in `python -m lgd_kernels info`.
            optional=os.environ.get("LGD_REQUIRE_EXT", "0") != "1",
        )
    ]
)
