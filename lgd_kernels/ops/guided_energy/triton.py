"""The Triton kernels and their launchers.

The first kernel reads an item's rows once, in chunks, and keeps the products of every pair in registers. The second
kernel, in triton_finish.py, adds up the chunks. With m = k = 4, B = 256, D = 12288 and given targets a call reads
201 MB of float32 (101 MB of bfloat16) and does 164 operations for an element of an item, 0.52 GFLOP: it is bound by
memory. Drawn noise is not read; a normal takes about 60 instructions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.guided_energy.structs import EnergyCall
from lgd_kernels.ops.guided_energy.triton_backward import backward, guided_energy_backward_kernel  # noqa: F401
from lgd_kernels.ops.guided_energy.triton_finish import finish, guided_energy_finish_kernel  # noqa: F401
from lgd_kernels.ops.guided_energy.triton_particles import (
    GROUP,
    WORDS,
    aim,
    block_of,
    data_arguments,
    draws,
    guide,
    item_keys,
    row_of,
    scalars_of,
)
from lgd_kernels.runtime.triton_common import column_blocks, lane_totals
from lgd_kernels.runtime.triton_launch import cdiv, launch

PROGRAMS = 1056  # enough for a large GPU: 8 for each of 132 multiprocessors
STEPS = 64  # blocks that a program adds up in float32, unless an item then had more than CHUNKS
CHUNKS = 64
COLUMN = tl.constexpr(2**15)  # programs along y, of which CUDA takes less than 2^16; more go along z


@triton.jit
def _meet_targets(x_s, slopes, y, M: tl.constexpr, K: tl.constexpr):
    """Return P0, P1 [M, K] and P2 [M], one after the other: each [LANES]."""
    squares, along, own = (), (), ()
    for j in tl.static_range(M):
        for k in tl.static_range(K):
            apart = x_s[j] - y[k]
            squares += (tl.sum(apart * apart, 1),)
            along += (tl.sum(apart * slopes[j], 1),)
        own += (tl.sum(slopes[j] * slopes[j], 1),)
    return squares + along + own


@triton.jit
def _meet_particles(x_s, slopes, others, other_slopes, M: tl.constexpr, N: tl.constexpr, SAME: tl.constexpr):
    """Return Q0, Q1, Q2, one after the other: of the pairs j < l if both groups are the SAME, else [M, N]."""
    squares, along, turns = (), (), ()
    for j in tl.static_range(M):
        for other in tl.static_range(j + 1 if SAME else 0, N):
            apart, turn = x_s[j] - others[other], slopes[j] - other_slopes[other]
            squares += (tl.sum(apart * apart, 1),)
            along += (tl.sum(apart * turn, 1),)
            turns += (tl.sum(turn * turn, 1),)
    return squares + along + turns


@triton.jit(do_not_specialize=["steps", *WORDS])
def guided_energy_kernel(
    parts,
    chunks,
    steps,
    x,
    cond,
    uncond,
    noise,
    target,
    row,
    levels,
    PREDICTION: tl.constexpr,
    churn,
    omega,
    KNOTS: tl.constexpr,
    seeds,
    seed_low,
    seed_high,
    first_sample,
    target_seeds,
    target_low,
    target_high,
    target_first,
    KIND: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    MEETING: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute parts [B, chunks, statistics]. A program takes the pairs of a group of particles with a group of targets,
    with another group of particles, or, if there is one group of each, all pairs: see `Meeting`."""
    GROUP_M: tl.constexpr = MEETING[0]
    GROUP_K: tl.constexpr = MEETING[1]
    TO_TARGETS: tl.constexpr = MEETING[2]
    TO_PARTICLES: tl.constexpr = MEETING[3]
    COUNT: tl.constexpr = MEETING[4]
    LEVELS: tl.constexpr = MEETING[5]
    CENTRED: tl.constexpr = KIND != "tensor"
    ALL: tl.constexpr = TO_TARGETS and TO_PARTICLES
    GROUPS: tl.constexpr = ((K if TO_TARGETS else M) + GROUP_K - 1) // GROUP_K
    MEETINGS: tl.constexpr = (M + GROUP_M - 1) // GROUP_M * GROUPS
    meeting = tl.program_id(1)
    if MEETINGS > COLUMN:
        meeting += tl.program_id(2) * COLUMN
    item, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    ones = item + tl.arange(0, 1)
    scalars = scalars_of(omega, KNOTS, levels, PREDICTION, churn, ones, CENTRED)
    keys, target_keys = (None, None, None), (None, None, None)
    if first_sample is not None:
        keys = item_keys(seeds, seed_low, seed_high, first_sample, ones, ones == ones)
    if KIND == "renoise":
        target_keys = item_keys(target_seeds, target_low, target_high, target_first, ones, ones == ones)
    spread, signal = 0.0, None
    if CENTRED:
        signal = tl.load(levels[2] + item * levels[5]).to(tl.float64)
        spread = tl.load(levels[3] + item * levels[5]).to(tl.float32)

    sources = x, cond, uncond, noise
    made = scalars, keys
    first, other = meeting // GROUPS * GROUP_M, meeting % GROUPS
    begin = chunk * steps.to(tl.int64)
    end = tl.minimum(begin + steps, column_blocks(row, LANES * WIDTH))
    if MEETINGS > COLUMN:
        end = tl.where(meeting < MEETINGS, end, begin)
    if not TO_TARGETS:
        end = tl.where((other + 1) * GROUP_K <= first + 1, begin, end)  # another program takes those pairs
    elements = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    quad = tl.arange(0, LANES)[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((LANES,), tl.float32),)
    for step in range(begin, end):
        offsets = step * (LANES * WIDTH) + elements
        quads = step * (LANES * WIDTH // 4) + quad
        mask = offsets < row
        place = item, row, offsets, quads, mask
        centre = None
        if CENTRED:
            x0 = tl.load(target[0] + item * target[1] + offsets, mask=mask, other=0.0)
            centre = signal * x0.to(tl.float64)
        x_s, slopes = guide(sources, made, centre, place, first, M, GROUP_M, M % GROUP_M == 0)
        products = ()
        if TO_TARGETS:
            y = ()
            for i in tl.static_range(GROUP_K):
                y += (aim(target, spread, target_keys, place, other * GROUP_K + i, KIND, K, K % GROUP_K == 0),)
            products += _meet_targets(x_s, slopes, y, GROUP_M, GROUP_K)
        if ALL:
            products += _meet_particles(x_s, slopes, x_s, slopes, GROUP_M, GROUP_M, True)
        elif TO_PARTICLES:
            for i in tl.static_range(GROUP_K):  # one at a time: fewer registers
                one, turned = guide(sources, made, centre, place, other * GROUP_K + i, M, 1, M % GROUP_K == 0)
                products += _meet_particles(x_s, slopes, one, turned, GROUP_M, 1, False)
        added = ()
        for i in tl.static_range(COUNT):
            added += (sums[i] + products[i],)
        sums = added

    at = tl.arange(0, 1 << LEVELS)
    if ALL:
        there = at < COUNT
    elif TO_TARGETS:
        field, pair = at // (GROUP_M * GROUP_K), at % (GROUP_M * GROUP_K)
        j = first + tl.where(field < 2, pair // GROUP_K, pair)
        k = other * GROUP_K + pair % GROUP_K
        there = (at < COUNT) & (j < M) & (k < tl.where(field < 2, K, GROUP_K))  # P2 from the first group of targets
        at = tl.where(field < 2, (field * M + j) * K + k, 2 * M * K + j)
    else:
        j, field, k = first + at % GROUP_M, at // GROUP_M % 3, other * GROUP_K + at // (3 * GROUP_M)
        there = (at < COUNT) & (j < k) & (k < M)
        at = 2 * M * K + M + field * (M * (M - 1) // 2) + j * M - j * (j + 1) // 2 + k - j - 1
    STATISTICS: tl.constexpr = 2 * M * K + M + 3 * (M * (M - 1) // 2)
    parts += (item * chunks + chunk) * STATISTICS
    tl.store(parts + at, lane_totals(sums, COUNT, LEVELS, LANES), mask=there)


class Meeting(NamedTuple):
    """A launch: of the pairs with targets, of those between particles, or of all."""

    group_m: int  # particles that a program holds
    group_k: int  # targets, or other particles
    to_targets: bool
    to_particles: bool
    count: int  # of sums
    levels: int  # of `lane_totals`: count <= 2^levels

    def grid(self, m: int, k: int) -> tuple[int, int]:
        """Return the programs of a chunk, along y and z."""
        programs = cdiv(m, self.group_m) * cdiv(k if self.to_targets else m, self.group_k)
        return min(programs, COLUMN.value), cdiv(programs, COLUMN.value)


def forward(outputs: tuple[Tensor, Tensor, Tensor], a: EnergyCall) -> None:
    batch, m = a.forward.x.shape[:2]
    k, row = a.forward.target.k, row_of(a.forward)
    meetings = _meetings(m, k, draws(a.forward))
    lanes, width, warps = block_of(a.forward, 8 if len(meetings) == 1 else 4)
    chunks, steps = _chunks(batch, cdiv(row, lanes * width))
    statistics = outputs[2]
    parts = torch.empty((batch, chunks, statistics.shape[1]), dtype=torch.float32, device=statistics.device)
    data = data_arguments(a.forward)
    for meeting in meetings:
        launch(
            guided_energy_kernel,
            (batch * chunks, *meeting.grid(m, k)),
            parts,
            chunks,
            steps,
            *data,
            tuple(meeting),
            lanes,
            width,
            like=parts,
            num_warps=warps,
        )
    finish(outputs, parts, row, a)


def _chunks(batch: int, steps: int) -> tuple[int, int]:
    """Return (chunks of an item, steps of a chunk): enough programs, and few steps to add up in float32."""
    wanted = max(cdiv(PROGRAMS, batch), cdiv(steps, STEPS))
    each = cdiv(steps, min(wanted, CHUNKS, steps))
    return cdiv(steps, each), each


def _meetings(m: int, k: int, drawn: bool) -> list[Meeting]:
    """Return the launches: one for all pairs, or one with targets and one between particles."""
    group_m, group_k = min(m, GROUP), min(k, GROUP)
    if m == group_m and k == group_k:
        return [_meeting(m, k, True, True, 2 * m * k + m + 3 * (m * (m - 1) // 2))]
    others = min(m, GROUP // 2 if drawn else GROUP)  # drawing takes registers
    return [
        _meeting(group_m, group_k, True, False, 2 * group_m * group_k + group_m),
        _meeting(group_m, others, False, True, 3 * group_m * others),
    ]


def _meeting(group_m: int, group_k: int, to_targets: bool, to_particles: bool, count: int) -> Meeting:
    return Meeting(group_m, group_k, to_targets, to_particles, count, (count - 1).bit_length())
