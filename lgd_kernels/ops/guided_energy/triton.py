"""The Triton kernels and their launchers.

The first walks an item's rows once, in chunks, and keeps the products of every pair in registers; the second, in
triton_finish.py, adds up the chunks. With m = k = 4, B = 256, D = 12288 and given targets a call reads 201 MB of
float32 (101 MB of bfloat16) and does 164 operations for an element of an item, 0.52 GFLOP: memory decides. Noise that
is drawn replaces what need not be read by about 60 instructions for each normal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lgd_kernels.ops.guided_energy.triton_backward import backward, guided_energy_backward_kernel  # noqa: F401
from lgd_kernels.ops.guided_energy.triton_finish import finish, guided_energy_finish_kernel  # noqa: F401
from lgd_kernels.ops.guided_energy.triton_particles import (
    GROUP,
    aim,
    data_arguments,
    draws,
    guide,
    keys_of,
    scalars_of,
    shape_of,
)
from lgd_kernels.runtime.triton_common import column_blocks, lane_totals
from lgd_kernels.runtime.triton_old import NOISE_TENSOR, level_arguments, on_device

PROGRAMS = 1056  # that keep a large GPU busy: 8 for each of 132 multiprocessors
STEPS = 64  # blocks that a program adds up in float32, as long as no item has more chunks than
CHUNKS = 64


@triton.jit
def _meet_targets(x_s, slopes, y, M: tl.constexpr, K: tl.constexpr):
    """P0, P1 [M, K] and P2 [M], one after the other: each [LANES]."""
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
    """Q0, Q1, Q2, one after the other: of the pairs j < l where both are the SAME, else [M, N]."""
    squares, along, turns = (), (), ()
    for j in tl.static_range(M):
        for other in tl.static_range(j + 1 if SAME else 0, N):
            apart, turn = x_s[j] - others[other], slopes[j] - other_slopes[other]
            squares += (tl.sum(apart * apart, 1),)
            along += (tl.sum(apart * turn, 1),)
            turns += (tl.sum(turn * turn, 1),)
    return squares + along + turns


@triton.jit(
    do_not_specialize=[
        "steps", "seed_low", "seed_high", "first_sample", "target_seed_low", "target_seed_high", "target_first_sample",
    ]
)  # fmt: skip
def guided_energy_kernel(
    parts, chunks, steps, x, x_stride, cond, cond_stride, uncond, uncond_stride, noise, noise_stride,
    target, target_stride, row, signal_t, noise_t, signal_s, noise_s, gap, levels_stride, churn, churn_stride,
    churn_value, omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
    knot_columns, seed, seed_stride, seed_low, seed_high, first_sample,
    target_seed, target_seed_stride, target_seed_low, target_seed_high, target_first_sample,
    PREDICTION: tl.constexpr, CHURN: tl.constexpr, OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr,
    NOISE: tl.constexpr, TARGET: tl.constexpr, STREAM: tl.constexpr, TARGET_STREAM: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, GROUP_M: tl.constexpr, GROUP_K: tl.constexpr,
    TO_TARGETS: tl.constexpr, TO_PARTICLES: tl.constexpr, COUNT: tl.constexpr, LEVELS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """parts is [B, chunks, statistics]. A program meets a group of particles with a group of targets, with another of
    particles, or, where there is one group of each, all with all. TARGET: a tensor; noise around x0; or x0 itself."""
    CENTRED: tl.constexpr = TARGET != NOISE_TENSOR
    ALL: tl.constexpr = TO_TARGETS and TO_PARTICLES
    item, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    ones = item + tl.arange(0, 1)
    present = ones == ones
    levels = signal_t, noise_t, signal_s, noise_s, gap, levels_stride
    omegas = (omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
              knot_columns)  # fmt: skip
    scalars = scalars_of(levels, (churn, churn_stride, churn_value), omegas, ones, present, PREDICTION, CHURN, OMEGA,
                         KNOTS_S, KNOTS_T, CENTRED)  # fmt: skip
    keys = keys_of((seed, seed_stride, seed_low, seed_high, first_sample), ones, present, NOISE)
    target_keys = keys_of((target_seed, target_seed_stride, target_seed_low, target_seed_high, target_first_sample),
                          ones, present, TARGET)  # fmt: skip
    spread = 0.0
    if CENTRED:
        signal = tl.load(signal_s + item * levels_stride).to(tl.float64)
        spread = tl.load(noise_s + item * levels_stride).to(tl.float32)

    sources = x, x_stride, cond, cond_stride, uncond, uncond_stride, noise, noise_stride
    GROUPS: tl.constexpr = ((K if TO_TARGETS else M) + GROUP_K - 1) // GROUP_K
    first, other = tl.program_id(1) // GROUPS * GROUP_M, tl.program_id(1) % GROUPS
    begin = chunk * steps.to(tl.int64)
    end = tl.minimum(begin + steps, column_blocks(row, LANES * WIDTH))
    if not TO_TARGETS:
        end = tl.where((other + 1) * GROUP_K <= first + 1, begin, end)  # those pairs are met the other way round
    elements = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    quad = tl.arange(0, LANES)[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((LANES,), tl.float32),)
    for step in range(begin, end):
        offsets = step * (LANES * WIDTH) + elements
        quads = step * (LANES * WIDTH // 4) + quad
        mask = offsets < row
        if CENTRED:
            x0 = tl.load(target + item * target_stride + offsets, mask=mask, other=0.0)
            centre = signal * x0.to(tl.float64)
        else:
            centre = 0
        x_s, slopes = guide(sources, scalars, keys, centre, item, first, row, offsets, quads, mask, STREAM, NOISE,
                             CENTRED, M, GROUP_M, M % GROUP_M == 0, LANES, WIDTH)  # fmt: skip
        products = ()
        if TO_TARGETS:
            y = ()
            for i in tl.static_range(GROUP_K):
                y += (aim(target, target_stride, spread, target_keys, item, other * GROUP_K + i, row, offsets, quads,
                          mask, TARGET_STREAM, TARGET, K, K % GROUP_K == 0, LANES, WIDTH),)  # fmt: skip
            products += _meet_targets(x_s, slopes, y, GROUP_M, GROUP_K)
        if ALL:
            products += _meet_particles(x_s, slopes, x_s, slopes, GROUP_M, GROUP_M, True)
        elif TO_PARTICLES:
            for i in tl.static_range(GROUP_K):  # one met before the next is made: fewer registers
                one, turned = guide(sources, scalars, keys, centre, item, other * GROUP_K + i, row, offsets, quads,
                                     mask, STREAM, NOISE, CENTRED, M, 1, M % GROUP_K == 0, LANES, WIDTH)  # fmt: skip
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


def forward(
    loss, slope, statistics, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value,
    seed, seed_value, first_sample, target, kind, k, target_seed, target_seed_value, beta, lam, unbiased,
):  # fmt: skip
    batch, m = x.shape[:2]
    data = data_arguments(x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value,
                          seed, seed_value, first_sample, target, kind, k, target_seed, target_seed_value)  # fmt: skip
    row, meetings = data["row"], _meetings(m, k, draws(data))
    shape = shape_of(data, 8 if len(meetings) == 1 else 4)
    chunks, steps = _chunks(batch, triton.cdiv(row, shape["LANES"] * shape["WIDTH"]))
    parts = torch.empty((batch, chunks, statistics.shape[1]), dtype=torch.float32, device=x.device)
    with on_device(x):
        for programs, groups in meetings:
            guided_energy_kernel[batch * chunks, programs](parts, chunks, steps, **data, **shape, **groups)
        *_, noise_s, _, levels_stride = level_arguments(levels)
        share = lam / 2 * (1.0 if unbiased else (m - 1) / m) if m > 1 else 0.0
        finish(loss, slope, statistics, parts, row, noise_s, levels_stride, beta, share, m, k, kind == "expected")


def _chunks(batch: int, steps: int) -> tuple[int, int]:
    """(chunks of an item, steps of a chunk): enough for the GPU, and few enough steps to add up in float32."""
    wanted = max(triton.cdiv(PROGRAMS, batch), triton.cdiv(steps, STEPS))
    each = triton.cdiv(steps, min(wanted, CHUNKS, steps))
    return triton.cdiv(steps, each), each


def _meetings(m: int, k: int, drawn: bool) -> list[tuple[int, dict]]:
    """(programs for a chunk, the kernel's parameters) of each launch: one for all, or against targets and particles."""
    group_m, group_k = min(m, GROUP), min(k, GROUP)
    if m == group_m and k == group_k:
        launches = [(k, group_k, True, True, 2 * m * k + m + 3 * (m * (m - 1) // 2))]
    else:
        others = min(m, GROUP // 2 if drawn else GROUP)  # drawing takes registers
        launches = [(k, group_k, True, False, 2 * group_m * group_k + group_m),
                    (m, others, False, True, 3 * group_m * others)]  # fmt: skip
    return [
        (triton.cdiv(m, group_m) * triton.cdiv(met, group), {
            "GROUP_M": group_m, "GROUP_K": group, "TO_TARGETS": to_targets, "TO_PARTICLES": to_particles,
            "COUNT": count, "LEVELS": (count - 1).bit_length(),
        })
        for met, group, to_targets, to_particles, count in launches
    ]  # fmt: skip
