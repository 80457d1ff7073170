"""The gradient to the data: the kernel computes particles and targets again, and weighs their differences.

Each of two points in a term of the loss is pulled along their difference, by a weight that the launcher is given. A
program holds a group of particles at a time, takes all their pairs, and goes on with the next group. A second launch
holds targets, if more than one group of particles pulls at them. With up to four particles every byte is read once, and
only the wanted gradients are written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.guided_energy.structs import GuidedEnergyBackward
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
from lgd_kernels.runtime.triton_common import column_blocks
from lgd_kernels.runtime.triton_launch import cdiv, launch


@triton.jit
def _weight(weights, at, there):
    """Load the weight of a pair, float32; 0 if there is no such pair."""
    return tl.load(weights + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _pair(j, other, M: tl.constexpr):
    """Return the place of the weight of two particles, in the order of triu_indices."""
    low, high = tl.minimum(j, other), tl.maximum(j, other)
    return low * M - low * (low + 1) // 2 + high - low - 1


@triton.jit
def _put(data, at, offsets, mask, value):
    tl.store(data + at + offsets, value.to(data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=WORDS)
def guided_energy_backward_kernel(
    grads,
    to_targets,
    to_particles,
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
    GROUP_M: tl.constexpr,
    GROUP_K: tl.constexpr,
    HOLDS_TARGETS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute the gradients that are not None, contiguous, from the weights `to_targets` [B, M, K] and `to_particles`
    [B, M (M - 1) / 2], float64."""
    d_x, d_cond, d_uncond, d_noise, d_target = grads
    CENTRED: tl.constexpr = KIND != "tensor"
    blocks = column_blocks(row, LANES * WIDTH)
    item, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    ones = item + tl.arange(0, 1)
    scalars = scalars_of(omega, KNOTS, levels, PREDICTION, churn, ones, CENTRED)
    keys, target_keys = (None, None, None), (None, None, None)
    if first_sample is not None:
        keys = item_keys(seeds, seed_low, seed_high, first_sample, ones, ones == ones)
    if KIND == "renoise":
        target_keys = item_keys(target_seeds, target_low, target_high, target_first, ones, ones == ones)
    sources = x, cond, uncond, noise
    made = scalars, keys
    offsets = block * (LANES * WIDTH) + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    quads = block * (LANES * WIDTH // 4) + tl.arange(0, LANES)[:, None] * (WIDTH // 4)
    quads += tl.arange(0, WIDTH // 4)[None, :]
    mask = offsets < row
    place = item, row, offsets, quads, mask
    centre, spread, signal = None, 0.0, None
    if CENTRED:
        signal = tl.load(levels[2] + item * levels[5]).to(tl.float64)
        spread = tl.load(levels[3] + item * levels[5]).to(tl.float32)
        centre = signal * tl.load(target[0] + item * target[1] + offsets, mask=mask, other=0.0).to(tl.float64)
    to_targets += item * M * K
    to_particles += item * (M * (M - 1) // 2)

    if HOLDS_TARGETS:
        for first in range(0, K, GROUP_K):
            y, pulls = (), ()
            for i in tl.static_range(GROUP_K):
                y += (aim(target, spread, target_keys, place, first + i, KIND, K, K % GROUP_K == 0),)
                pulls += (tl.zeros((LANES, WIDTH), tl.float32),)
            for j in range(0, M):
                one, _turned = guide(sources, made, centre, place, j, M, 1, True)
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
            x_s, _slopes = guide(sources, made, centre, place, first, M, GROUP_M, M % GROUP_M == 0)
            pulls = ()
            for _i in tl.static_range(GROUP_M):
                pulls += (tl.zeros((LANES, WIDTH), tl.float32),)
            for k in range(0, K):
                y = aim(target, spread, target_keys, place, k, KIND, K, True)
                pulled, back = (), tl.zeros((LANES, WIDTH), tl.float32)
                for i in tl.static_range(GROUP_M):
                    pull = _weight(to_targets, (first + i) * K + k, first + i < M) * (x_s[i] - y)
                    pulled += (pulls[i] + pull,)
                    back -= pull
                pulls = pulled
                if d_target is not None and not CENTRED:  # no other group pulls at them
                    _put(d_target, (item * K + k) * row, offsets, mask, back)
            if GROUP_M == M:  # all particles are in registers
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
                    one, _turned = guide(sources, made, centre, place, other, M, 1, True)
                    pulled = ()
                    for i in tl.static_range(GROUP_M):
                        there = (first + i != other) & (first + i < M)
                        weight = _weight(to_particles, _pair(first + i, other, M), there)
                        pulled += (pulls[i] + weight * (x_s[i] - one[0]),)
                    pulls = pulled
            for i in tl.static_range(GROUP_M):
                at, there = (item * M + first + i) * row, mask & (first + i < M)
                if d_x is not None:
                    _put(d_x, at, offsets, there, a.to(tl.float32) * pulls[i])
                if d_cond is not None:
                    _put(d_cond, at, offsets, there, (b * (1 + w)).to(tl.float32) * pulls[i])
                if d_uncond is not None:
                    _put(d_uncond, at, offsets, there, (-b * w).to(tl.float32) * pulls[i])
                if d_noise is not None:
                    _put(d_noise, at, offsets, there, v * pulls[i])
                all_pulls += tl.where(there, pulls[i], 0.0)
        if d_target is not None and CENTRED:  # pulls between particles add up to 0
            _put(d_target, item * row, offsets, mask, -signal.to(tl.float32) * all_pulls)


def backward(grads: tuple[Tensor | None, ...], b: GuidedEnergyBackward) -> None:
    """Compute the gradients that are not None, in one launch or two."""
    a, (*to_data, d_target) = b.forward, grads
    batch, m, k = *a.x.shape[:2], a.target.k
    lanes, width, warps = block_of(a, 8 if max(m, k) <= GROUP else 4)
    held = GROUP // 2 if draws(a) and m > GROUP else min(m, GROUP)  # drawing takes registers
    apart = a.target.kind == "tensor" and m > GROUP and d_target is not None  # one launch holds the targets
    arguments = b.to_targets.contiguous(), b.to_particles.contiguous(), *data_arguments(a), held, min(k, GROUP)
    launches = [(False, (*to_data, None if apart else d_target)), (True, (*[None] * 4, d_target if apart else None))]
    for holds_targets, outputs in launches:
        if any(one is not None for one in outputs):
            launch(
                guided_energy_backward_kernel,
                (batch * cdiv(row_of(a), lanes * width),),
                outputs,
                *arguments,
                holds_targets,
                lanes,
                width,
                like=a.x,
                num_warps=warps,
            )
