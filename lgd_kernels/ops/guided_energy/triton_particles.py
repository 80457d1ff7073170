"""Device functions of both kernels, for an item's scalars, guided particles and targets; and the kernels' arguments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.guided_energy.structs import GuidedEnergy
from lgd_kernels.runtime.memory import particle_rows, sizes
from lgd_kernels.runtime.philox import STREAM_STEP, STREAM_TARGETS
from lgd_kernels.runtime.triton_common import keys_of, number_at, omega_at, philox_quads, step_coefficients
from lgd_kernels.runtime.triton_launch import (
    cdiv,
    level_argument,
    number_argument,
    omega_arguments,
    power_of_2,
    rows_argument,
    seed_arguments,
)

GROUP = 4  # particles, or targets, that a program holds in registers
LANES = 128  # threads of a program
STEP, TARGETS = tl.constexpr(STREAM_STEP), tl.constexpr(STREAM_TARGETS)
WORDS = ["seed_low", "seed_high", "first_sample", "target_low", "target_high", "target_first"]  # for do_not_specialize


@triton.jit
def item_keys(seeds, seed_low, seed_high, first_sample, item, present):
    """Return the key (low, high) and sample index of an item's noise, [1, 1] each."""
    low, high, sample = keys_of(seeds, seed_low, seed_high, first_sample, item, present)
    return low[:, None], high[:, None], sample[:, None]


@triton.jit
def scalars_of(omega, KNOTS: tl.constexpr, levels, PREDICTION: tl.constexpr, churn, item, WIDE: tl.constexpr):
    """Return the coefficients of x, of the guided prediction and of the noise, and omega. All are float32; if WIDE all
    but the third are float64. `item` is [1]."""
    present = item == item
    w = omega_at(omega, KNOTS, item, present)
    a, b, v = step_coefficients(*levels, number_at(churn, item, present), item, present, PREDICTION, WIDE)
    return tl.sum(a, 0), tl.sum(b, 0), tl.sum(v, 0).to(tl.float32), tl.sum(w, 0).to(a.dtype)


@triton.jit
def guide(sources, made, centre, place, first, M: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """Return particles first to first + COUNT of an item and d x_s / d omega, tuples of [LANES, WIDTH] float32.

    With a centre, x_s - centre, in float64 until it is small: particles near it keep their distance whatever their
    norm. `sources` are x, cond, uncond and noise; `made` is (scalars, keys); `place` is (item,
    row, offsets, quads, mask). If not WHOLE, particles may lie beyond M."""
    x, cond, uncond, noise = sources
    a, b, v, w = made[0]
    low, high, sample = made[1]
    item, row, offsets, quads, mask = place
    found, slopes = (), ()
    for i in tl.static_range(COUNT):
        j = first + i
        at = item * M + j
        there = mask if WHOLE else offsets < tl.where(j < M, row, 0)
        here = tl.load(x[0] + at * x[1] + offsets, mask=there, other=0.0).to(tl.float32)
        c = tl.load(cond[0] + at * cond[1] + offsets, mask=there, other=0.0).to(tl.float32)
        u = tl.load(uncond[0] + at * uncond[1] + offsets, mask=there, other=0.0).to(tl.float32)
        slope = b.to(tl.float32) * (c - u)
        if centre is None:
            x_s = a * here + b * (c + w * (c - u))
        else:
            wide = a * here.to(tl.float64) + (b * (1 + w) * c.to(tl.float64) - (b * w * u.to(tl.float64) + centre))
            x_s = wide.to(tl.float32)
        if noise is not None:
            x_s += v * tl.load(noise[0] + at * noise[1] + offsets, mask=there, other=0.0).to(tl.float32)
        elif low is not None:
            index = sample * M + tl.cast(j, tl.uint32)
            z = philox_quads(low, high, index, STEP, quads, offsets.shape[0], offsets.shape[1] // 4)
            x_s += v * tl.where(mask, z, 0.0)
        found += (x_s,)
        slopes += (slope,)
    return found, slopes


@triton.jit
def aim(target, spread, keys, place, k, KIND: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """Return target k of an item, [LANES, WIDTH] float32: loaded; noise around x0; or 0, x0 itself, the centre."""
    item, row, offsets, quads, mask = place
    if KIND == "tensor":
        there = mask if WHOLE else offsets < tl.where(k < K, row, 0)
        return tl.load(target[0] + (item * K + k) * target[1] + offsets, mask=there, other=0.0).to(tl.float32)
    elif KIND == "expected":
        return tl.zeros((offsets.shape[0], offsets.shape[1]), tl.float32)
    else:
        index = keys[2] * K + tl.cast(k, tl.uint32)
        z = philox_quads(keys[0], keys[1], index, TARGETS, quads, offsets.shape[0], offsets.shape[1] // 4)
        return spread * tl.where(mask, z, 0.0)


def data_arguments(a: GuidedEnergy) -> tuple:
    """Return the arguments of both kernels from x to K."""
    omega, levels, prediction, churn = a.scalars
    data, kind, k, target_seed = a.target
    return (
        *(rows_argument(particle_rows(one)) for one in (a.x, a.cond, a.uncond, a.noise)),
        rows_argument(particle_rows(data) if kind == "tensor" else data),
        row_of(a),
        level_argument(levels),
        prediction,
        number_argument(churn),
        *omega_arguments(omega),
        *seed_arguments(a.seed),
        *seed_arguments(target_seed),
        kind,
        a.x.shape[1],
        k,
    )


def row_of(a: GuidedEnergy) -> int:
    """Return the elements of a particle."""
    return sizes(a.x)[1] // a.x.shape[1]


def draws(a: GuidedEnergy) -> bool:
    """Return whether noise or targets are drawn."""
    seed = a.seed
    return a.target.kind == "renoise" or (a.noise is None and (seed.tensor is not None or seed.value is not None))


def block_of(a: GuidedEnergy, most: int) -> tuple[int, int, int]:
    """Return LANES and WIDTH of a block of a row, and its warps: at most 16 bytes, and `most` elements, to a thread."""
    read: list[Tensor] = [one for one in a.data if one is not None]
    half = a.target.kind == "tensor" and not draws(a) and all(one.dtype.itemsize == 2 for one in read)
    width = min(most, 8) if half else 4
    lanes = min(LANES, max(32, power_of_2(cdiv(row_of(a), width))))
    return lanes, width, max(1, lanes // (64 if torch.version.hip else 32))
