"""What both kernels make of the data in registers: an item's scalars, its guided particles and its targets. And the
data as their launchers hand them over."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.runtime.memory import particle_rows, sizes, with_contiguous_rows
from lgd_kernels.runtime.philox import STREAM_STEP, STREAM_TARGETS
from lgd_kernels.runtime.triton_common import philox_quads, step_coefficients
from lgd_kernels.runtime.triton_old import (
    NOISE_NONE,
    NOISE_SEED,
    NOISE_SEEDS,
    NOISE_TENSOR,
    level_arguments,
    number_arguments,
    omega_arguments,
    omega_at,
    per_sample,
    sample_keys,
    seed_arguments,
)

GROUP = 4  # particles, or targets, that a program holds in registers
LANES = 128  # threads of a program


@triton.jit
def keys_of(seed, item, present, NOISE: tl.constexpr):
    """Key (low, high) and sample index of an item's noise, [1, 1] each, where noise is drawn."""
    data, stride, low, high, first = seed
    if NOISE == NOISE_NONE or NOISE == NOISE_TENSOR:
        return 0, 0, 0
    else:
        low, high, sample = sample_keys(data, stride, low, high, first, item, present, NOISE)
        return low[:, None], high[:, None], sample[:, None]


@triton.jit
def scalars_of(
    levels, churn, omega, item, present, PREDICTION: tl.constexpr, CHURN: tl.constexpr, OMEGA: tl.constexpr,
    KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Coefficients of x, of the guided prediction and of the noise, and omega. Float32; WIDE, but for the third, 64."""
    w = omega_at(*omega, item, present, OMEGA, KNOTS_S, KNOTS_T)
    a, b, v = step_coefficients(*levels, per_sample(*churn, item, present, CHURN), item, present, PREDICTION, WIDE)
    return tl.sum(a, 0), tl.sum(b, 0), tl.sum(v, 0).to(tl.float32), tl.sum(w, 0).to(a.dtype)


@triton.jit
def guide(
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
            z = philox_quads(low, high, sample * M + tl.cast(j, tl.uint32), STREAM, quads, LANES, WIDTH // 4)
            x_s += v * tl.where(mask, z, 0.0)
        found += (x_s,)
        slopes += (slope,)
    return found, slopes


@triton.jit
def aim(
    target, target_stride, spread, keys, item, k, row, offsets, quads, mask, STREAM: tl.constexpr, TARGET: tl.constexpr,
    K: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Target k of an item, [LANES, WIDTH] float32: from a tensor; noise around x0; or x0 itself, the centre."""
    if TARGET == NOISE_TENSOR:
        there = mask if WHOLE else offsets < tl.where(k < K, row, 0)
        return tl.load(target + (item * K + k) * target_stride + offsets, mask=there, other=0.0).to(tl.float32)
    elif TARGET == NOISE_NONE:
        return tl.zeros((LANES, WIDTH), tl.float32)
    else:
        z = philox_quads(keys[0], keys[1], keys[2] * K + tl.cast(k, tl.uint32), STREAM, quads, LANES, WIDTH // 4)
        return spread * tl.where(mask, z, 0.0)


def data_arguments(
    x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed, seed_value,
    first_sample, target, kind, k, target_seed, target_seed_value,
) -> dict:  # fmt: skip
    """The kernels' parameters for what goes in, by name."""
    m = x.shape[1]
    x, cond, uncond, noise = (with_contiguous_rows(particle_rows(tensor)) for tensor in (x, cond, uncond, noise))
    target = with_contiguous_rows(particle_rows(target) if kind == "tensor" else target)
    drawn = seed_arguments(target_seed, target_seed_value, first_sample, target if kind == "tensor" else None, x)
    target_kind = drawn.pop("NOISE")
    names = ("signal_t", "noise_t", "signal_s", "noise_s", "gap", "levels_stride")
    data = {"x": x, "cond": cond, "uncond": uncond, "noise": x if noise is None else noise, "target": target}
    churns = dict(zip(("churn", "churn_stride", "churn_value"), number_arguments(churn, churn_value, x), strict=True))
    return {
        **data, **{f"{name}_stride": tensor.stride(0) for name, tensor in data.items()}, "row": sizes(x)[1],
        **dict(zip(names, level_arguments(levels), strict=True)), **churns,
        **omega_arguments(omega, omega_value, table, x), **seed_arguments(seed, seed_value, first_sample, noise, x),
        **{f"target_{name}": value for name, value in drawn.items()}, "TARGET": target_kind, "STREAM": STREAM_STEP,
        "TARGET_STREAM": STREAM_TARGETS, "PREDICTION": prediction, "CHURN": churn is not None, "M": m, "K": k,
    }  # fmt: skip


def draws(data: dict) -> bool:
    """Whether noise or targets are."""
    return any(data[kind] in (NOISE_SEED, NOISE_SEEDS) for kind in ("NOISE", "TARGET"))


def shape_of(data: dict, most: int) -> dict[str, int]:
    """LANES and WIDTH of a block of a row: at most 16 bytes, and `most` elements, to a thread."""
    sources: list[Tensor] = [data[name] for name in ("x", "cond", "uncond", "noise", "target")]
    half = data["TARGET"] == NOISE_TENSOR and not draws(data) and all(one.dtype.itemsize == 2 for one in sources)
    width = min(most, 8) if half else 4
    lanes = min(LANES, max(32, triton.next_power_of_2(triton.cdiv(data["row"], width))))
    warps = max(1, lanes // (64 if torch.version.hip else 32))
    return {"LANES": lanes, "WIDTH": width, "num_warps": warps, "enable_fp_fusion": True}
