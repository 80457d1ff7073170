"""What ops that are not converted to triton_launch.py still use; deleted when none is left."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.runtime.memory import sizes
from lgd_kernels.runtime.triton_common import _table_omega
from lgd_kernels.runtime.triton_launch import TILE, _signed

COMPILE = {"num_warps": 4, "enable_fp_fusion": True}  # fusion said aloud: its default differs between versions

# Where a number comes from (constexpr of the kernels).
VALUE, PER_SAMPLE, TABLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOISE_NONE, NOISE_TENSOR, NOISE_SEED, NOISE_SEEDS = (tl.constexpr(code) for code in range(4))


@triton.jit
def sample_keys(seed, seed_stride, seed_low, seed_high, first_sample, rows, mask, NOISE: tl.constexpr):
    """Key (low, high) and sample index of each row, uint32. A seed of its own for each sample has the index 0."""
    if NOISE == NOISE_SEED:
        nothing = tl.zeros_like(rows).to(tl.uint32)
        return nothing + seed_low.to(tl.uint32), nothing + seed_high.to(tl.uint32), (first_sample + rows).to(tl.uint32)
    else:
        key = tl.load(seed + rows * seed_stride, mask=mask, other=0)
        sample = tl.where(seed_stride == 0, first_sample + rows, 0)
        return key.to(tl.uint32), (key >> 32).to(tl.uint32), sample.to(tl.uint32)


@triton.jit
def per_sample(data, stride, value, rows, mask, SOURCE: tl.constexpr):
    """A number for each row, float32."""
    if SOURCE == PER_SAMPLE:
        return tl.load(data + rows * stride, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(rows).to(tl.float32) + value


@triton.jit
def omega_at(
    omega, omega_stride, omega_value, values, s_knots, t_knots, c, s, t, conditions, rows_count, columns_count,
    rows, mask, OMEGA: tl.constexpr, KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr,
):  # fmt: skip
    """omega for each row."""
    if OMEGA == TABLE:
        return _table_omega(values, s_knots, t_knots, c, s, t, conditions, rows_count, columns_count, rows, mask,
                            KNOTS_S, KNOTS_T)  # fmt: skip
    else:
        return per_sample(omega, omega_stride, omega_value, rows, mask, OMEGA)


def tiling(like: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """(grid, column blocks, {ROWS, BLOCK}): tiles of TILE elements, of several samples where these are short."""
    batch, row = sizes(like)
    block = min(TILE, max(4, triton.next_power_of_2(row)))
    rows = TILE // block
    blocks = triton.cdiv(row, block)
    return (triton.cdiv(batch, rows) * blocks,), blocks, {"ROWS": rows, "BLOCK": block, **COMPILE}


def level_arguments(levels: list[Tensor]) -> tuple[Tensor | int, ...]:
    """The five tensors and their stride, one for all (0 where all are expanded)."""
    stride = levels[0].stride(0)
    if all(tensor.stride(0) == stride for tensor in levels):
        return *levels, stride
    return *(tensor.contiguous() for tensor in levels), 1


def number_arguments(tensor: Tensor | None, value: float, like: Tensor) -> tuple[Tensor, int, float]:
    """(tensor, stride, value); an absent tensor points at `like` and is never read."""
    return (like, 0, value) if tensor is None else (tensor, tensor.stride(0), 0.0)


def omega_arguments(omega: Tensor | None, value: float, table: list[Tensor], like: Tensor) -> dict:
    """The kernels' parameters for omega, by name."""
    values, s_knots, t_knots, c, s, t = table or [like] * 6
    conditions, knot_rows, knot_columns = values.shape if table else (1, 1, 1)
    data, stride, value = number_arguments(omega, value, like)
    return {
        "omega": data, "omega_stride": stride, "omega_value": value,
        "values": values, "s_knots": s_knots, "t_knots": t_knots, "c": c, "s": s, "t": t,
        "conditions": conditions, "knot_rows": knot_rows, "knot_columns": knot_columns,
        "OMEGA": TABLE if table else VALUE if omega is None else PER_SAMPLE,
        "KNOTS_S": triton.next_power_of_2(knot_rows), "KNOTS_T": triton.next_power_of_2(knot_columns),
    }  # fmt: skip


def seed_arguments(
    seed: Tensor | None, value: int | None, first_sample: int, noise: Tensor | None, like: Tensor
) -> dict:
    """The kernels' parameters for noise: given, drawn from one seed or from one for each sample, or none."""
    own = seed is not None and seed.ndim == 1
    if own and seed.stride(0) == 0:  # expanded: still one for each sample, which the kernels tell by the stride
        seed = seed.contiguous()
    source = (
        NOISE_TENSOR if noise is not None else NOISE_SEEDS if seed is not None
        else NOISE_NONE if value is None else NOISE_SEED
    )  # fmt: skip
    return {
        "seed": like if seed is None else seed, "seed_stride": seed.stride(0) if own else 0,
        "seed_low": _signed(value or 0), "seed_high": _signed((value or 0) >> 32),
        "first_sample": 0 if own else _signed(first_sample), "NOISE": source,
    }  # fmt: skip


def on_device(tensor: Tensor):
    """Launch where the tensor is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def rounded_stores(*outputs: Tensor | None):
    """The tensors to write to: these, but for Triton's interpreter, which truncates float32 to bfloat16. There the
    kernel writes float32 and torch rounds."""
    wide = [out.float() if _truncates(out) else out for out in outputs]
    yield wide
    for out, stored in zip(outputs, wide, strict=True):
        if stored is not out:
            out.copy_(stored)


def _truncates(out: Tensor | None) -> bool:
    return out is not None and not out.is_cuda and out.dtype == torch.bfloat16
