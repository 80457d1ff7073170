"""The specification: plain PyTorch, differentiable any number of times.

Moments are packed, `[B, M]`: entry m is the sum over a sample of the product `products[2m : 2m + 2]` of two columns, or
of one column if the second index is -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.moments.structs import Moments
from lgd_kernels.runtime.columns import Columns, formed, twos
from lgd_kernels.runtime.levels import arithmetic_dtype, per_sample, sum_samples


def moments(a: Moments) -> Tensor:
    """Compute the moments, `[B, M]`, in float32 (float64 where a tensor is); centred ones always in float64."""
    if a.centred:
        apart, means = _deviations(a.read)
        return torch.stack([*((one * other).sum(1) for one in apart for other in apart), *means], 1)
    tensors, columns, source, gathered = a.read
    if source is not None:
        tensors = [t[source] if n < gathered else t for n, t in enumerate(tensors)]
    found = formed(tensors, columns, arithmetic_dtype(*tensors))
    terms = (found[i] if j < 0 else found[i] * found[j] for i, j in twos(a.products))
    return torch.stack([sum_samples(term) for term in terms], 1)


def centred_backward(upstream: Tensor, a: Moments) -> list[Tensor]:
    """Compute the gradients to the tensors.

    With G the gradient of the products, that to column i is `sum_j (G + G^T)_ij (column_j - mean_j)`, plus the gradient
    of its mean over the number of elements."""
    apart, _ = _deviations(a.read)
    size, count = len(apart), max(1, apart[0].shape[1])
    products, to_means = upstream[:, : size * size].unflatten(1, (size, size)), upstream[:, size * size :]
    products = products + products.transpose(1, 2)
    grads = [torch.zeros_like(apart[0])] * len(a.read.tensors)
    for i, (plus, minus) in enumerate(twos(a.read.columns)):
        terms = (products[:, i, j, None] * one for j, one in enumerate(apart))
        to_column = sum(terms, to_means[:, i, None] / count)
        grads[plus] = grads[plus] + to_column
        if minus >= 0:
            grads[minus] = grads[minus] - to_column
    return [grad.reshape(tensor.shape) for grad, tensor in zip(grads, a.read.tensors, strict=True)]


def _deviations(read: Columns) -> tuple[list[Tensor], list[Tensor]]:
    """Compute each column less its mean, `[B, elements]`, and the means `[B]`.

    The first element is subtracted before the mean is taken, so that the deviations of a constant are exactly 0."""
    found = formed(read.tensors, read.columns, arithmetic_dtype(*read.tensors))
    found = [
        column.reshape(len(column), -1) if column.numel() else column.new_zeros(len(column), 0) for column in found
    ]
    found = [column.to(centred_dtype(column)) for column in found]
    if not found[0].shape[1]:
        return found, [column.sum(1) for column in found]
    origins = [column[:, :1].detach() for column in found]
    beyond = [(column - origin).mean(1, keepdim=True) for column, origin in zip(found, origins, strict=True)]
    apart = [column - origin - mean for column, origin, mean in zip(found, origins, beyond, strict=True)]
    return apart, [(origin + mean).squeeze(1) for origin, mean in zip(origins, beyond, strict=True)]


def centred_dtype(like: Tensor) -> torch.dtype:
    """Return float64 if the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def moments_backward(upstream: Tensor, a: Moments) -> list[Tensor]:
    """Compute the gradients to the tensors in the arithmetic dtype: a combine of the columns, with a constant."""
    coefficients, constant = to_combine(upstream, a)
    found = formed(a.read.tensors, a.read.columns, arithmetic_dtype(*a.read.tensors))
    grads = []
    for n in range(len(a.read.tensors)):
        terms = (per_sample(coefficients[:, n, k], found[k]) * column for k, column in enumerate(found))
        grads.append(sum(terms, per_sample(constant[:, n], found[0])).expand_as(found[0]))
    return grads


def to_combine(upstream: Tensor, a: Moments) -> tuple[Tensor, Tensor]:
    """Compute `coefficients [B, N, K]` and `constant [B, N]` of the combine that is the backward for N tensors:

        d_tensors[n] = sum_k coefficients[n, k] column_k + constant[n]

    A product (i, j) adds its upstream times column j to column i, and times column i to column j: twice, where i = j.
    """
    columns = twos(a.read.columns)
    size = len(columns)
    zero = upstream.new_zeros(upstream.shape[0])
    found = [[zero] * (size + 1) for _ in a.read.tensors]  # the constant comes last

    def add(column: int, k: int, value: Tensor) -> None:
        plus, minus = columns[column]
        found[plus][k] = found[plus][k] + value
        if minus >= 0:
            found[minus][k] = found[minus][k] - value

    for value, (i, j) in zip(upstream.unbind(1), twos(a.products), strict=True):
        add(i, j if j >= 0 else size, value)
        if j >= 0:
            add(j, i, value)
    stacked = torch.stack([torch.stack(row, 1) for row in found], 1)
    return stacked[:, :, :size], stacked[:, :, size]
