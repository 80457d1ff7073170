"""The pass that takes the gradient to the data: it makes particles and targets again, and weighs their differences.

Of two points in a term of the loss each is pulled along their difference, by a weight that is there already. A program
holds a group of particles at a time, walks over all that they meet, and goes on with the next group; a second launch
holds targets, where more than one group of particles pulls at them. Up to four particles every byte is read once, and
as many are written as gradients are wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
from lgd_kernels.runtime.memory import particle_rows
from lgd_kernels.runtime.triton_common import column_blocks
from lgd_kernels.runtime.triton_old import NOISE_TENSOR, on_device, rounded_stores


@triton.jit
def _weight(weights, at, there):
    """Of a pair, float32; 0 where there is no such pair."""
    return tl.load(weights + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _pair(j, other, M: tl.constexpr):
    """Where the weight of two particles is, in the order of triu_indices."""
    low, high = tl.minimum(j, other), tl.maximum(j, other)
    return low * M - low * (low + 1) // 2 + high - low - 1


@triton.jit
def _put(data, at, offsets, mask, value):
    tl.store(data + at + offsets, value.to(data.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "seed_low", "seed_high", "first_sample", "target_seed_low", "target_seed_high", "target_first_sample",
    ]
)  # fmt: skip
def guided_energy_backward_kernel(
    d_x, d_cond, d_uncond, d_noise, d_target, to_targets, to_particles, x, x_stride, cond, cond_stride, uncond,
    uncond_stride, noise, noise_stride, target, target_stride, row, signal_t, noise_t, signal_s, noise_s, gap,
    levels_stride, churn, churn_stride, churn_value, omega, omega_stride, omega_value, values, s_knots, t_knots, c, s,
    t, conditions, knot_rows, knot_columns, seed, seed_stride, seed_low, seed_high, first_sample,
    target_seed, target_seed_stride, target_seed_low, target_seed_high, target_first_sample,
    PREDICTION: tl.constexpr, CHURN: tl.constexpr, OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr,
    NOISE: tl.constexpr, TARGET: tl.constexpr, STREAM: tl.constexpr, TARGET_STREAM: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, GROUP_M: tl.constexpr, GROUP_K: tl.constexpr,
    TO_X: tl.constexpr, TO_COND: tl.constexpr, TO_UNCOND: tl.constexpr, TO_NOISE: tl.constexpr,
    TO_TARGET: tl.constexpr, HOLDS_TARGETS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """to_targets is [B, M, K], to_particles [B, M (M - 1) / 2], float64; gradients are contiguous."""
    CENTRED: tl.constexpr = TARGET != NOISE_TENSOR
    blocks = column_blocks(row, LANES * WIDTH)
    item, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
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
    sources = x, x_stride, cond, cond_stride, uncond, uncond_stride, noise, noise_stride
    offsets = block * (LANES * WIDTH) + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    quads = block * (LANES * WIDTH // 4) + tl.arange(0, LANES)[:, None] * (WIDTH // 4)
    quads += tl.arange(0, WIDTH // 4)[None, :]
    mask = offsets < row
    centre, spread = 0, 0.0
    if CENTRED:
        signal = tl.load(signal_s + item * levels_stride).to(tl.float64)
        spread = tl.load(noise_s + item * levels_stride).to(tl.float32)
        centre = signal * tl.load(target + item * target_stride + offsets, mask=mask, other=0.0).to(tl.float64)
    to_targets += item * M * K
    to_particles += item * (M * (M - 1) // 2)

    if HOLDS_TARGETS:
        for first in range(0, K, GROUP_K):
            y, pulls = (), ()
            for i in tl.static_range(GROUP_K):
                y += (aim(target, target_stride, spread, target_keys, item, first + i, row, offsets, quads, mask,
                          TARGET_STREAM, TARGET, K, K % GROUP_K == 0, LANES, WIDTH),)  # fmt: skip
                pulls += (tl.zeros((LANES, WIDTH), tl.float32),)
            for j in range(0, M):
                one, _turned = guide(sources, scalars, keys, centre, item, j, row, offsets, quads, mask, STREAM, NOISE,
                                     CENTRED, M, 1, True, LANES, WIDTH)  # fmt: skip
                pulled = ()
                for i in tl.static_range(GROUP_K):
                    weight = _weight(to_targets, j * K + first + i, first + i < K)
                    pulled += (pulls[i] + weight * (y[i] - one[0]),)
                pulls = pulled
            for i in tl.static_range(GROUP_K):
                _put(d_target, (item * K + first + i) * row, offsets, mask & (first + i < K), pulls[i])
    else:
        a, b, v, w = scalars
        all_pulls = tl.zeros((LANES, WIDTH), tl.float32)
        for first in range(0, M, GROUP_M):
            x_s, _slopes = guide(sources, scalars, keys, centre, item, first, row, offsets, quads, mask, STREAM, NOISE,
                           CENTRED, M, GROUP_M, M % GROUP_M == 0, LANES, WIDTH)  # fmt: skip
            pulls = ()
            for _i in tl.static_range(GROUP_M):
                pulls += (tl.zeros((LANES, WIDTH), tl.float32),)
            for k in range(0, K):
                y = aim(target, target_stride, spread, target_keys, item, k, row, offsets, quads, mask, TARGET_STREAM,
                        TARGET, K, True, LANES, WIDTH)  # fmt: skip
                pulled, back = (), tl.zeros((LANES, WIDTH), tl.float32)
                for i in tl.static_range(GROUP_M):
                    pull = _weight(to_targets, (first + i) * K + k, first + i < M) * (x_s[i] - y)
                    pulled += (pulls[i] + pull,)
                    back -= pull
                pulls = pulled
                if TO_TARGET and TARGET == NOISE_TENSOR:  # this group is all that pulls at them
                    _put(d_target, (item * K + k) * row, offsets, mask, back)
            if GROUP_M == M:  # all are at hand
                pulled = ()
                for i in tl.static_range(M):
                    pull = pulls[i]
                    for other in tl.static_range(M):
                        if i != other:
                            weight = _weight(to_particles, _pair(i, other, M), True)
                            pull += weight * (x_s[i] - x_s[other])
                    pulled += (pull,)
                pulls = pulled
            else:
                for other in range(0, M):
                    one, _turned = guide(sources, scalars, keys, centre, item, other, row, offsets, quads, mask, STREAM,
                                         NOISE, CENTRED, M, 1, True, LANES, WIDTH)  # fmt: skip
                    pulled = ()
                    for i in tl.static_range(GROUP_M):
                        there = (first + i != other) & (first + i < M)
                        weight = _weight(to_particles, _pair(first + i, other, M), there)
                        pulled += (pulls[i] + weight * (x_s[i] - one[0]),)
                    pulls = pulled
            for i in tl.static_range(GROUP_M):
                at, there = (item * M + first + i) * row, mask & (first + i < M)
                if TO_X:
                    _put(d_x, at, offsets, there, a.to(tl.float32) * pulls[i])
                if TO_COND:
                    _put(d_cond, at, offsets, there, (b * (1 + w)).to(tl.float32) * pulls[i])
                if TO_UNCOND:
                    _put(d_uncond, at, offsets, there, (-b * w).to(tl.float32) * pulls[i])
                if TO_NOISE:
                    _put(d_noise, at, offsets, there, v * pulls[i])
                all_pulls += tl.where(there, pulls[i], 0.0)
        if TO_TARGET and CENTRED:  # what pulls particles at each other adds up to nothing
            _put(d_target, item * row, offsets, mask, -signal.to(tl.float32) * all_pulls)


def backward(
    d_x: Tensor | None, d_cond: Tensor | None, d_uncond: Tensor | None, d_noise: Tensor | None,
    d_target: Tensor | None, to_targets: Tensor, to_particles: Tensor, x, cond, uncond, noise, *rest,
) -> None:  # fmt: skip
    """Gradients that are None are not wanted."""
    batch, m = x.shape[:2]
    data = data_arguments(x, cond, uncond, noise, *rest)
    kind, k, row = rest[-4], rest[-3], data["row"]
    shape = shape_of(data, 8 if max(m, k) <= GROUP else 4)
    grid = (batch * triton.cdiv(row, shape["LANES"] * shape["WIDTH"]),)
    held = GROUP // 2 if draws(data) and m > GROUP else min(m, GROUP)  # drawing takes registers
    groups = {"GROUP_M": held, "GROUP_K": min(k, GROUP)}
    apart = kind == "tensor" and m > GROUP and d_target is not None  # targets are held for themselves
    wanted = {
        "TO_X": d_x is not None, "TO_COND": d_cond is not None, "TO_UNCOND": d_uncond is not None,
        "TO_NOISE": d_noise is not None, "TO_TARGET": d_target is not None and not apart,
    }  # fmt: skip
    with on_device(x), rounded_stores(d_x, d_cond, d_uncond, d_noise, d_target) as stored:
        outputs = [data["x"] if out is None else particle_rows(out) for out in stored[:4]]
        outputs.append(data["x"] if stored[4] is None else stored[4])
        outputs += [to_targets.contiguous(), to_particles.contiguous()]
        for holds_targets in (False, True):
            if apart if holds_targets else any(wanted.values()):
                guided_energy_backward_kernel[grid](
                    *outputs, **data, **shape, **groups, **wanted, HOLDS_TARGETS=holds_targets
                )  # fmt: skip
