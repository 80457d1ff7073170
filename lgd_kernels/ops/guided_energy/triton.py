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

from lgd_kernels.native import particle_rows, sizes, with_contiguous_rows
from lgd_kernels.ops.guided_energy.triton_finish import finish, guided_energy_finish_kernel  # noqa: F401
from lgd_kernels.philox import STREAM_STEP, STREAM_TARGETS
from lgd_kernels.triton_common import (
    NOISE_NONE,
    NOISE_TENSOR,
    column_blocks,
    lane_totals,
    level_arguments,
    number_arguments,
    omega_arguments,
    omega_at,
    on_device,
    per_sample,
    philox_quads,
    sample_keys,
    seed_arguments,
    step_coefficients,
)

GROUP = 4  # particles, or targets, that a program holds in registers
LANES = 128  # threads of a program: sums stay in one until the end
PROGRAMS = 1056  # that keep a large GPU busy: 8 for each of 132 multiprocessors
STEPS = 64  # blocks that a program adds up in float32, as long as no item has more chunks than
CHUNKS = 64


@triton.jit
def _guide(
    sources, scalars, keys, centre, item, first, row, offsets, quads, mask, STREAM: tl.constexpr, NOISE: tl.constexpr,
    CENTRED: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Particles first to first + COUNT of an item and d x_s / d omega, tuples of [LANES, WIDTH] float32. With a centre,
    x_s - centre, in float64 until it is small: particles near it keep their distance whatever their norm."""
    x, x_stride, cond, cond_stride, uncond, uncond_stride, noise, noise_stride = sources
    a, b, v, w = scalars
    low, high, sample = keys
    found, slopes = (), ()
    for i in tl.static_range(COUNT):
        j = first + i
        at = item * M + j
        there = mask if WHOLE else offsets < tl.where(j < M, row, 0)
        here = tl.load(x + at * x_stride + offsets, mask=there, other=0.0).to(tl.float32)
        c = tl.load(cond + at * cond_stride + offsets, mask=there, other=0.0).to(tl.float32)
        u = tl.load(uncond + at * uncond_stride + offsets, mask=there, other=0.0).to(tl.float32)
        slope = b.to(tl.float32) * (c - u)
        if CENTRED:
            wide = a * here.to(tl.float64) + (b * (1 + w) * c.to(tl.float64) - (b * w * u.to(tl.float64) + centre))
            x_s = wide.to(tl.float32)
        else:
            x_s = a * here + b * (c + w * (c - u))
        if NOISE == NOISE_TENSOR:
            x_s += v * tl.load(noise + at * noise_stride + offsets, mask=there, other=0.0).to(tl.float32)
        elif NOISE != NOISE_NONE:
            z = philox_quads(low, high, sample * M + j.to(tl.uint32), STREAM, quads, LANES, WIDTH // 4)
            x_s += v * tl.where(mask, z, 0.0)
        found += (x_s,)
        slopes += (slope,)
    return found, slopes


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
    w = omega_at(omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, knot_rows,
                 knot_columns, ones, present, OMEGA, KNOTS_S, KNOTS_T)  # fmt: skip
    churned = per_sample(churn, churn_stride, churn_value, ones, present, CHURN)
    a, b, v = step_coefficients(signal_t, noise_t, signal_s, noise_s, gap, levels_stride, churned, ones, present,
                                PREDICTION, CENTRED)  # fmt: skip
    scalars = tl.sum(a, 0), tl.sum(b, 0), tl.sum(v, 0).to(tl.float32), tl.sum(w, 0).to(a.dtype)
    if NOISE == NOISE_NONE or NOISE == NOISE_TENSOR:
        keys = 0, 0, 0
    else:
        low, high, sample = sample_keys(seed, seed_stride, seed_low, seed_high, first_sample, ones, present, NOISE)
        keys = low[:, None], high[:, None], sample[:, None]
    if TARGET == NOISE_NONE or TARGET == NOISE_TENSOR:
        target_keys = 0, 0, 0
    else:
        low, high, sample = sample_keys(target_seed, target_seed_stride, target_seed_low, target_seed_high,
                                        target_first_sample, ones, present, TARGET)  # fmt: skip
        target_keys = low[:, None], high[:, None], sample[:, None]
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
        x_s, slopes = _guide(sources, scalars, keys, centre, item, first, row, offsets, quads, mask, STREAM, NOISE,
                             CENTRED, M, GROUP_M, M % GROUP_M == 0, LANES, WIDTH)  # fmt: skip
        products = ()
        if TO_TARGETS:
            y = ()
            for i in tl.static_range(GROUP_K):
                k = other * GROUP_K + i
                if TARGET == NOISE_TENSOR:
                    there = mask if K % GROUP_K == 0 else offsets < tl.where(k < K, row, 0)
                    at = target + (item * K + k) * target_stride + offsets
                    y += (tl.load(at, mask=there, other=0.0).to(tl.float32),)
                elif TARGET == NOISE_NONE:
                    y += (tl.zeros((LANES, WIDTH), tl.float32),)
                else:
                    z = philox_quads(target_keys[0], target_keys[1], target_keys[2] * K + k.to(tl.uint32),
                                     TARGET_STREAM, quads, LANES, WIDTH // 4)  # fmt: skip
                    y += (spread * tl.where(mask, z, 0.0),)
            products += _meet_targets(x_s, slopes, y, GROUP_M, GROUP_K)
        if ALL:
            products += _meet_particles(x_s, slopes, x_s, slopes, GROUP_M, GROUP_M, True)
        elif TO_PARTICLES:
            for i in tl.static_range(GROUP_K):  # one met before the next is made: fewer registers
                one, turned = _guide(sources, scalars, keys, centre, item, other * GROUP_K + i, row, offsets, quads,
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
    rows = (with_contiguous_rows(particle_rows(tensor)) for tensor in (x, cond, uncond, noise))
    x, cond, uncond, noise = rows
    target = with_contiguous_rows(particle_rows(target) if kind == "tensor" else target)
    sources = (x, cond, uncond, target) if noise is None else (x, cond, uncond, target, noise)
    draws = kind == "renoise" or noise is None and (seed is not None or seed_value is not None)
    meetings = _meetings(m, k, draws)
    fits = len(meetings) == 1 and kind == "tensor" and not draws
    width = 8 if fits and all(tensor.dtype.itemsize == 2 for tensor in sources) else 4  # at most 16 bytes to a thread
    _, row = sizes(x)
    lanes = min(LANES, max(32, triton.next_power_of_2(triton.cdiv(row, width))))
    chunks, steps = _chunks(batch, triton.cdiv(row, lanes * width))
    parts = torch.empty((batch, chunks, statistics.shape[1]), dtype=torch.float32, device=x.device)
    noise_or_x = x if noise is None else noise
    drawn = seed_arguments(target_seed, target_seed_value, first_sample, target if kind == "tensor" else None, x)
    target_kind = drawn.pop("NOISE")
    rest = {
        **omega_arguments(omega, omega_value, table, x), **seed_arguments(seed, seed_value, first_sample, noise, x),
        **{f"target_{name}": value for name, value in drawn.items()}, "TARGET": target_kind, "STREAM": STREAM_STEP,
        "TARGET_STREAM": STREAM_TARGETS, "PREDICTION": prediction, "CHURN": churn is not None, "M": m, "K": k,
        "LANES": lanes, "WIDTH": width, "num_warps": max(1, lanes // (64 if torch.version.hip else 32)),
        "enable_fp_fusion": True,
    }  # fmt: skip
    with on_device(x):
        for programs, shape in meetings:
            guided_energy_kernel[batch * chunks, programs](
                parts, chunks, steps, x, x.stride(0), cond, cond.stride(0), uncond, uncond.stride(0), noise_or_x,
                noise_or_x.stride(0), target, target.stride(0), row, *level_arguments(levels),
                *number_arguments(churn, churn_value, x), **rest, **shape,
            )  # fmt: skip
        *_, noise_s, _, levels_stride = level_arguments(levels)
        share = lam / 2 * (1.0 if unbiased else (m - 1) / m) if m > 1 else 0.0
        finish(loss, slope, statistics, parts, row, noise_s, levels_stride, beta, share, m, k, kind == "expected")


def _chunks(batch: int, steps: int) -> tuple[int, int]:
    """(chunks of an item, steps of a chunk): enough for the GPU, and few enough steps to add up in float32."""
    wanted = max(triton.cdiv(PROGRAMS, batch), triton.cdiv(steps, STEPS))
    each = triton.cdiv(steps, min(wanted, CHUNKS, steps))
    return triton.cdiv(steps, each), each


def _meetings(m: int, k: int, draws: bool) -> list[tuple[int, dict]]:
    """(programs for a chunk, the kernel's parameters) of each launch: one for all, or against targets and particles."""
    group_m, group_k = min(m, GROUP), min(k, GROUP)
    if m == group_m and k == group_k:
        launches = [(k, group_k, True, True, 2 * m * k + m + 3 * (m * (m - 1) // 2))]
    else:
        others = min(m, GROUP // 2 if draws else GROUP)  # drawing takes registers
        launches = [(k, group_k, True, False, 2 * group_m * group_k + group_m),
                    (m, others, False, True, 3 * group_m * others)]  # fmt: skip
    return [
        (triton.cdiv(m, group_m) * triton.cdiv(met, group), {
            "GROUP_M": group_m, "GROUP_K": group, "TO_TARGETS": to_targets, "TO_PARTICLES": to_particles,
            "COUNT": count, "LEVELS": (count - 1).bit_length(),
        })
        for met, group, to_targets, to_particles, count in launches
    ]  # fmt: skip
