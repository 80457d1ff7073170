"""Compare samples with held-out data class by class, and methods over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lgd_kernels.metrics import energy_distance

Spread = dict  # {"values", "mean", "std", "interval95"} of a figure over the seeds


def energy_per_class(x: Tensor, real: Iterable[Tensor]) -> Tensor:
    """Return the energy distance of each class [settings, C]; its mean over the classes is the primary figure.

        2 E||x - y|| - E||x - x'|| - E||y - y'||        unbiased: 0 on average for samples of one law

    Args:
        x: samples [settings, C, n, D].
        real: held-out data [k, D] of each class; k may differ.
    """
    found = [energy_distance(x[:, c], y.expand(len(x), -1, -1), batched=True) for c, y in enumerate(real)]
    return torch.stack(found, 1)


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and 95 % t-interval of the mean; of a single value the last two are None."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"values": values, "mean": mean, "std": None, "interval95": None}
    from scipy.stats import t

    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return {"values": values, "mean": mean, "std": std, "interval95": [mean - half, mean + half]}


def paired(one: Sequence[float], other: Sequence[float]) -> Spread:
    """Return the spread of one - other, paired by seed."""
    return spread([a - b for a, b in zip(one, other, strict=True)])
