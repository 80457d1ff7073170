"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.runtime.columns import formed, triangle
from lgd_kernels.runtime.levels import arithmetic_dtype, per_sample, sum_samples
from lgd_kernels.runtime.philox import STREAM_STEP, normal


def combine(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    columns: list[int],
    constant: Tensor | None,
    noise_scale: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    source: Tensor | None,
    low: float,
    high: float,
    dtype: torch.dtype,
) -> Tensor:
    """`[P, B', ...]`: output p is `sum_k coefficients[b, p, k] column_k[source[b]] + constant[b, p] +
    noise_scale[b, p] z[b]`, clamped, in float32 (float64 where a tensor is), rounded once to `dtype`."""
    return combined(tensors, coefficients, columns, constant, noise_scale, seed, first_sample, source, low, high).to(
        dtype
    )


def combine_moments(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    columns: list[int],
    constant: Tensor | None,
    noise_scale: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    source: Tensor | None,
    low: float,
    high: float,
    written: int,
    dtype: torch.dtype,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """The first `written` outputs, and the moments of all of them, `[B', M]`, one for each of `columns.triangle`.

    `wide`: all of it in float64, for every dtype of the tensors.
    """
    outputs = combined(
        tensors, coefficients, columns, constant, noise_scale, seed, first_sample, source, low, high, wide
    )
    pairs = triangle(len(outputs))
    terms = (outputs[i] if j < 0 else outputs[i] * outputs[j] for i, j in zip(pairs[::2], pairs[1::2], strict=True))
    return outputs[:written].to(dtype), torch.stack([sum_samples(term) for term in terms], 1)


def moments_backward(outputs: Tensor, to_found: Tensor) -> Tensor:
    """`[P, B', ...]`: the gradient to the outputs from that of their moments: a combine of them, and a constant."""
    grads = [torch.zeros_like(one) for one in outputs]
    pairs = triangle(len(outputs))
    for value, i, j in zip(to_found.to(outputs.dtype).unbind(1), pairs[::2], pairs[1::2], strict=True):
        value = per_sample(value, grads[i])
        grads[i] = grads[i] + (value if j < 0 else value * outputs[j])
        if j >= 0:
            grads[j] = grads[j] + value * outputs[i]
    return torch.stack(grads)


def combined(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    columns: list[int],
    constant: Tensor | None,
    noise_scale: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    source: Tensor | None,
    low: float,
    high: float,
    wide: bool = False,
) -> Tensor:
    """The outputs before they are rounded."""
    wide = torch.float64 if wide else arithmetic_dtype(*tensors)
    read = gathered(formed(tensors, columns, wide), source)
    z = None if noise_scale is None else drawn(read[0].shape, seed, first_sample, read[0])
    outputs = []
    for p in range(coefficients.shape[1]):
        terms = [per_sample(coefficients[:, p, k].to(wide), column) * column for k, column in enumerate(read)]
        if constant is not None:
            terms.append(per_sample(constant[:, p].to(wide), read[0]))
        if z is not None:
            terms.append(per_sample(noise_scale[:, p].to(wide), z) * z)
        outputs.append(sum(terms[1:], terms[0]).clamp(low, high))
    return torch.stack(outputs)


def combine_backward(
    upstream: Tensor,
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    columns: list[int],
    noise_scale: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    source: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
    """Gradients to the tensors, the coefficients, the constant and the scale of the noise, in the arithmetic dtype.

    `upstream [P, B', ...]` is 0 where a clamp held. To the tensors it is a combine again, transposed; to everything per
    sample it is a moment.
    """
    wide = arithmetic_dtype(*tensors)
    d = upstream.to(wide).unbind(0)
    to_column = to_tensors(coefficients.to(wide), len(tensors), columns)
    grads = []
    for n, tensor in enumerate(tensors):
        terms = [per_sample(to_column[:, n, p], one) * one for p, one in enumerate(d)]
        grads.append(scattered(sum(terms[1:], terms[0]), source, tensor.shape[0]))
    read = gathered(formed(tensors, columns, wide), source)
    d_coefficients = torch.stack([torch.stack([sum_samples(one * column) for column in read], 1) for one in d], 1)
    d_constant = torch.stack([sum_samples(one) for one in d], 1)
    d_scale = None
    if noise_scale is not None:
        z = drawn(d[0].shape, seed, first_sample, d[0])
        d_scale = torch.stack([sum_samples(one * z) for one in d], 1)
    return grads, d_coefficients, d_constant, d_scale


def to_tensors(coefficients: Tensor, count: int, columns: list[int]) -> Tensor:
    """`[B, count, P]`: what upstream p gives to each tensor, from `coefficients [B, P, K]`."""
    found = [torch.zeros_like(coefficients[:, :, 0])] * count
    for k, (plus, minus) in enumerate(zip(columns[::2], columns[1::2], strict=True)):
        found[plus] = found[plus] + coefficients[:, :, k]
        if minus >= 0:
            found[minus] = found[minus] - coefficients[:, :, k]
    return torch.stack(found, 1)


def gathered(tensors: list[Tensor], source: Tensor | None) -> list[Tensor]:
    """Sample source[b] of each tensor; NaN where there is no such sample."""
    if source is None:
        return tensors
    samples = tensors[0].shape[0]
    inside = per_sample((source >= 0) & (source < samples), tensors[0])
    index = torch.where((source >= 0) & (source < samples), source, 0)
    return [torch.where(inside, tensor[index], torch.nan) for tensor in tensors]


def scattered(grad: Tensor, source: Tensor | None, samples: int) -> Tensor:
    """The transpose of `gathered`: sums over the b of each source, in the order of b."""
    if source is None:
        return grad
    total = grad.new_zeros((samples, *grad.shape[1:]))
    index = torch.where((source >= 0) & (source < samples), source, 0)
    if total.device.type == "cpu":
        return total.index_add(0, index, grad)  # one after the other
    return total.index_put((index,), grad, accumulate=True)  # sorted first, so no float atomics


def drawn(shape: torch.Size, seed: int | Tensor, first_sample: int, like: Tensor) -> Tensor:
    """z, the noise that the kernels draw."""
    return normal(shape, seed, STREAM_STEP, first_sample, like.device).to(like.dtype)
