"""The calls of `make gpu`: the rows that matter most, and a short list for Triton, counted by what it compiles.

A call is a workload in a memory layout. Every specialisation of a Triton kernel has to be compiled, so the list is
short (`MOST`), and includes every specialisation of the rows; gpu_checks.py counts them without a GPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch

from benchmarks import combine, dynamic_threshold, energy_mmd, guided_energy, guided_score, guided_step, moments
from benchmarks.workload import Workload

MOST = 150  # specialisations that the calls may need
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OMEGAS = "one omega", "[B]", "table"
# Sizes of the rows: 256 MB for a step in float32, and calls that are all overhead; particles, 201 MB in float32.
LARGE, SMALL, PARTICLES = (1024, 4, 64, 64), ((1, 4, 64, 64), (4, 4, 64, 64)), (256, 4, 12288)
TINY = (16, 4, 4, 4), ((1, 4, 4, 4), (3, 4, 4, 4)), (1, 2, 40)  # of a dry run


class Call(NamedTuple):
    """A workload, and how its tensors lie in memory."""

    workload: Workload
    layout: str = "contiguous"  # or "offset": not aligned to a vector; "odd stride": the first row is, the next is not

    def __str__(self) -> str:
        one = self.workload
        size = "x".join(map(str, one.shape))
        return f"{one.op} {size} {str(one.dtype)[6:]} {one.case} {self.layout} {len(one.backward)}"


def implementations(op: str) -> frozenset[str]:
    """Return the implementations that an op has."""
    return frozenset(importlib.import_module(f"lgd_kernels.ops.{op}.op").IMPLEMENTATIONS)


def rows(sizes: tuple = (LARGE, SMALL, PARTICLES)) -> list[Workload]:
    """Return the workloads of the rows, in the order of what matters; forwards only."""
    large, small, particles = sizes
    score = functools.partial(guided_score.workload, dtype=F32, parts=("forward",))
    step = functools.partial(guided_step.workload, dtype=F32, parts=("forward",))
    energy = functools.partial(guided_energy.workload, dtype=F32, parts=("forward",))
    cases = {"one omega": "one omega", "[B]": "omega [B]", "table": "table"}  # what guided_score calls them
    found = [step(large), step(large, noise="seed"), score("omega [B]", large), energy(particles)]
    found += [energy(particles, draws=True)]
    found += [step(large, omega=omega) for omega in OMEGAS if omega != "[B]"]
    found += [score(cases[omega], large) for omega in OMEGAS if omega != "[B]"]
    for shape in small:
        found += [step(shape, omega=omega) for omega in OMEGAS] + [step(shape, noise="seed")]
        found += [score(cases[omega], shape) for omega in OMEGAS]
    return found


def calls() -> list[Call]:
    """Return the list: rows in small, with the same specialisations; then dtypes, gradients, sizes and layouts."""
    small = rows(((16, 4, 16, 16), ((1, 4, 16, 16), (3, 4, 16, 16)), (16, 4, 2560)))
    return [*map(Call, small), *_steps(), *_scores(), *_energies(), *_others()]


def _steps() -> list[Call]:
    step, to_omega, to_all = guided_step.workload, guided_step.TO_OMEGA, guided_step.TO_ALL
    wide, ragged, short = (16, 4, 16, 16), (3, 1031), (5, 127)
    found = [
        step(wide, BF16, gradients=(to_omega, to_all)),
        step(wide, BF16, noise="seed"),
        step(wide, F16, omega="table"),
        step(wide, F32, "v", gradients=(to_omega, to_all)),
        step(wide, F32, "eps", noise="noise tensor"),
        step(wide, F32, "flow", noise="seed", omega="table", gradients=(to_omega,)),
        step(ragged, F32, gradients=(to_all,)),
        step(ragged, BF16, noise="seed"),
        step(short, F32, noise="noise tensor", omega="table", gradients=(to_all,)),
        step((1, 1), F32),
    ]
    return [*map(Call, found), Call(step((4, 1024), F32), "offset"), Call(step((4, 1024), BF16), "odd stride")]


def _scores() -> list[Call]:
    score, to_data, to_all = guided_score.workload, guided_score.TO_DATA, guided_score.TO_ALL
    found = [
        score("omega [B]", (16, 4, 16, 16), BF16, (guided_score.TO_OMEGA, to_all)),
        score("table", (16, 4, 16, 16), F16, (guided_score.TO_OMEGA,)),
        score("one omega", (16, 4, 16, 16), F32, (to_data,)),
        score("omega [B]", (3, 1031), F32, (to_all,)),
        score("omega [B]", (5, 127), BF16),
        score("one omega", (1, 1), F32),
    ]
    odd = [Call(score("omega [B]", (4, 1024), F32), "offset"), Call(score("omega [B]", (4, 1024), F16), "odd stride")]
    return [*map(Call, found), *odd]


def _energies() -> list[Call]:
    energy, to_omega = guided_energy.workload, {guided_energy.TO_OMEGA: 0}
    to_all = {("x", "cond", "uncond"): 0}
    found = [
        (energy((5, 4, 2560), BF16), to_omega),
        (energy((5, 4, 2560), BF16, draws=True), to_omega),
        (energy((5, 4, 48), F32), to_all),
        (energy((5, 4, 300), BF16), to_all),
        (energy((3, 2, 127), F32), to_omega),
        (energy((3, 2, 127), F32, draws=True), to_all),
        (energy((2, 7, 48), F32), to_all),
        (energy((2, 16, 300), F32), to_omega),
        (energy((2, 16, 300), BF16, draws=True), to_omega),
        (energy((3, 4, 300), F32, omegas=5), {}),
    ]
    return [Call(one.__class__(**(one.__dict__ | {"backward": wanted}))) for one, wanted in found]


def _others() -> list[Call]:
    combined, to_all = combine.workload, combine.TO_ALL
    found = [
        combined((16, 4, 16, 16), F32, (combine.TO_COEFFICIENTS, to_all)),
        combined((16, 4, 16, 16), BF16, (to_all,)),
        combined((1, 4, 16, 16), F32),
        combined((3, 1031), F16),
        combined((5, 127), F32, (combine.TO_COEFFICIENTS,)),
        *(moments.workload(shape, F32) for shape in ((16, 4, 16, 16), (1, 4, 16, 16), (3, 1031), (5, 127))),
        moments.workload((16, 4, 16, 16), BF16),
        *(dynamic_threshold.workload(shape, F32) for shape in ((16, 4, 16, 16), (1, 4, 16, 16), (3, 1031), (5, 127))),
        dynamic_threshold.workload((16, 4, 16, 16), BF16),
        energy_mmd.workload(64, 2, F32),
        energy_mmd.workload(33, 64, F32),
        energy_mmd.workload(48, 7, F32),
    ]
    return [Call(combined((4, 1024), F32), "odd stride"), *map(Call, found)]
