"""Compute the Frechet distance between features from their means and covariances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import checks
from lgd_kernels.runtime.checks import DATA_DTYPES, dense, tensor

ROWS = 8192  # samples whose covariance is added up at a time


class FeatureStatistics(NamedTuple):
    """Mean `[D]` and covariance `[D, D]` of features, float64; `feature_statistics` makes them."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def feature_statistics(x: Tensor) -> FeatureStatistics:
    """Compute mean and covariance (over n - 1) of features `[n, ...]` in float64, in blocks of rows.

    Raises ValueError where x holds NaN or infinity; on a GPU, where a check would take a device sync, the results are
    NaN.

    >>> import torch
    >>> feature_statistics(torch.tensor([[0.0], [2.0]]))
    FeatureStatistics(mean=tensor([1.], dtype=torch.float64), covariance=tensor([[2.]], dtype=torch.float64))
    """
    return _statistics("feature_statistics", "x", x)


def _statistics(op: str, name: str, x: Tensor) -> FeatureStatistics:
    """Check the features `name` of `op` and compute their statistics."""
    if not isinstance(x, Tensor) or x.ndim < 1 or len(x) < 2:
        came = f"has shape {list(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ValueError(f"{op}: `{name}` {came}, expected features [n, ...] of two samples or more")
    dense(op, name, x)
    if x.is_complex() or (x.is_floating_point() and x.dtype not in DATA_DTYPES):
        raise TypeError(f"{op}: `{name}` has dtype {x.dtype}, expected float32, bfloat16, float16, float64 or integers")
    checks.finite(op, waits=False, **{name: x})
    x = x.reshape(len(x), -1)
    mean = x.mean(0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for rows in x.split(ROWS):
        apart = rows.double() - mean
        covariance.addmm_(apart.t(), apart)
    return FeatureStatistics(mean, covariance / (len(x) - 1))


@torch.no_grad()
def frechet_distance(x: Tensor | FeatureStatistics, y: Tensor | FeatureStatistics) -> Tensor:
    """Return ||m_x - m_y||^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), m and C the means and covariances of features.

    With features of an Inception network this is the FID. x and y are features `[n, ...]`, two or more, or
    `FeatureStatistics(mean, covariance)`, which may be kept (of the data, say). 0-dim, float64; no gradient.

    With C = A^T A, A the root of the eigenvalues times the eigenvectors, tr (C_x C_y)^(1/2) is the sum of the singular
    values of A_x A_y^T: this takes no root of an asymmetric matrix and no complex numbers. Eigenvalues below D 2^-52 of
    the largest are taken as 0, so n < D adds no noise.

    Raises ValueError where features or statistics hold NaN or infinity.

    Source: Heusel et al., arXiv 1706.08500; Dowson and Landau (1982).

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0]])  # variance 2
    >>> round(frechet_distance(x, 2 * x + 3).item(), 6)  # (1 - 5)^2 + (sqrt(2) - sqrt(8))^2
    18.0
    """
    x, y = (
        one if isinstance(one, FeatureStatistics) else _statistics("frechet_distance", name, one)
        for name, one in (("x", x), ("y", y))
    )
    for name, one in (("x", x), ("y", y)):
        tensor("frechet_distance", f"{name}.mean", one.mean)
        tensor("frechet_distance", f"{name}.covariance", one.covariance)
        size = x.mean.numel()
        if one.mean.shape != (size,) or one.covariance.shape != (size, size):
            raise ValueError(
                f"frechet_distance: `{name}` has a mean {list(one.mean.shape)} and a covariance "
                f"{list(one.covariance.shape)}, expected [{size}] and [{size}, {size}] like the mean of `x`"
            )
        for part, values in one._asdict().items():
            if values.device.type == "meta" or values.device != x.mean.device:
                raise ValueError(
                    f"frechet_distance: the {part} of `{name}` is on {values.device}, expected the device of `x`, and "
                    "not meta, where tensors have no values; .to(...) moves it"
                )
            if not values.isfinite().all():
                raise ValueError(
                    f"frechet_distance: the {part} of `{name}` holds NaN or infinity, expected numbers; scale down "
                    "features whose squares overflow float64"
                )
    roots = [_root(one.covariance.double()) for one in (x, y)]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].t()).sum()
    apart = (x.mean.double() - y.mean.double()).square().sum()
    return (apart + x.covariance.double().trace() + y.covariance.double().trace() - 2 * overlap).clamp(min=0)


def _root(covariance: Tensor) -> Tensor:
    """Return A [rank, D] with A^T A = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1:].clamp(min=0) * len(values) * 2.0**-52
    return values[kept].sqrt()[:, None] * vectors[:, kept].t()
