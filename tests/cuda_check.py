"""Check the CUDA kernels with sanitizers, and the check itself with planted faults: `make cuda-check`.

The simulator runs the tests of the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and with
ThreadSanitizer, to which each CUDA thread is a thread: an access that no barrier orders is a data race. Then each of
FAULTS is planted in a copy of csrc/, and must be found: by a test in one of the orders of threads, or by a sanitizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import simulated
from conftest import WITH_CUDA

TESTS = Path(__file__).parent
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
RACES = ("-fsanitize=thread", "-g1")
ENERGY, BACKWARD = "guided_energy/guided_energy_cuda.cu", "guided_energy/guided_energy_backward_cuda.cu"


class Fault(NamedTuple):
    """A mistake: text of a file of csrc/, and what replaces its first occurrence."""

    name: str
    file: str
    right: str
    wrong: str


FAULTS = [
    Fault("no barrier before a block's sum", "common/reduce.cuh", "  __syncthreads();\n", ""),
    Fault("a shuffle too few", "common/reduce.cuh", "step > 0; step >>= 1", "step > 1; step >>= 1"),
    Fault("a sum stored by another thread", "guided_score/guided_score_cuda.cu", "- 1)) == 0;", "- 1)) == 1;"),
    Fault("a sum of another column block", "guided_step/guided_step_cuda.cu", "+ at.column_block] = sum", "] = sum"),
    Fault("a row too many", "common/vec.cuh", "sample < tiling.batch ?", "sample <= tiling.batch ?"),
    Fault("a vector beyond the row", "common/vec.cuh", "left < kVector ? left : kVector", "kVector"),
    Fault("no barrier before a sample's scalars", "common/vec.cuh", "  __syncthreads();\n", ""),
    Fault("the scalars of another sample", "common/vec.cuh", "return found[place];", "return found[0];"),
    Fault("no check of alignment", "common/vec.cuh", " && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0", ""),
    Fault("no barrier before the scalars", ENERGY, "k.of(op, item);\n  __syncthreads();", "k.of(op, item);"),
    Fault("no barrier before the sums of warps", ENERGY, "  __syncthreads();\n  const int i =", "  const int i ="),
    Fault("lanes keep the wrong half", ENERGY, "(upper ? high : low) +", "(upper ? low : high) +"),
    Fault("no barrier before rows are staged", ENERGY, "    __syncthreads();\n    for (int unit", "    for (int unit"),
    Fault("no barrier after rows are staged", ENERGY, "    __syncthreads();\n    const bool", "    const bool"),
    Fault("no barrier before the statistics", ENERGY, "  __syncthreads();\n  Energy energy", "  Energy energy"),
    Fault("no barrier before the energies", ENERGY, "  __syncthreads();\n  if (threadIdx", "  if (threadIdx"),
    Fault("no barrier in the backward", BACKWARD, "  __syncthreads();\n", ""),
    Fault("a particle too many", BACKWARD, "first + j < m ? first + j : m - 1", "first + j"),
]  # fmt: skip


class Check(NamedTuple):
    """A way to run the tests: an order of threads, and flags and environment of a sanitizer."""

    name: str
    order: str
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    without: tuple[str, ...] = ()  # files


def checks() -> list[Check]:
    """Return all ways, the fastest first."""
    # Python is not built with sanitizers, so their libraries are loaded before it.
    asan = {"LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}", "ASAN_OPTIONS": "detect_leaks=0"}
    tsan = {"LD_PRELOAD": library("libtsan.so"), "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"}
    return [
        Check("forward", "forward"),
        Check("reverse", "reverse"),
        Check("AddressSanitizer and UBSan", "forward", ADDRESS, asan),
        Check("ThreadSanitizer", "forward", RACES, tsan, ("test_large",)),  # whose shadow memory takes 24 GB
    ]


def library(name: str) -> str:
    """Return the path of a library of the compiler."""
    command = [simulated.COMPILER, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(check: Check, source: Path) -> tuple[bool, str]:
    """Run the tests on the kernels of a tree. Return whether they passed, and what they printed."""
    environment = {
        **os.environ,
        **check.environment,
        "OMP_NUM_THREADS": "1",
        "SIMULATED_CUDA": check.order,
        "SIMULATED_CUDA_MODULE": str(simulated.extension(source, check.flags)),
    }
    names = [name for name in [*WITH_CUDA, "test_cuda"] if name not in check.without]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-m", "simulated", "-p", "no:cacheprovider"]
    command += [str(TESTS / f"{name}.py") for name in names]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ended.returncode == 0, ended.stdout


def planted(fault: Fault, folder: Path) -> Path:
    """Copy what the extension is built from, with a fault in it."""
    for name in ("csrc", "python"):
        shutil.copytree(simulated.ROOT / name, folder / name)
    path = folder / "csrc" / fault.file
    text = path.read_text()
    assert fault.right in text, f"{fault.file} has no {fault.right!r}"
    path.write_text(text.replace(fault.right, fault.wrong, 1))
    return folder


def found(fault: Fault, ways: list[Check]) -> tuple[str, str] | None:
    """Return which check finds a fault, and the line that says so."""
    for check in ways:
        with tempfile.TemporaryDirectory() as folder:
            passed, output = run(check, planted(fault, Path(folder)))
        if not passed:
            return check.name, reason(output)
    return None


def reason(output: str) -> str:
    """Return the line of an output that says what failed."""
    telling = ("ERROR: AddressSanitizer", "runtime error", "WARNING: ThreadSanitizer", "FAILED ", "Fatal Python error")
    lines = [line.strip() for line in output.splitlines()]
    return next((line for word in telling for line in lines if word in line), lines[-1] if lines else "nothing printed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", nargs="*", help="plant the faults whose names have one of these words, and no more")
    words = parser.parse_args().faults
    failed, ways = 0, checks()
    for check in ways if words is None else ():
        start = time.monotonic()
        passed, output = run(check, simulated.ROOT)
        print(f"{check.name:42} {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
        if not passed:
            failed += 1
            print(output[-4000:])
    for fault in FAULTS:
        if words is None or any(word in fault.name for word in words):
            how = found(fault, ways)
            print(f"{fault.name:42} {f'found by {how[0]}: {how[1]:.100}' if how else 'NOT FOUND'}", flush=True)
            failed += how is None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
