"""Compute the energy distance between samples, in the statisticians' normalisation."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.ops.energy_mmd import checks
from lgd_kernels.ops.energy_mmd.api import energy_mmd
from lgd_kernels.runtime import progress as reports
from lgd_kernels.runtime.impls import Impl


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 1.0,
    unbiased: bool = True,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    batched: bool = False,
    progress: bool | reports.Report | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Return twice `energy_mmd`, whose arguments these are: 2 E ||x - y||^beta - E ||x - x'||^beta - E ||y - y'||^beta.

    For D = 1, beta = 1 and unbiased=False this is `scipy.stats.energy_distance(x, y) ** 2`. The unbiased value is 0 on
    average for samples of one law, so it may be negative. Differentiable as `energy_mmd` is. NaN where a sample holds
    NaN or infinity.

    Source: Szekely and Rizzo, J. Stat. Plan. Inference 143 (2013).

    >>> import torch
    >>> energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [4.0]]))  # 2 (3 + 4 + 1 + 2) / 4 - 2 - 1
    tensor(2.)
    """
    with checks.said_by("energy_distance"):
        return 2 * energy_mmd(
            x,
            y,
            beta=beta,
            unbiased=unbiased,
            x_weights=x_weights,
            y_weights=y_weights,
            batched=batched,
            progress=progress,
            impl=impl,
        )
