"""How far samples are from held-out data, and how to compare methods over seeds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from examples.data import CLASSES, Labelled


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """`2 E||x - y|| - E||x - x'|| - E||y - y'||` (L2 norm, beta = 1) between x [..., n, D] and y [k, D].

    The standard convention, unbiased: a set's own distances are averaged over pairs of different points, so two sets
    of one law give 0 on average, and the figure can be slightly negative.
    """
    n, k = x.shape[-2], y.shape[-2]
    within_x = _distances(x, x).sum((-2, -1)) / (n * (n - 1))
    within_y = _distances(y, y).sum() / (k * (k - 1))
    return 2 * _distances(x, y.expand(*x.shape[:-2], k, -1)).mean((-2, -1)) - within_x - within_y


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # the matrix-product form would leave a point at a distance from itself
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def energy_per_class(x: Tensor, real: Labelled) -> Tensor:
    """Energy distance of each class: x [settings, 10, n, D] -> [settings, 10]. Its mean is the primary figure."""
    return torch.stack([energy_distance(x[:, c].contiguous(), real.of_class(c)) for c in range(CLASSES)], 1)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to the pixels of x [n, D] and y [k, D]."""
    x, y = x.double(), y.double()
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()  # tr (cov_x cov_y)^(1/2)
    return float((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root)


def fit_classifier(train: Labelled):
    """A support vector machine with clean labels: it judges whether a sample shows the digit asked for."""
    from sklearn.svm import SVC

    return SVC(C=10.0).fit(train.x.numpy(), train.c.numpy())


def accuracy(classifier, x: Tensor, c: Tensor) -> float:
    return float((torch.from_numpy(classifier.predict(x.numpy())) == c).double().mean())


def measure(x: Tensor, real: Labelled, classifier) -> dict:
    """All figures for the samples x [10, n, D] of one method."""
    per_class = energy_per_class(x[None], real)[0]
    pooled = x.flatten(0, 1)
    c = torch.arange(CLASSES).repeat_interleave(x.shape[1])
    return {
        "energy": float(per_class.mean()),
        "energy_per_class": per_class.tolist(),
        "energy_overall": float(energy_distance(pooled, real.x)),
        "frechet": frechet_distance(pooled, real.x),
        "accuracy": accuracy(classifier, pooled, c),
    }


def spread(values: list[float]) -> dict:
    """Mean, standard deviation and 95 % t-interval of the mean; the last two are None for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"values": values, "mean": mean, "std": None, "interval95": None}
    from scipy.stats import t

    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return {"values": values, "mean": mean, "std": std, "interval95": [mean - half, mean + half]}
