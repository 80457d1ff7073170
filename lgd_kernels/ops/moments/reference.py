"""The specification: plain PyTorch, differentiable any number of times.

Moments come packed, `[B, M]`: entry m belongs to `pairs[2m : 2m + 2]`, two columns whose product is summed, or one
column and -1: the column's own sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.runtime.columns import formed
from lgd_kernels.runtime.levels import arithmetic_dtype, per_sample, sum_samples


def moments(
    tensors: Sequence[Tensor],
    columns: list[int],
    pairs: list[int],
    source: Tensor | None = None,
    gathered: int = 0,
) -> Tensor:
    """`[B, M]` in float32 (float64 where a tensor is). With `source` the first `gathered` tensors are read at it."""
    if source is not None:
        tensors = [t[source] if n < gathered else t for n, t in enumerate(tensors)]
    found = formed(tensors, columns, arithmetic_dtype(*tensors))
    terms = (found[i] if j < 0 else found[i] * found[j] for i, j in zip(pairs[::2], pairs[1::2], strict=True))
    return torch.stack([sum_samples(term) for term in terms], 1)


def centred_moments(tensors: Sequence[Tensor], columns: list[int]) -> Tensor:
    """`[B, K K + K]`: products of the columns less their means, row by row, and the means; in float64."""
    apart, means = _deviations(tensors, columns)
    return torch.stack([*((one * other).sum(1) for one in apart for other in apart), *means], 1)


def centred_backward(upstream: Tensor, tensors: Sequence[Tensor], columns: list[int]) -> list[Tensor]:
    """Gradients to the tensors. With G that of the products, to column i: sum_j (G + G^T)_ij (column_j - mean_j), and
    the gradient of its mean, over the number of elements."""
    apart, _ = _deviations(tensors, columns)
    size, count = len(apart), max(1, apart[0].shape[1])
    products, to_means = upstream[:, : size * size].unflatten(1, (size, size)), upstream[:, size * size :]
    products = products + products.transpose(1, 2)
    grads = [torch.zeros_like(apart[0])] * len(tensors)
    for i, (plus, minus) in enumerate(zip(columns[::2], columns[1::2], strict=True)):
        to_column = sum((products[:, i, j, None] * one for j, one in enumerate(apart)), to_means[:, i, None] / count)
        grads[plus] = grads[plus] + to_column
        if minus >= 0:
            grads[minus] = grads[minus] - to_column
    return [grad.reshape(tensor.shape) for grad, tensor in zip(grads, tensors, strict=True)]


def _deviations(tensors: Sequence[Tensor], columns: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Each column less its mean, `[B, elements]`, and the means `[B]`. The first element is subtracted before the mean
    is taken, so that the deviations of a constant are exactly 0."""
    found = formed(tensors, columns, arithmetic_dtype(*tensors))
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
    """float64 if the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def moments_backward(upstream: Tensor, tensors: Sequence[Tensor], columns: list[int], pairs: list[int]) -> list[Tensor]:
    """Gradients to the tensors, in the arithmetic dtype: a combine of the columns, and a constant for the sums."""
    coefficients, constant = to_combine(upstream, len(tensors), columns, pairs)
    found = formed(tensors, columns, arithmetic_dtype(*tensors))
    grads = []
    for n in range(len(tensors)):
        terms = (per_sample(coefficients[:, n, k], found[k]) * column for k, column in enumerate(found))
        grads.append(sum(terms, per_sample(constant[:, n], found[0])).expand_as(found[0]))
    return grads


def to_combine(upstream: Tensor, count: int, columns: list[int], pairs: list[int]) -> tuple[Tensor, Tensor]:
    """`coefficients [B, count, K]` and `constant [B, count]` of the combine that is the backward:

        d_tensors[n] = sum_k coefficients[n, k] column_k + constant[n]

    A pair (i, j) gives its upstream times column j to column i, and times column i to column j: twice, where i = j.
    """
    size = len(columns) // 2
    zero = upstream.new_zeros(upstream.shape[0])
    found = [[zero] * (size + 1) for _ in range(count)]  # the constant comes last

    def add(column, k, value):
        plus, minus = columns[2 * column : 2 * column + 2]
        found[plus][k] = found[plus][k] + value
        if minus >= 0:
            found[minus][k] = found[minus][k] - value

    for value, i, j in zip(upstream.unbind(1), pairs[::2], pairs[1::2], strict=True):
        add(i, j if j >= 0 else size, value)
        if j >= 0:
            add(j, i, value)
    stacked = torch.stack([torch.stack(row, 1) for row in found], 1)
    return stacked[:, :, :size], stacked[:, :, size]
