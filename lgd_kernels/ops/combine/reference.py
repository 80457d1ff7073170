"""The specification: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lgd_kernels.ops.combine.structs import Combine, CombineMoments
from lgd_kernels.runtime.arguments import Seed
from lgd_kernels.runtime.columns import formed, triangle, twos
from lgd_kernels.runtime.levels import arithmetic_dtype, per_sample, sum_samples
from lgd_kernels.runtime.philox import STREAM_STEP, normal


def combine(a: Combine) -> Tensor:
    """Compute the outputs, `[P, B', ...]`, in float32 (float64 where a tensor is), rounded once to `a.dtype`:

    clamp(sum_k coefficients[b, p, k] column_k[source[b]] + constant[b, p] + noise_scale[b, p] z[b])
    """
    return combined(a).to(a.dtype)


def combine_moments(a: CombineMoments) -> tuple[Tensor, Tensor]:
    """Compute the written outputs, and the moments of all, `[B', M]`, one for each product of `columns.triangle`."""
    outputs = combined(a.combine, a.wide)
    products = twos(triangle(len(outputs)))
    terms = (outputs[i] if j < 0 else outputs[i] * outputs[j] for i, j in products)
    return outputs[: a.written].to(a.combine.dtype), torch.stack([sum_samples(term) for term in terms], 1)


def moments_backward(outputs: Tensor, to_found: Tensor) -> Tensor:
    """Compute the gradient to the outputs, `[P, B', ...]`, from that of their moments: a combine, with a constant."""
    grads = [torch.zeros_like(one) for one in outputs]
    products = twos(triangle(len(outputs)))
    for value, (i, j) in zip(to_found.to(outputs.dtype).unbind(1), products, strict=True):
        value = per_sample(value, grads[i])
        grads[i] = grads[i] + (value if j < 0 else value * outputs[j])
        if j >= 0:
            grads[j] = grads[j] + value * outputs[i]
    return torch.stack(grads)


def combined(a: Combine, wide: bool = False) -> Tensor:
    """Compute the outputs before they are rounded; with `wide` in float64 for every dtype of the tensors."""
    dtype = torch.float64 if wide else arithmetic_dtype(*a.read.tensors)
    read = gathered(formed(a.read.tensors, a.read.columns, dtype), a.read.source)
    z = None if a.noise_scale is None else drawn(a.seed, read[0])
    outputs = []
    for p in range(a.coefficients.shape[1]):
        terms = [per_sample(a.coefficients[:, p, k].to(dtype), column) * column for k, column in enumerate(read)]
        if a.constant is not None:
            terms.append(per_sample(a.constant[:, p].to(dtype), read[0]))
        if a.noise_scale is not None and z is not None:
            terms.append(per_sample(a.noise_scale[:, p].to(dtype), z) * z)
        outputs.append(sum(terms[1:], terms[0]).clamp(a.low, a.high))
    return torch.stack(outputs)


def combine_backward(upstream: Tensor, a: Combine) -> tuple[Tensor | None, ...]:
    """Compute the gradients to coefficients, constant, noise_scale and the tensors, in the arithmetic dtype.

    `upstream [P, B', ...]` is 0 where a clamp held. To the tensors it is a combine again, transposed; to everything per
    sample it is a moment.
    """
    tensors, columns, source, _ = a.read
    wide = arithmetic_dtype(*tensors)
    d = upstream.to(wide).unbind(0)
    to_column = to_tensors(a.coefficients.to(wide), len(tensors), columns)
    grads = []
    for n, tensor in enumerate(tensors):
        terms = [per_sample(to_column[:, n, p], one) * one for p, one in enumerate(d)]
        grads.append(scattered(sum(terms[1:], terms[0]), source, tensor.shape[0]))
    read = gathered(formed(tensors, columns, wide), source)
    d_coefficients = torch.stack([torch.stack([sum_samples(one * column) for column in read], 1) for one in d], 1)
    d_constant = torch.stack([sum_samples(one) for one in d], 1)
    d_scale = None
    if a.noise_scale is not None:
        z = drawn(a.seed, d[0])
        d_scale = torch.stack([sum_samples(one * z) for one in d], 1)
    return d_coefficients, d_constant, d_scale, *grads


def to_tensors(coefficients: Tensor, count: int, columns: list[int]) -> Tensor:
    """Compute the factor of upstream p in the gradient of each tensor, `[B, count, P]`."""
    found = [torch.zeros_like(coefficients[:, :, 0])] * count
    for k, (plus, minus) in enumerate(twos(columns)):
        found[plus] = found[plus] + coefficients[:, :, k]
        if minus >= 0:
            found[minus] = found[minus] - coefficients[:, :, k]
    return torch.stack(found, 1)


def gathered(tensors: list[Tensor], source: Tensor | None) -> list[Tensor]:
    """Return sample source[b] of each tensor; NaN where there is no such sample."""
    if source is None:
        return tensors
    samples = tensors[0].shape[0]
    inside = per_sample((source >= 0) & (source < samples), tensors[0])
    index = torch.where((source >= 0) & (source < samples), source, 0)
    return [torch.where(inside, tensor[index], torch.nan) for tensor in tensors]


def scattered(grad: Tensor, source: Tensor | None, samples: int) -> Tensor:
    """Sum the gradients of the outputs that read the same sample, in their order: the transpose of `gathered`."""
    if source is None:
        return grad
    total = grad.new_zeros((samples, *grad.shape[1:]))
    index = torch.where((source >= 0) & (source < samples), source, 0)
    if total.device.type == "cpu":
        return total.index_add(0, index, grad)  # one after the other
    return total.index_put((index,), grad, accumulate=True)  # sorted first, so no float atomics


def drawn(seed: Seed, like: Tensor) -> Tensor:
    """Draw z, the noise that the kernels draw."""
    given = cast("int | Tensor", seed.given())
    return normal(like.shape, given, STREAM_STEP, seed.first_sample, like.device).to(like.dtype)
