"""The start of `make gpu`: `python -m benchmarks.gpu_build describe|build --record FILE --phase a`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_results import append

ROOT = Path(__file__).parents[1]


def describe(record: Path, dry: bool) -> int:
    """Append what figures depend on: the GPU, versions, the commit. Exit status 1 if torch sees no GPU."""
    try:
        import torch
    except ImportError:
        print(
            f"make gpu: {sys.executable} has no torch; GPU_PYTHON=/path/to/python names one that has", file=sys.stderr
        )
        return 1

    from benchmarks import environment

    if not dry and not torch.cuda.is_available():
        print(f"make gpu: there is no GPU here that torch {torch.__version__} sees; nothing was run", file=sys.stderr)
        return 1
    found = environment.describe("cpu" if dry else "cuda")
    said = re.search(r"release ([\d.]+)", environment.said("nvcc", "--version") or "")
    found["nvcc"] = said[1] if said else found["nvcc"]
    append(record, environment=found)
    return 0


def lacking(requires: list[str]) -> list[str]:
    """Return what the build needs and this Python has not, or has in an older version."""
    found = []
    for line in requires:
        name, _, least = line.partition(">=")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed; the build needs {line}")
            continue
        if numbers(version) < numbers(least):
            found.append(f"{name} is {version}; the build needs {line} (pyproject.toml)")
    return found


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def requirements() -> list[str]:
    """Return what pyproject.toml lists for the build."""
    line = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return re.findall(r'"([^"]+)"', line[1]) if line else []


def missing_extensions(since: float) -> list[str]:
    """Return what was not built: setuptools lets an optional extension fail, and one of an earlier build would stand in
    for it."""
    importlib.invalidate_caches()
    specs = {name: importlib.util.find_spec(f"lgd_kernels.{name}") for name in ("_C", "_C_cuda")}
    return [
        f"lgd_kernels.{name} was not built"
        for name, spec in specs.items()
        if spec is None or os.stat(spec.origin or "").st_mtime < since - 1
    ]


def build(dry: bool) -> list[str]:
    """Build both extensions in place, at the same time; return what went wrong."""
    if found := lacking(requirements()):
        return found
    if dry:
        sys.path.append(str(ROOT / "tests"))
        import simulated

        return [] if simulated.extension().is_file() else ["the simulated kernels were not built"]
    began = time.time()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force", "--parallel=2"]
    status = subprocess.run(command, cwd=ROOT).returncode
    return ([f"setup.py: exit status {status}"] if status else []) + missing_extensions(began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_build", description=__doc__)
    parser.add_argument("what", choices=("describe", "build"))
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--phase", default="a")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.what == "describe":
        return describe(options.record, options.dry)
    found = build(options.dry)
    for problem in found:
        print(f"make gpu: {problem}", file=sys.stderr, flush=True)
        append(options.record, phase=options.phase, problem=problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
