"""What users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lgd_kernels import checks
from lgd_kernels.columns import Column, flat
from lgd_kernels.ops.moments import op


class Moments(NamedTuple):
    """Of K columns, for each sample: what `moments` returns."""

    dots: Tensor  # [B, K, K], symmetric
    sums: Tensor  # [B, K]


def moments(tensors: Sequence[Tensor], *, columns: Sequence[Column] | None = None, impl: str | None = None) -> Moments:
    """Inner products and sums over each sample, of several tensors and of differences of them, in one read.

        dots[b, i, j] = sum over elements of column_i[b] column_j[b]        sums[b, i] = that of column_i[b]

    A column is a tensor, or a difference formed in registers before it is multiplied: `moments((c, u), columns=(0,
    (0, 1)))` are the moments of c and of c - u, and `||c - u||^2` is right to 1e-6 however close u lies to c. Put
    together from the moments of c and u, it loses as many digits as the two have in common, twice.

    Args:
        tensors: one to eight, `[B, ...]` of one shape; float32, bfloat16, float16 or float64, mixed as you like, with
            any strides.
        columns: one to eight, each an index into `tensors` or a pair of indices, `(i, j)` for `tensors[i] -
            tensors[j]`; None takes every tensor as it is.
        impl: "triton", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns `Moments(dots [B, K, K], sums [B, K])`, float32 (float64 where a tensor is). Products are taken in that
    arithmetic and summed in two stages, on the CPU in float64 from block to block: same inputs, same bits, on any
    thread count. Empty samples have moments 0.

    Differentiable in the tensors, any number of times; also under vmap, jvp and func.grad, where the reference runs.
    The backward is a `combine`. `torch.ops.lgd.moments`, the raw operator, is not differentiable.

    Raises TypeError or ValueError, naming the argument, for a wrong shape, dtype, device, column or impl.

    Source: ours; docs/rules.md says which guidance rules follow from it.

    >>> import torch, lgd_kernels as lgd
    >>> c, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 4.0]])
    >>> lgd.moments((c, u), columns=(0, (0, 1)))
    Moments(dots=tensor([[[25.,  6.],
             [ 6.,  4.]]]), sums=tensor([[7., 2.]]))
    """
    checks.several("moments", tensors)
    checks.columns("moments", columns, len(tensors))
    columns = flat(columns, len(tensors))
    size = len(columns) // 2
    pairs = [index for i in range(size) for j in range(size) for index in (i, j)]
    for i in range(size):
        pairs += [i, -1]
    packed = op.moments(list(tensors), columns, pairs, impl)
    return Moments(packed[:, : size * size].unflatten(1, (size, size)), packed[:, size * size :])
