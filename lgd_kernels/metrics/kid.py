"""Compute the kernel inception distance of features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import checks
from lgd_kernels.ops.energy_mmd.api import energy_mmd
from lgd_kernels.ops.energy_mmd.kernels import Kernel, Polynomial
from lgd_kernels.runtime import progress as reports
from lgd_kernels.runtime.checks import MOST_REPEATS, count, generator


class KID(NamedTuple):
    """The result of `kernel_inception_distance`, float64: mean and standard deviation over subsets, as other libraries
    report them, and the standard error of the mean."""

    value: Tensor
    std: Tensor
    standard_error: Tensor


@torch.no_grad()
def kernel_inception_distance(
    x: Tensor,
    y: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    kernel: Kernel | None = None,
    progress: bool | reports.Report | None = None,
) -> KID:
    """Compute the KID: unbiased MMD^2 of the kernel (<x, y> / D + 1)^3, averaged over random subsets of features.

    Args:
        x, y: features `[n, D]` and `[k, D]`.
        subsets, subset_size: how many, up to 10^6, and of how many samples of x and of y, without replacement.
        seed: of the subsets, which are drawn on the CPU.
        kernel: `Polynomial()` by default.
        progress: True for a bar, or a function of (done, total), numbers of subsets.

    `standard_error` is std sqrt(1 / subsets + m / (min(n, k) - m)), m = subset_size. Subsets overlap, so std /
    sqrt(subsets) measures only how far the mean is from that over all subsets of these samples. The second term (ours)
    is how far that is from the truth: a variance v / m over fresh samples shows as std^2 = v / m (1 - m / n) over
    subsets of n, and is v / n for all of them. The standard error is too large where x and y have nearly one law, and
    infinite or NaN for m = min(n, k), where subsets do not vary.

    Raises ValueError where x or y holds NaN or infinity; on a GPU, where a check would take a device sync, the result
    is NaN.

    Source: Binkowski et al., arXiv 1801.01401.

    >>> import torch
    >>> x, y = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0))
    >>> found = kernel_inception_distance(x, y + 1, subsets=10, subset_size=100)
    >>> bool((found.value > 5 * found.standard_error) & (found.standard_error > found.std / 10**0.5))
    True
    """
    kernel = Polynomial() if kernel is None else kernel
    with checks.said_by("kernel_inception_distance"):
        checks.samples(x, y, False)
        checks.options(1.0, 1.0, True, kernel, True, None)
    checks.finite("kernel_inception_distance", x=x, y=y)
    count("kernel_inception_distance", "subsets", subsets, MOST_REPEATS)
    count("kernel_inception_distance", "subset_size", subset_size)
    fewest = min(len(x), len(y))
    if not 2 <= subset_size <= fewest:
        raise ValueError(
            f"kernel_inception_distance: `subset_size` is {subset_size}, expected 2 to {fewest}, the number of samples"
        )
    randomness, values = generator("kernel_inception_distance", seed), []
    report = reports.report("kernel_inception_distance", progress)
    for done in range(subsets):
        if report is not None:
            report(done, subsets)
        parts = [
            one[torch.randperm(len(one), generator=randomness, device="cpu")[:subset_size].to(one.device)]
            for one in (x, y)
        ]
        values.append(energy_mmd(*parts, kernel=kernel).double())
    if report is not None:
        report(subsets, subsets)
    found = torch.stack(values)
    std = found.std() if subsets > 1 else found[0] * math.nan
    rest = fewest - subset_size
    return KID(found.mean(), std, std * math.sqrt(1 / subsets + (subset_size / rest if rest else math.inf)))
