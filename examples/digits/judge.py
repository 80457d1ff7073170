"""Measure samples of digits: distances from held-out images, and whether they show the digit asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.digits.data import CLASSES, Labelled
from examples.shared.measures import energy_per_class
from lgd_kernels.metrics import energy_distance, frechet_distance

Classifier = Any  # a scikit-learn classifier


def fit_classifier(train: Labelled) -> Classifier:
    """Fit a support vector machine to clean labels, to judge whether a sample shows the digit asked for."""
    from sklearn.svm import SVC

    return SVC(C=10.0).fit(train.x.numpy(), train.c.numpy())


def accuracy(classifier: Classifier, x: Tensor, c: Tensor) -> float:
    """Return the share of x that the classifier gives the label c."""
    return float((torch.from_numpy(classifier.predict(x.numpy())) == c).double().mean())


def measure(x: Tensor, real: Labelled, classifier: Classifier) -> dict[str, Any]:
    """Return all figures of one method for its samples x [10, n, D]."""
    per_class = energy_per_class(x[None], real.by_class())[0]
    pooled = x.flatten(0, 1)
    c = torch.arange(CLASSES).repeat_interleave(x.shape[1])
    return {
        "energy": float(per_class.mean()),
        "energy_per_class": per_class.tolist(),
        "energy_overall": float(energy_distance(pooled, real.x)),
        "frechet": float(frechet_distance(pooled, real.x)),
        "accuracy": accuracy(classifier, pooled, c),
    }
