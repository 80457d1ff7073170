"""The public function `moments` and what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

from torch import Tensor

from lgd_kernels.ops.moments import op, structs
from lgd_kernels.runtime import checks, column_checks
from lgd_kernels.runtime.columns import Column, Columns, every_product, flat
from lgd_kernels.runtime.impls import Impl


class Moments(NamedTuple):
    """Moments of K columns for each sample, from `moments`."""

    dots: Tensor  # [B, K, K], symmetric
    sums: Tensor  # [B, K]


class CentredMoments(NamedTuple):
    """Centred moments of K columns for each sample, from `moments(..., centred=True)`.

    `dots / count` are the covariances. `merge` combines the moments of two parts of the same samples.
    """

    dots: Tensor  # [B, K, K], symmetric
    means: Tensor  # [B, K]
    count: int  # type: ignore[assignment]  # elements of a sample; tuple.count is not needed

    def merge(self, other: CentredMoments) -> CentredMoments:
        """Compute the moments of samples that consist of both parts (Chan, Golub and LeVeque, 1983):

            dots = dots_1 + dots_2 + (n_1 n_2 / n) e e^T,   means = means_1 + (n_2 / n) e,   e = means_2 - means_1

        >>> import torch, lgd_kernels as lgd
        >>> left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0]])
        >>> parts = [lgd.moments((part,), centred=True) for part in (left, right)]
        >>> parts[0].merge(parts[1])
        CentredMoments(dots=tensor([[[14.]]], dtype=torch.float64), means=tensor([[3.]], dtype=torch.float64), count=3)
        """
        total = self.count + other.count
        share = other.count / max(total, 1)
        apart = other.means - self.means
        between = self.count * share * apart.unsqueeze(2) * apart.unsqueeze(1)
        return CentredMoments(self.dots + other.dots + between, self.means + share * apart, total)


@overload
def moments(
    tensors: Sequence[Tensor],
    *,
    columns: Sequence[Column] | None = ...,
    centred: Literal[False] = ...,
    impl: Impl | None = ...,
) -> Moments: ...
@overload
def moments(
    tensors: Sequence[Tensor],
    *,
    columns: Sequence[Column] | None = ...,
    centred: Literal[True],
    impl: Impl | None = ...,
) -> CentredMoments: ...
@overload
def moments(
    tensors: Sequence[Tensor],
    *,
    columns: Sequence[Column] | None = ...,
    centred: bool,
    impl: Impl | None = ...,
) -> Moments | CentredMoments: ...
def moments(
    tensors: Sequence[Tensor],
    *,
    columns: Sequence[Column] | None = None,
    centred: bool = False,
    impl: Impl | None = None,
) -> Moments | CentredMoments:
    """Compute inner products and sums over each sample, of tensors and of differences of tensors, in one read.

        dots[b, i, j] = sum over elements of column_i[b] column_j[b]        sums[b, i] = that of column_i[b]

    and, with centred=True, inner products of deviations from the mean of each column over the sample:

        dots[b, i, j] = sum over elements of (column_i[b] - means[b, i]) (column_j[b] - means[b, j])

    A column is a tensor, or a difference formed in registers before it is multiplied. `moments((c, u), columns=(0,
    (0, 1)))` are the moments of c and of c - u, with `||c - u||^2` right to 1e-6 however close u lies to c. Computed
    from the moments of c and u, `||c - u||^2` loses twice the digits that c and u have in common.

    Args:
        tensors: one to eight, `[B, ...]` of one shape; float32, bfloat16, float16 or float64, mixed as you like, with
            any strides.
        columns: one to eight, each an index into `tensors` or a pair of indices, `(i, j)` for `tensors[i] -
            tensors[j]`; None takes every tensor as it is.
        centred: whether to subtract the means first. A variance formed from plain sums, `dots - sums^2 / count`, loses
            as many digits as (mean / std)^2 has. Centred moments lose none, and are exactly 0 for a constant column.
        impl: "triton", "cpu" or "reference"; None chooses. See `available_impls` and `why_not`.

    Returns `Moments(dots [B, K, K], sums [B, K])`, float32 (float64 where a tensor is). Products are taken in that
    arithmetic and summed in two stages, on the CPU in float64 from block to block: same inputs, same bits, on any
    thread count. Empty samples have moments 0.

    centred=True returns `CentredMoments(dots [B, K, K], means [B, K], count)`, float64, also from one read. Deviations
    from a shift near the mean are formed in the arithmetic above; the sums of a block are then moved to one origin in
    float64. A sample with an infinite element gives NaN.

    Differentiable in the tensors, any number of times; also under vmap, jvp and func.grad, where the reference runs.
    The backward is a `combine`; with centred=True it is plain PyTorch. The raw operator, `torch.ops.lgd.moments`, is
    not differentiable.

    Raises TypeError or ValueError, naming the argument, for a wrong shape, dtype, device, column or impl.

    Source: ours; docs/rules.md says which guidance rules follow from it.

    >>> import torch, lgd_kernels as lgd
    >>> c, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 4.0]])
    >>> lgd.moments((c, u), columns=(0, (0, 1)))
    Moments(dots=tensor([[[25.,  6.],
             [ 6.,  4.]]]), sums=tensor([[7., 2.]]))
    >>> lgd.moments((c,), centred=True).means
    tensor([[3.5000]], dtype=torch.float64)
    """
    column_checks.several("moments", tensors)
    column_checks.columns("moments", columns, len(tensors))
    checks.flag("moments", "centred", centred)
    read = Columns(list(tensors), flat(columns, len(tensors)), None, 0)
    size = len(read.columns) // 2
    packed = op.moments(structs.Moments(read, every_product(size), centred), impl)
    dots, rest = packed[:, : size * size].unflatten(1, (size, size)), packed[:, size * size :]
    return CentredMoments(dots, rest, math.prod(tensors[0].shape[1:])) if centred else Moments(dots, rest)
