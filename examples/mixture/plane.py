"""Define data in the plane that are known in closed form: three classes of Gaussians, and their exact denoiser."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 3
NULL = CLASSES  # the index of the null condition


class Mixture(NamedTuple):
    """Hold round Gaussians in the plane, and the share of each in a condition. The last condition is the null.

    A Gaussian with noise is a Gaussian, so everything about `x_t = signal x0 + noise z` is a formula.

    >>> import torch
    >>> one = Mixture(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), torch.ones(1, 1))
    >>> half, c = torch.full((1,), 0.5), torch.zeros(1, dtype=torch.int64)
    >>> one.denoise(torch.tensor([[1.0, 0.0]]), half, half, c)  # 1 + 0.5 0.25 / (0.25 0.25 + 0.25) (1 - 0.5)
    tensor([[1.2000, 0.0000]])
    """

    means: Tensor  # [J, 2]
    deviations: Tensor  # [J]
    weights: Tensor  # [C + 1, J], rows sum to 1

    def denoise(self, x: Tensor, signal: Tensor, noise: Tensor, c: Tensor) -> Tensor:
        """Return E[x0 | x_t = x, c] [N, 2] for x [N, 2] at levels signal, noise [N] with conditions c [N].

        Component j has the variance v_j = signal^2 d_j^2 + noise^2 at x_t and the mean
        `m_j + signal d_j^2 / v_j (x - signal m_j)` of x0; the sum weights components by their posterior.
        """
        belongs = self._terms(x, signal, noise, c).softmax(1)  # [N, J]
        gain = signal[:, None] * self.deviations.square() / self._variance(signal, noise)  # [N, J]
        return (belongs * (1 - signal[:, None] * gain)) @ self.means + (belongs * gain).sum(1, keepdim=True) * x

    def log_density(self, x: Tensor, signal: Tensor, noise: Tensor, c: Tensor) -> Tensor:
        """Return log p(x_t = x | c) [N]."""
        return self._terms(x, signal, noise, c).logsumexp(1) - math.log(2 * math.pi)

    def sample(self, c: Tensor, generator: torch.Generator) -> Tensor:
        """Draw clean data [N, 2] of the conditions c [N]."""
        j = torch.multinomial(self.weights[c], 1, generator=generator)[:, 0]
        z = torch.randn(len(c), 2, generator=generator, dtype=self.means.dtype)
        return self.means[j] + self.deviations[j, None] * z

    def per_class(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` points of each class, [C, count, 2]."""
        classes = len(self.weights) - 1
        return self.sample(torch.arange(classes).repeat_interleave(count), generator).view(classes, count, 2)

    def mislabelled(self, share: float, falls: Tensor) -> Mixture:
        """Return the data after a share of the labels was replaced, by label k with probability falls[k].

        Data with the label k are then a mixture of class k and of all classes: the components' weights change, and the
        denoiser is still a formula. Classes are equally frequent.
        """
        clean, null = self.weights[:-1], self.weights[-1:]
        wrong = mislabelled_shares(share, falls)[:, None].to(clean)  # [C, 1]
        return self._replace(weights=torch.cat(((1 - wrong) * clean + wrong * null, null)))

    def _variance(self, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal[:, None] * self.deviations).square() + noise[:, None].square()  # [N, J]

    def _terms(self, x: Tensor, signal: Tensor, noise: Tensor, c: Tensor) -> Tensor:
        """Return the log of the components' weighted densities at x, without log 2 pi, [N, J]."""
        variance = self._variance(signal, noise)
        middle = signal[:, None, None] * self.means  # [N, J, 2]
        distance = (x[:, None, 0] - middle[..., 0]).square() + (x[:, None, 1] - middle[..., 1]).square()
        return self.weights.log()[c] - variance.log() - distance / (2 * variance)


def pinwheel(dtype: torch.dtype = torch.float32) -> Mixture:
    """Return three classes that a turn by 120 degrees maps to each other.

    Each has a large component far out, and a smaller one nearer the middle that overlaps the next class.
    """
    turn = 2 * math.pi / CLASSES * torch.arange(CLASSES, dtype=torch.float64)[:, None]  # [C, 1]
    angle = turn + torch.tensor([0.0, 0.9], dtype=torch.float64)  # [C, 2]
    radius = torch.tensor([1.4, 0.8], dtype=torch.float64)
    means = torch.stack((radius * angle.cos(), radius * angle.sin()), 2).flatten(0, 1)
    deviations = torch.tensor([0.3, 0.2], dtype=torch.float64).repeat(CLASSES)
    clean = torch.kron(torch.eye(CLASSES, dtype=torch.float64), torch.tensor([[0.65, 0.35]], dtype=torch.float64))
    return Mixture(*(part.to(dtype) for part in (means, deviations, torch.cat((clean, clean.mean(0, keepdim=True))))))


def mislabelled_shares(share: float, falls: Tensor) -> Tensor:
    """Return the share [C] of the data with label k that have it by chance. See `Mixture.mislabelled`.

    >>> mislabelled_shares(0.4, torch.tensor([0.0, 1 / 3, 2 / 3]))
    tensor([0.0000, 0.4000, 0.5714])
    """
    return share * falls / ((1 - share) / len(falls) + share * falls)


def undoing(share: float, falls: Tensor) -> Tensor:
    """Return the omega [C] that undoes such labels at pure noise, where x_t carries no information.

    With r the share by chance, the prediction there is `(1 - r) clean + r uncond`, and omega = `r / (1 - r)` gives
    clean. Elsewhere r depends on x_t, and no omega of c, s and t is right for all x_t.

    >>> undoing(0.4, torch.tensor([0.0, 1 / 3, 2 / 3]))
    tensor([0.0000, 0.6667, 1.3333])
    """
    chance = mislabelled_shares(share, falls)
    return chance / (1 - chance)
