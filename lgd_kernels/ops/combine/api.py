"""The public function `combine` and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lgd_kernels.ops.combine import op
from lgd_kernels.ops.combine.structs import Combine, CombineMoments
from lgd_kernels.runtime import checks, column_checks
from lgd_kernels.runtime.arguments import Seed
from lgd_kernels.runtime.columns import Column, Columns, flat, triangle, twos
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import widest

# A tensor, or a tuple of P tensors for coefficients [B, P, K]; Any, because a type checker cannot see which.
Outputs = Tensor | Any


class Combined(NamedTuple):
    """Outputs and their moments for each sample: what `combine(..., moments=True)` returns."""

    outputs: Outputs | None  # None where the only one is not written
    dots: Tensor  # [B', P, P], symmetric
    sums: Tensor  # [B', P]


@overload
def combine(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    *,
    columns: Sequence[Column] | None = ...,
    constant: Tensor | None = ...,
    noise_scale: float | Tensor | None = ...,
    seed: int | Tensor | None = ...,
    first_sample: int = ...,
    source: Tensor | None = ...,
    clamp: tuple[float | None, float | None] | None = ...,
    moments: Literal[False] = ...,
    impl: Impl | None = ...,
) -> Outputs: ...
@overload
def combine(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    *,
    columns: Sequence[Column] | None = ...,
    constant: Tensor | None = ...,
    noise_scale: float | Tensor | None = ...,
    seed: int | Tensor | None = ...,
    first_sample: int = ...,
    source: Tensor | None = ...,
    clamp: tuple[float | None, float | None] | None = ...,
    moments: Literal[True],
    written: int | None = ...,
    wide: bool = ...,
    impl: Impl | None = ...,
) -> Combined: ...
def combine(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    *,
    columns: Sequence[Column] | None = None,
    constant: Tensor | None = None,
    noise_scale: float | Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int = 0,
    source: Tensor | None = None,
    clamp: tuple[float | None, float | None] | None = None,
    moments: bool = False,
    written: int | None = None,
    wide: bool = False,
    impl: Impl | None = None,
) -> Outputs | Combined:
    """Compute a linear combination for each sample, with noise drawn in the kernel; or several from one read.

        out[b] = clamp(sum_k coefficients[b, k] column_k[source[b]] + constant[b] + noise_scale[b] z[b])

    A column is a tensor, or the difference of two formed in registers, as in `moments`: `columns=(0, (0, 1))` and
    coefficients (1, omega) turn (c, u) into `c + omega (c - u)`. Every guidance rule and every solver is a combine,
    with coefficients that are functions of moments and of times.

    Args:
        tensors: one to eight, `[B, ...]` of one shape; float32, bfloat16, float16 or float64, mixed as you like, with
            any strides.
        coefficients: `[B', K]`, one for each column, of any float dtype; or `[B', P, K]` for P outputs, up to eight. B'
            is the length of `source`, or B.
        columns: one to eight, each an index into `tensors` or a pair `(i, j)` for `tensors[i] - tensors[j]`; None
            takes every tensor as it is.
        constant: `[B']`, or `[B', P]` for P outputs; added to every element.
        noise_scale: the factor of standard normals z that are drawn inside the kernel: a float, `[B']`, or `[B', P]`
            for P outputs, which share one z. It needs `seed`. (Pass noise of your own as one of the tensors.)
        seed: an int64 number, 0-dim tensor or `[B']`; `philox_normal(out.shape, seed, stream=1)` is the same noise.
        first_sample: index of out[0] in the whole batch, where that is split over processes. Of no effect on `[B']`
            seeds.
        source: int64 `[B']`, the sample that each output reads: resampling and repeats at no cost.
        clamp: `(low, high)`, either of them None.
        moments: whether to compute the inner products and sums of the outputs over each sample too, in the same pass:
            of the outputs after the clamp, before they are rounded to their dtype.
        written: with `moments`, how many of the outputs are written, from the first; the others are in registers only.
            0 writes none, so the moments of a combination need no tensor of its size. None writes all.
        wide: with `moments`, whether arithmetic and moments are float64 for every dtype. The kernel reads the same
            bytes; consumer GPUs have a small fraction of their float32 throughput in float64.
        impl: "triton", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns `[B', ...]`, contiguous, in the dtype of the first tensor; for P outputs a tuple of P. With `moments`
    `Combined(outputs, dots [B', P, P], sums [B', P])`, float32 (float64 where a tensor is, or with `wide`). Arithmetic
    is float32 (float64 in the same cases), rounded once. An index in `source` outside the batch raises where it can be
    read without a device sync, and gives NaN elsewhere.

    Differentiable in the tensors, coefficients, constant and noise_scale, any number of times; also under vmap, jvp and
    func.grad, where the reference runs (with a seed, vmap is refused). Where the clamp holds a value, no gradient
    flows. The backward is `moments` and a `combine`. It draws the noise again, and sums the gradients of outputs that
    read the same sample in the order of the batch. `torch.ops.lgd.combine`, the raw operator, is not differentiable.
    Same inputs, same bits, on any thread count.

    Raises TypeError or ValueError, naming the argument, before anything is written.

    Source: ours; docs/rules.md has the algebra.

    >>> import torch, lgd_kernels as lgd
    >>> c, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 4.0]])
    >>> lgd.combine((c, u), torch.tensor([[1.0, 0.5]]), columns=(0, (0, 1)))
    tensor([[4., 4.]])
    >>> lgd.combine((c, u), torch.tensor([[1.0, 0.5]]), columns=(0, (0, 1)), moments=True, written=0)
    Combined(outputs=None, dots=tensor([[[32.]]]), sums=tensor([[8.]]))
    """
    checks.flag("combine", "moments", moments)
    checks.flag("combine", "wide", wide)
    if written is not None and not moments:
        raise ValueError(f"combine: `written` is {written} without moments, expected None, or moments=True")
    if wide and not moments:
        raise ValueError("combine: `wide` is True without moments, expected False, or moments=True")
    column_checks.several("combine", tensors)
    column_checks.columns("combine", columns, len(tensors))
    like, columns = tensors[0], flat(columns, len(tensors))
    batch = like.shape[0]
    if source is not None:
        column_checks.source("combine", source, like)
        batch = source.shape[0]
    column_checks.coefficients("combine", coefficients, batch, len(columns) // 2, like)
    many = coefficients.ndim == 3
    shape = coefficients.shape[:-1]
    if constant is not None:
        column_checks.per_output("combine", "constant", constant, shape, like)
    scale: Tensor | None = None
    if noise_scale is None and seed is not None:
        raise ValueError("combine: `seed` was given without `noise_scale`, expected both or neither; noise_scale=1.0")
    if noise_scale is not None:
        checks.not_vmapped("combine", "seed", "the noise as one of the tensors")
        if seed is None:
            raise ValueError("combine: `noise_scale` was given without `seed`, expected both; seed=... draws the noise")
        checks.seed("combine", seed, first_sample, batch, like)
        if isinstance(noise_scale, (int, float)) and not isinstance(noise_scale, bool):
            noise_scale = torch.ones_like(coefficients[..., 0], dtype=widest(coefficients.dtype)) * float(noise_scale)
        scale = column_checks.per_output("combine", "noise_scale", noise_scale, shape, like)
    elif type(first_sample) is not int or first_sample:
        checks.first_sample("combine", first_sample)
    low, high = column_checks.bounds("combine", clamp)
    if not many:
        coefficients = coefficients.unsqueeze(1)
        constant = None if constant is None else constant.unsqueeze(1)
        scale = None if scale is None else scale.unsqueeze(1)
    count = coefficients.shape[1]
    if moments:
        written = count if written is None else written
        if isinstance(written, bool) or not isinstance(written, int) or not 0 <= written <= count:
            raise ValueError(
                f"combine: `written` is {written!r}, expected how many of the {count} outputs, 0 to {count}"
            )
    read = Columns(list(tensors), columns, source, 0 if source is None else len(tensors))
    drawn = Seed.of(seed, first_sample)
    a = Combine(read, coefficients, constant, scale, drawn, low, high, like.dtype)
    if written is None:  # without moments
        found = op.combine(a, impl)
        return found.unbind(0) if many else found.squeeze(0)
    outputs, packed = op.combine_moments(CombineMoments(a, written, wide), impl)
    outputs = outputs.unbind(0) if many else outputs.squeeze(0) if written else None
    return Combined(outputs, *_unpacked(packed, count))


def _unpacked(packed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return dots `[B, P, P]` and sums `[B, P]` of the moments that `columns.triangle` lists."""
    if count == 1:
        return packed[:, :1].unsqueeze(1), packed[:, 1:]
    products = twos(triangle(count))[: count * (count + 1) // 2]
    dots = dict(zip(products, packed.unbind(1), strict=False))
    rows = [torch.stack([dots[min(i, j), max(i, j)] for j in range(count)], 1) for i in range(count)]
    return torch.stack(rows, 1), packed[:, -count:]
