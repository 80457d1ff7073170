"""The phases of `make gpu`, in the order of what matters: their commands and their limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_build import ROOT

TOTAL = 560  # seconds for everything: a machine with a GPU may be at hand for 600
DRY = 10  # times as long may a dry run take, on a machine where others are at work
# Tests of the ops with CUDA kernels; those of ops without; those of other parts that run Triton.
GUIDED = (
    "guided_score", "guided_step", "guided_energy", "guided_step_autograd", "guided_energy_autograd", "omega_table",
    "guided_energy_safety",
)  # fmt: skip
OTHERS = (
    "combine", "moments", "dynamic_threshold", "energy_mmd_triton", "guided_energy_curve", "combine_moments",
    "moments_centred", "philox", "rules", "log_prob", "rescale", "sampler", "step_plan", "surroundings", "trainer",
    "large",
)  # fmt: skip
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]


class Step(NamedTuple):
    """A command of a phase. What an earlier step left of its seconds is added to these."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = {}
    beside: tuple[list[str], ...] = ()  # commands that run at the same time
    logs: dict[str, Path] = {}  # what its commands write, by the name under which a result keeps it


class Phase(NamedTuple):
    """Steps, one after the other."""

    name: str
    steps: list[Step]
    wants: tuple[str, ...] = ()  # "tests", "rows": what it must have had at its end
    needs_build: bool = False
    open: bool = False  # runs until a stop

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def phases(record: Path, dry: bool) -> dict[str, Phase]:
    """Return the phases of a run that appends to `record`."""
    interpreted = {"TRITON_INTERPRET": "1"} if dry else {}
    simulated = {"SIMULATED_CUDA": "forward"} if dry else {}

    def module(name: str, *arguments: str, phase: str) -> list[str]:
        given = [*arguments, "--record", str(record), "--phase", phase, *(["--dry"] if dry else [])]
        return [sys.executable, "-m", f"benchmarks.{name}", *given]

    def tests(phase: str, impl: str, names: Iterable[str], number: int, few: str) -> list[str]:
        """`few` is what a dry run keeps of them: its expression and, to collect no more, the first file."""
        marker = {"cuda": "simulated", "triton": "triton"}[impl] if dry else "gpu"
        files = [f"tests/test_{name}.py" for name in names]
        chosen = [files[0], "-k", few] if dry else files
        plugin = ["-p", "benchmarks.gpu_tests", "--record", str(record), "--phase", phase, "--impl", impl]
        quiet = ["-q", "--tb=short", "-m", marker, "-p", "no:cacheprovider"]
        workers = [] if dry and phase != "d" else ["-n", "1" if dry else str(number)]
        return [sys.executable, "-m", "pytest", *plugin, *quiet, *workers, *chosen]

    def rows(phase: str, names: str, *arguments: str) -> list[str]:
        return module("gpu_rows", names, *arguments, phase=phase)

    script = [sys.executable, "-m", "benchmarks.gpu_checks", *(["--dry"] if dry else [])]
    logs = {tool: record.with_suffix(f".{tool}.log") for tool in ("memcheck", "racecheck")}
    sanitized = (script if dry else [*SANITIZER, tool, "--log-file", str(log), *script] for tool, log in logs.items())
    memcheck, racecheck = sanitized
    both = "--impl", "cuda", "triton"
    found = {
        "a": Phase("build", [Step("build", module("gpu_build", "build", phase="a"), 60)]),
        "b": Phase(
            "CUDA against float64",
            [Step("tests", tests("b", "cuda", GUIDED, 4, "hand_worked or wide"), 55, simulated)],
            ("tests",),
            needs_build=True,
        ),
        "c": Phase("CUDA, rows", [Step("rows", rows("c", "core", "--impl", "cuda"), 80)], ("rows",), needs_build=True),
        "d": Phase(
            "Triton against float64, and rows",
            [
                Step("tests", tests("d", "triton", ["gpu_calls"], 12, "offset and float32"), 70, interpreted),
                Step("rows", rows("d", "core", "--impl", "triton"), 40, interpreted),
            ],
            ("tests", "rows"),
        ),
        "e": Phase(
            "rows beside torch.compile",
            [Step("rows", rows("e", "core", *both, "--compile"), 100, interpreted)],
            ("rows",),
        ),
        "f": Phase(
            "compute-sanitizer", [Step("memcheck, racecheck", memcheck, 30, {}, (racecheck,), logs)], needs_build=True
        ),
        "g": Phase(
            "other rows and tests",
            [
                Step("rows of guided ops", rows("g", "guided", *both), 40, interpreted),
                Step("tests of guided ops", tests("g", "triton", GUIDED, 12, "hand_worked"), 55, interpreted),
                Step("rows of other ops", rows("g", "others", *both), 10, interpreted),
                Step("other tests", tests("g", "triton", OTHERS, 12, "hand_worked"), 20, interpreted),
            ][: 2 if dry else None],  # the other two differ in names only
            ("tests", "rows"),
            open=True,
        ),
    }
    if dry:
        for phase in found.values():
            phase.steps[:] = [step._replace(seconds=DRY * step.seconds) for step in phase.steps]
    return found


def environment(step: Step, capability: str) -> dict[str, str]:
    """Return the environment of a command: it builds for the GPU that is there, and needs both extensions."""
    return os.environ | {"LGD_CUDA_ARCH": capability.replace(".", ""), "LGD_REQUIRE_EXT": "1"} | step.environment


def built(dry: bool) -> bool:
    """Return whether an earlier run has built the CUDA kernels."""
    return dry or any(ROOT.glob("lgd_kernels/_C_cuda.*.so"))
