"""Sums from one pass over the data: enough for the loss at any omega, and for every derivative.

With `x_s^j(omega + d) = x_s^j + d G_j` a squared distance is a quadratic in d, whose coefficients are these:

    ||x_s^j - y_k||^2   = P0_jk + 2 d P1_jk + d^2 P2_j        ||x_s^j - x_s^l||^2 = Q0_jl + 2 d Q1_jl + d^2 Q2_jl
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Float64, around the omega they were taken at; pairs j < l are in the order of torch.triu_indices."""

    P0: Tensor  # [B, m, k]  ||x_s^j - y_k||^2
    P1: Tensor  # [B, m, k]  <x_s^j - y_k, G_j>
    P2: Tensor  # [B, m]     ||G_j||^2
    Q0: Tensor  # [B, pairs] ||x_s^j - x_s^l||^2
    Q1: Tensor  # [B, pairs] <x_s^j - x_s^l, G_j - G_l>
    Q2: Tensor  # [B, pairs] ||G_j - G_l||^2

    @staticmethod
    def numbers(m: int, k: int) -> int:
        """Return how many numbers an item has."""
        return 2 * m * k + m + 3 * (m * (m - 1) // 2)

    @staticmethod
    def unpack(flat: Tensor, m: int, k: int) -> Statistics:
        """Make views of `[B, count]`, as the kernels write it: one field after the other."""
        pairs = m * (m - 1) // 2
        parts = flat.split((m * k, m * k, m, pairs, pairs, pairs), 1)
        return Statistics(parts[0].unflatten(1, (m, k)), parts[1].unflatten(1, (m, k)), *parts[2:])

    def pack(self) -> Tensor:
        return torch.cat([part.flatten(1) for part in self], 1)


def energy(at: Statistics, shift: Tensor, beta: float, lam: float, unbiased: bool, order: int = 0) -> Tensor:
    """Compute the loss `[B, K]` at omega + shift, shift `[B, K]`, or its first or second derivative: float64,
    differentiable in the shift. A pair that coincides has loss and slope 0."""
    attraction = _mean(at.P0.flatten(1), at.P1.flatten(1), _each(at.P2, at.P0.shape[2]), shift, beta, order)
    if lam == 0 or not at.Q0.shape[1]:
        return attraction
    m = at.P2.shape[1]
    share = 1.0 if unbiased else (m - 1) / m
    return attraction - lam / 2 * share * _mean(at.Q0, at.Q1, at.Q2, shift, beta, order)


def pair_weights(at: Statistics, upstream: Tensor, beta: float, lam: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Compute 2 d loss / d P0 `[B, m, k]` and 2 d loss / d Q0 `[B, pairs]`, times upstream: the pull on x_s^j along
    x_s^j - y_k and along x_s^j - x_s^l. Float64; 0 for a pair that coincides."""
    m = at.P2.shape[1]
    share = -lam / 2 * (1.0 if unbiased else (m - 1) / m)
    found = []
    for square, factor in ((at.P0, 1.0), (at.Q0, share)):
        power = torch.where(square > 0, square, torch.inf).pow(beta / 2 - 1) if beta < 2 else torch.ones_like(square)
        count = max(square[:1].numel(), 1)
        scale = upstream.double().view(-1, *(1,) * (square.ndim - 1)) * (factor * beta / count)
        found.append(torch.where(square == square, power * scale, square))
    return found[0], found[1]


def _each(per_particle: Tensor, k: int) -> Tensor:
    """Repeat [B, m] for each target: [B, m k]."""
    return per_particle[:, :, None].expand(-1, -1, k).flatten(1)


def _mean(a: Tensor, b: Tensor, c: Tensor, shift: Tensor, beta: float, order: int) -> Tensor:
    """Compute the mean over pairs of a power of a + 2 d b + d^2 c, or of a derivative in d. A power is exp(p log .):
    torch.pow takes more than twice as long."""
    d = shift[:, :, None]
    a, b, c = a[:, None], b[:, None], c[:, None]
    if order == 0 and beta < 2 and not shift.requires_grad:
        square = torch.addcmul(2 * b, c, d).mul_(d).add_(a).clamp_(min=0)  # [B, K, pairs]
        return square.log_().mul_(beta / 2).exp_().mean(-1)
    square, half = a + d * (2 * b + d * c), b + d * c  # the square, and half its slope
    if beta == 2:  # every derivative exists, also where points coincide
        return (square, 2 * half, 2 * c + 0 * half)[order].mean(-1)
    square = torch.clamp(square, min=0)
    apart = square > 0
    log = torch.where(apart, square, 1.0).log()
    if order == 0:
        terms = torch.exp(beta / 2 * log)
    else:
        terms = beta * torch.exp((beta / 2 - 1) * log)
        if order == 1:
            terms = terms * half
        else:
            terms = terms * (c + (beta - 2) * half * half * torch.exp(-log))
    missing = torch.where(square == square, torch.zeros_like(terms), square)  # NaN stays NaN
    return torch.where(apart, terms, missing).mean(-1)
