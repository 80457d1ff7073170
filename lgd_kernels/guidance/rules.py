"""Guidance rules: from the moments of two predictions to the coefficients of the guided one.

    g = cond * c + delta * D + x * x_t          D = c - u, coefficients `[B]`

A rule is a pure function `rule(m, omega, **parameters) -> Guidance(cond, delta[, x])`. `guided_score(..., rule=rule)`
and `guided_step(..., rule=rule)` run it; `functools.partial(rule, eta=0.5)` sets parameters, each a number or `[B]`.
The moments `m` (see `PairMoments`) are computed when a rule first reads one: a rule that reads none costs one pass.

omega = 0 is the conditional prediction alone. Others write `u + w (c - u)`: w = 1 + omega. All moments are per sample,
over all of its elements, in the space that `rule_space` names: a rule in x0 space and the same rule on eps or velocity
differ by tens of percent. Adding a rule takes no kernel: docs/rules.md has an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.guidance.program import PLAIN_MOMENTS
from lgd_kernels.runtime.levels import Levels

_TINY = 1e-300  # keeps 0 / 0 at 0, where c is 0 everywhere
PerSample = float | Tensor  # a number, or one for each sample, [B]


class Guidance(NamedTuple):
    """Coefficients that a rule returns: `g = cond * c + delta * (c - u) + x * x_t`, each a number or `[B]`."""

    cond: PerSample
    delta: PerSample
    x: PerSample = 0.0


def _moment(place: int) -> property:
    return property(lambda moments: moments._at(place))


class PairMoments:
    """Moments of c, u and D = c - u over a sample, `[B]` each.

    Inner products `cc, cu, uu, cd, ud, dd`, sums `c, u, d`, and `count`, the elements of a sample; `centred` has the
    inner products of c, u and D less their means.

    The data are read when a rule first uses a moment: `read(centred)` returns dots `[B, 3, 3]` and sums, or centred
    dots and means, from which the plain ones follow."""

    def __init__(self, read: Callable[[bool], tuple[Tensor, Tensor]], count: int) -> None:
        self._read, self.count = read, count
        self._found: tuple[Tensor, ...] = ()

    def _at(self, place: int) -> Tensor:
        """Return one of nine dots, row by row, three sums, and nine centred dots."""
        if place >= len(self._found):
            dots, rest = self._read(place >= PLAIN_MOMENTS)
            centred: tuple[Tensor, ...] = ()
            if place >= PLAIN_MOMENTS:
                centred = dots.flatten(1).unbind(1)
                dots, rest = dots + self.count * rest.unsqueeze(2) * rest.unsqueeze(1), self.count * rest
            self._found = *dots.flatten(1).unbind(1), *rest.unbind(1), *centred  # all at once: one view costs as much
        return self._found[place]

    cc, cu, uu, cd, ud, dd = _moment(0), _moment(1), _moment(4), _moment(2), _moment(5), _moment(8)
    c, u, d = _moment(9), _moment(10), _moment(11)

    @property
    def centred(self) -> Centred:
        return Centred(self)


class Centred:
    """Inner products of c, u and D less their means over the sample: `cc / count` is the variance of c.

    They are exactly 0 where a factor is constant."""

    def __init__(self, m: PairMoments) -> None:
        self._m = m

    def _at(self, place: int) -> Tensor:
        return self._m._at(PLAIN_MOMENTS + place)

    cc, cu, uu, cd, ud, dd = _moment(0), _moment(1), _moment(4), _moment(2), _moment(5), _moment(8)


Rule = Callable[[PairMoments, Tensor], Guidance]


def cfg(m: PairMoments, omega: Tensor) -> Guidance:
    """Compute `c + omega D`. Ho and Salimans, arXiv 2207.12598; their w is omega, diffusers' guidance_scale 1 + omega.

    A negative prompt or a weaker model (autoguidance, arXiv 2406.02507) is this rule with its prediction as u.
    """
    return Guidance(1.0, omega)


def interval(m: PairMoments, omega: Tensor, *, t: PerSample, low: PerSample, high: PerSample) -> Guidance:
    """Compute `c + omega D` for low < t <= high, else c. Kynkäänniemi et al., arXiv 2404.07724; their w is 1 + omega.

    Where no sample of a batch is inside, the network for u need not run: pass c twice.
    """
    inside = (t > low) & (t <= high)
    inside = inside.to(omega.device) if isinstance(inside, Tensor) else torch.full((), inside, device=omega.device)
    return Guidance(1.0, torch.where(inside, omega, torch.zeros_like(omega)))


def rescale(m: PairMoments, omega: Tensor, *, phi: PerSample, rule: Rule = cfg) -> Guidance:
    """Compute `g (phi std(c) / std(g) + 1 - phi)`, g by another rule. Lin et al., arXiv 2305.08891, section 3.4.

    std is over all elements of a sample; std(g) follows from the same moments. A constant g is returned unchanged.
    diffusers calls phi guidance_rescale.
    """
    centred = m.centred
    cc, cd, dd = centred.cc, centred.cd, centred.dd  # before `rule` uses plain moments, which follow from them
    cond, delta, x = rule(m, omega)
    gg = (cond * cond * cc + 2 * cond * delta * cd + delta * delta * dd).clamp(min=0)
    constant, kept = gg == 0, cc == 0
    ratio = (torch.where(constant | kept, 1.0, cc) / torch.where(constant, 1.0, gg)).sqrt()
    ratio = torch.where(constant, 1.0, torch.where(kept, 0.0, ratio))
    factor = phi * ratio + (1 - phi)
    return Guidance(factor * cond, factor * delta, x)


def apg(m: PairMoments, omega: Tensor, *, eta: PerSample = 0.0, radius: PerSample = math.inf) -> Guidance:
    """Compute `c + omega rho (D - (1 - eta) (<D, c> / ||c||^2) c)`, rho = min(1, radius / ||D||). Sadat, 2410.02416.

    eta scales the part of D along c, radius bounds the length of D (r in the paper); `Momentum` adds momentum. The
    paper works in x0 space. diffusers: use_original_formulation=True with guidance_scale = omega; False adds to u.
    """
    rho: PerSample = 1.0
    if isinstance(radius, Tensor) or radius < math.inf:
        bounded = m.dd > radius * radius
        rho = torch.where(bounded, radius / torch.sqrt(torch.where(bounded, m.dd, 1.0)), 1.0)
    delta = omega * rho
    return Guidance(1 - delta * (1 - eta) * m.cd / m.cc.clamp(min=_TINY), delta)


def cfg_zero_star(m: PairMoments, omega: Tensor, *, zero: bool | Tensor = False, floor: float = 1e-8) -> Guidance:
    """Compute `q u + (1 + omega)(c - q u)`, q = <c, u> / (||u||^2 + floor); 0 where `zero`. Fan et al., 2503.18886.

    `zero=True` is for the first steps (in the paper and in diffusers: step 0), whose prediction is not to be trusted:
    in velocity space g = 0 stays at x. diffusers' guidance_scale is 1 + omega.
    """
    q = m.cu / (m.uu + floor)
    keep = 1.0 - (zero.to(q.device, q.dtype) if isinstance(zero, Tensor) else float(zero))
    return Guidance(keep * (1 + omega * (1 - q)), keep * omega * q)


def tcfg(m: PairMoments, omega: Tensor) -> Guidance:
    """Compute `u' + (1 + omega)(c - u')`, u' = u projected on the first right-singular vector of [u; c].

    Kwon et al., arXiv 2503.18137. The vector is `e_u u + e_c c`, scaled, with (e_u, e_c) the leading eigenvector of the
    2 x 2 matrix of inner products, so u' = e_u^2 u + e_u e_c c. diffusers' guidance_scale is 1 + omega.
    """
    apart = -(m.cd + m.ud)  # ||u||^2 - ||c||^2, without its cancellation
    square = apart * apart + 4 * m.cu * m.cu
    safe = torch.where(square > 0, square, 1.0).sqrt()
    to_u, to_c = (1 + apart / safe) / 2, m.cu / safe
    return Guidance(1 + omega * (1 - to_u - to_c), omega * to_u)


def mambo_g(m: PairMoments, omega: Tensor, *, alpha: PerSample = 8.0) -> Guidance:
    """Compute `c + omega exp(-alpha ||D|| / ||u||) D`: less guidance where the predictions differ more.

    arXiv 2508.03442, diffusers' MagnitudeAwareGuidance, whose guidance_scale is 1 + omega."""
    ratio = torch.sqrt(torch.where(m.dd > 0, m.dd, 1.0) / m.uu)
    return Guidance(1.0, omega * torch.exp(-alpha * ratio))  # where D = 0 nothing is multiplied by it


def beta_cfg(
    m: PairMoments,
    omega: Tensor,
    *,
    progress: PerSample,
    a: PerSample = 2.0,
    b: PerSample = 2.0,
    gamma: PerSample = 1.0,
) -> Guidance:
    """Compute `u + w Beta(progress; a, b) D / ||D||^gamma`, w = 1 + omega, Beta the density.

    progress = step / (steps - 1), step 0 the noisiest. Malarz et al., arXiv 2502.10574, who work on eps. Where the
    density is 0 the result is u."""
    a, b, p = (torch.as_tensor(one, dtype=m.dd.dtype, device=m.dd.device) for one in (a, b, progress))
    density = torch.exp(torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)) * p ** (a - 1) * (1 - p) ** (b - 1)
    length = torch.where(m.dd > 0, m.dd, 1.0) ** (gamma / 2)
    return Guidance(1.0, (1 + omega) * density / length - 1)


def temperature(
    m: PairMoments, omega: Tensor, *, levels: Levels, k: PerSample, data_scale: PerSample = 1.0
) -> Guidance:
    """Sharpen or flatten the distribution by 1 / k, for an x0 prediction (or `rule_space="x0"`), by its score.

        g = r (c + omega D) + a s0^2 (1/k - 1) / v x_t,   r = (a^2 s0^2 + n^2) / v,   v = a^2 s0^2 / k + n^2

    a, n are the levels at t and s0 = `data_scale`. The formula is finite at a = 0, and k = 1 is cfg. The rule reads x,
    so it runs in `guided_step` only.
    """
    a, n, s0 = levels.signal_t, levels.noise_t, data_scale
    v = a * a * s0 * s0 / k + n * n
    r = (a * a * s0 * s0 + n * n) / v
    return Guidance(r, r * omega, a * s0 * s0 * (1 / k - 1) / v)
