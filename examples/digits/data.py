"""Load handwritten digits, and replace some of their labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 10
NULL = CLASSES  # the index of the null condition
PIXELS = 64  # 8 x 8
TRAIN, VALIDATION = 1000, 400  # the rest, 397, is the test split


class Labelled(NamedTuple):
    """Hold images with their labels."""

    x: Tensor  # [N, 64] in [-1, 1]
    c: Tensor  # [N] int64

    def by_class(self) -> list[Tensor]:
        """Return the images of each class."""
        return [self.x[self.c == c] for c in range(CLASSES)]


class Digits(NamedTuple):
    """Hold the three splits, and the wrong labels of the first."""

    train: Labelled  # with its true labels
    captions: Tensor  # [N] int64: the labels that the denoiser is trained with
    validation: Labelled
    test: Labelled
    rates: Tensor  # [10] probability that a label of the class is replaced


def load_digits(noise: str, wrong: str, generator: torch.Generator) -> Digits:
    """Return scikit-learn's 1797 digits, shuffled by the generator into train, validation and test.

    Args:
        noise: "rising", where the labels of class c are replaced with probability 0.75 c / 9, or "uniform", 0.4
            for every class.
        wrong: how a label is replaced, see `replace_labels`.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    order = torch.randperm(len(digits.data), generator=generator)
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 8 - 1  # the pixels count from 0 to 16
    c = torch.tensor(digits.target)[order]
    rates = torch.linspace(0, 0.75, CLASSES) if noise == "rising" else torch.full((CLASSES,), 0.4)
    captions = replace_labels(c[:TRAIN], rates, wrong, generator)
    cuts = (TRAIN, TRAIN + VALIDATION)
    train, validation, test = map(Labelled, x.tensor_split(cuts), c.tensor_split(cuts))
    return Digits(train, captions, validation, test, rates)


def replace_labels(c: Tensor, rates: Tensor, wrong: str, generator: torch.Generator) -> Tensor:
    """Replace each label with the probability of its class.

    "swapped": the chosen images exchange their labels at random. Every caption stays as frequent as it was, and the
    caption of a class is wrong as often as its images have a wrong caption: caption 0 stays clean.
    "any": one of the ten classes, uniformly. Wrong labels then fall on every caption, those of clean classes too.
    """
    chosen = (torch.rand(len(c), generator=generator) < rates[c]).nonzero().squeeze(1)
    labels = c.clone()
    if wrong == "swapped":
        labels[chosen] = c[chosen[torch.randperm(len(chosen), generator=generator)]]
    else:
        labels[chosen] = torch.randint(0, CLASSES, (len(chosen),), generator=generator)
    return labels
