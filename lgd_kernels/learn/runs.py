"""Compare omegas by whole runs of the sampler: how far are their samples from held-out data?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.learn.data import Data, items_of, size_of
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.metrics.distance import energy_distance
from lgd_kernels.ops.energy_mmd import checks as sample_checks
from lgd_kernels.runtime import blocks, checks
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.philox import philox_normal
from lgd_kernels.runtime.progress import Track, silent
from lgd_kernels.sampling import sampler, solvers
from lgd_kernels.sampling.step_plan import StepPlan

Omega = Callable[[Tensor, Tensor, Tensor], Tensor]  # (c [B], s [B], t [B]) -> [B]
FEWEST = 3  # samples on each side: two for the distance, three for its interval
LEAST = 8  # samples of a class
NUMBERS = 2**27  # of held-out data that are kept: 512 MiB of float32
INPUTS = 2**24  # of omega's condition in one call of it
MARGINAL, JOINT = "x", "(x, c)"


class TooFew(ValueError):
    """Say that there are too few data to compare samples with."""


class Distances(NamedTuple):
    """Hold estimates `[O]` and their covariance `[O, O]`, float64, on the CPU."""

    value: Tensor
    covariance: Tensor

    def interval(self, i: int) -> tuple[float, float]:
        """Return estimate i and half the width of its 95 % interval (1.96 standard errors)."""
        return float(self.value[i]), 1.96 * float(self.covariance[i, i].clamp(min=0)) ** 0.5

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """Return estimate i minus estimate j, and half the width of its 95 % interval."""
        cov = self.covariance
        variance = cov[i, i] + cov[j, j] - 2 * cov[i, j]
        return float(self.value[i] - self.value[j]), 1.96 * float(variance.clamp(min=0)) ** 0.5


class Compared(NamedTuple):
    """Hold the result of `compare`."""

    names: tuple[str, ...]
    conditions: tuple[int | str, ...]  # labels; or, for embeddings, what is compared: "x" and "(x, c)"
    held: tuple[int, ...]  # data of each condition
    samples: int  # of each condition
    each: tuple[Distances, ...]  # of each condition
    over_all: Distances  # the mean over labels, each with the same weight; for embeddings that of (x, c)
    left_out: tuple[int, ...]  # labels with fewer than three data
    labels: int  # labels with enough data, of which `conditions` may be a part; 0 for embeddings


@torch.no_grad()
def distances(x: Tensor, y: Tensor) -> Distances:
    """Compute the energy distance of several samples to the same data, and the covariance of these figures.

        D_o = 2 E||x - y|| - E||x - x'|| - E||y - y'||        `energy_distance`: unbiased, 0 on average for one law

    The covariance is the jackknife's: samples are left out one at a time, sample i of every set at once, then data.
    Leaving out x_i changes D by 2 / (n - 1) of (the mean of) p_i = a_i - b_i (n - 1) / (n - 2), where a_i and b_i are
    the mean distances of x_i to the data and to the other samples; so the jackknife takes no more passes:

        cov = 4 / n cov_i(p_i) + 4 / k cov_j(q_j)        q_j of the data, likewise

    Sets made from the same noise are paired by it: the difference of two of them is known better than either. Near D =
    0, where p does not vary, the intervals are too wide rather than too narrow.

    Args:
        x: `[O, n, ...]`, n of 3 or more; sample i of every set was made from the same noise.
        y: data `[k, ...]`, k of 3 or more.

    Returns `Distances`. NaN where a set holds NaN or infinity. Raises TypeError or ValueError, naming the argument.

    Source: Efron and Stein, Ann. Statist. 9 (1981), for the jackknife.

    >>> import torch
    >>> y = torch.tensor([[0.0], [2.0], [4.0]])
    >>> found = distances(torch.stack((y, y + 3)), y)
    >>> found.value.round(decimals=4).tolist()  # 2 16/9 - 8/3 - 8/3, and 2 29/9 - 8/3 - 8/3
    [-1.7778, 1.1111]
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] < FEWEST:
        came = f"has shape {list(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ValueError(f"distances: `x` {came}, expected samples [O, n, ...], n = {FEWEST} or more")
    with sample_checks.said_by("distances"):
        sample_checks.samples(x[0], y, False)
    if len(y) < FEWEST:
        raise ValueError(f"distances: `y` holds {len(y)} data, expected {FEWEST} or more")
    value = torch.stack([energy_distance(one, y) for one in x]).double().cpu()
    of_x, of_y = zip(*(_influences(one, y) for one in x), strict=True)
    covariance = sum(torch.cov(torch.stack(one)) / len(one[0]) for one in (of_x, of_y))
    assert isinstance(covariance, Tensor)
    return Distances(value, covariance.reshape(len(x), len(x)).cpu())


def _influences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 p `[n]` and 2 q `[k]` of `distances`, float64."""
    n, k = len(x), len(y)
    points = torch.cat([one.reshape(len(one), -1).to(arithmetic_dtype(x, y)) for one in (x, y)])
    sides = points.new_zeros(n + k, 2, dtype=torch.float64)
    sides[:n, 0], sides[n:, 1] = 1, 1
    sums = torch.zeros_like(sides)  # of the distances of each point to x and to y
    for rows, columns, squares in blocks.upper_blocks(points):
        apart = squares.clamp_(min=0).sqrt_().double()
        sums[rows] += apart @ sides[columns]
        if rows != columns:
            sums[columns] += apart.t() @ sides[rows]
    (own_x, of_x), (of_y, own_y) = sums[:n].unbind(1), sums[n:].unbind(1)
    return 2 * (of_x / k - own_x / (n - 2)), 2 * (of_y / n - own_y / (k - 2))


def plan(frozen: Frozen, steps: int, start: float = 1.0) -> StepPlan:
    """Plan a run of the step that omega is learned for, without churn, at times even in unit time.

    Raises ValueError where the schedule has no such times.
    """
    times = frozen.schedule.from_unit(torch.linspace(start, 0, steps + 1, device="cpu"))
    return solvers.one_step(frozen.schedule, times, prediction=frozen.prediction)


@torch.no_grad()
def compare(
    frozen: Frozen,
    omegas: Mapping[str, Omega],
    data: Data,
    *,
    steps: int = 50,
    samples: int = 1024,
    seed: int = 0,
    start: float = 1.0,
    chunk: int = 1024,
    device: torch.device | str | None = None,
    track: Track = silent,
) -> Compared:
    """Sample with each omega, from the same noise, and measure how far the samples are from held-out data.

    Labels: every label has the same number of samples, and is compared with the data that have it. The figure over all
    is the mean over the labels. Labels with fewer than 3 data are left out; if 8 samples of each are more than
    `samples`, some labels are taken at random.

    Embeddings: one sample for the c of each item of one half of the data, compared with the other half, so that samples
    and data are independent. "x" compares what is drawn, whatever its c; "(x, c)" compares the pairs, with c scaled to
    the total variance of x, and is the figure over all: it is 0 only if x has the right law given c.

    Args:
        frozen: the denoiser.
        omegas: functions (c, s, t) -> [B], by name: networks, tables, formulas.
        data: held-out pairs (x0, c), in random order, that omega was not learned from.
        steps, start: of the run: `plan`.
        samples: their number with each omega, for all labels together.
        seed: of the noise and of the labels.
        chunk: samples at a time.
        device: where to sample; by default that of the data.
        track: draws a bar, `lgd_kernels.runtime.progress.bars`.

    Returns `Compared`, with the same bits for the same arguments. Raises TooFew, a ValueError, if there are too few
    data to compare with.

    >>> import torch, lgd_kernels as lgd
    >>> frozen = Frozen(lambda x, t, c: c[:, None] * 0.5 + 0 * x, lgd.RectifiedFlow(), null=0)
    >>> c = torch.arange(60) % 2 + 1
    >>> omegas = {"none": lambda c, s, t: 0 * t, "one": lambda c, s, t: 0 * t + 1}
    >>> found = compare(frozen, omegas, (c[:, None].float(), c), steps=4, samples=64)
    >>> found.conditions, found.over_all.value  # samples at c / 2 and at c: 2 |c / 2|, and 0
    ((1, 2), tensor([1.5000, 0.0000], dtype=torch.float64))
    """
    for name, value in (("steps", steps), ("samples", samples), ("chunk", chunk)):
        checks.count("compare", name, value)
    first, _ = items_of(data, torch.zeros(1, dtype=torch.int64, device="cpu"))
    count = min(size_of(data), max(2 * FEWEST, NUMBERS // first[0].numel()))
    x0, c = items_of(data, torch.arange(count, device="cpu"))
    x0, c = (one if device is None else one.to(device) for one in (x0, c))
    asked = _of_embeddings(x0, c, samples) if c.is_floating_point() else _of_labels(x0, c, samples, seed)
    run = plan(frozen, steps, start).to(x0.device)
    x = torch.stack(
        [_sampled(frozen, omega, asked.c, x0, run, seed, chunk, track, name) for name, omega in omegas.items()]
    )
    if c.is_floating_point():
        own, own_c, given = asked.data[0], c[len(asked.c) :].flatten(1), asked.c.flatten(1)
        scale = (own.flatten(1).var(0).sum() / own_c.var(0).sum().clamp(min=1e-30)).sqrt()
        pairs = torch.cat((x.flatten(2), (scale * given).expand(len(x), -1, -1).to(x)), 2)
        each = [distances(x, own), distances(pairs, torch.cat((own.flatten(1), (scale * own_c).to(own)), 1))]
        over_all = each[1]
    else:
        each = [distances(*one) for one in zip(x.split(asked.samples, 1), asked.data, strict=True)]
        means, covariance = (torch.stack(one) for one in zip(*each, strict=True))
        over_all = Distances(means.mean(0), covariance.sum(0) / len(each) ** 2)
    held = tuple(len(one) for one in asked.data)
    return Compared(
        tuple(omegas), asked.conditions, held, asked.samples, tuple(each), over_all, asked.left_out, asked.labels
    )


class _Asked(NamedTuple):
    """Hold what to sample, and what to compare it with."""

    c: Tensor  # of each sample: those of the first condition, then of the next
    data: tuple[Tensor, ...]  # of each condition
    conditions: tuple[int | str, ...]
    samples: int  # of each condition
    left_out: tuple[int, ...] = ()
    labels: int = 0


def _of_labels(x0: Tensor, c: Tensor, samples: int, seed: int) -> _Asked:
    """Return as many conditions of each label, or of some labels at random."""
    labels, found = c.unique(return_counts=True)
    left_out, labels = labels[found < FEWEST], labels[found >= FEWEST]
    if not len(labels):
        raise TooFew(f"no label has {FEWEST} items of the held-out data")
    each = max(LEAST, samples // len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu")
    some = labels[order[: max(1, samples // each)].sort().values.to(labels.device)]
    data = tuple(x0[c == label] for label in some)
    return _Asked(some.repeat_interleave(each), data, tuple(some.tolist()), each, tuple(left_out.tolist()), len(labels))


def _of_embeddings(x0: Tensor, c: Tensor, samples: int) -> _Asked:
    """Return the conditions of one part of the items, and the data of the other."""
    count = min(samples, len(c) // 2)
    if count < FEWEST:
        raise TooFew(f"{min(samples, len(c))} items of held-out data or samples are fewer than {2 * FEWEST}")
    return _Asked(c[:count], (x0[count:],) * 2, (MARGINAL, JOINT), count)


def _sampled(
    frozen: Frozen,
    omega: Omega,
    c: Tensor,
    like: Tensor,
    run: StepPlan,
    seed: int,
    chunk: int,
    track: Track,
    name: str,
) -> Tensor:
    """Return samples of the conditions c, shaped like the data `like`."""
    chunk = max(1, min(chunk, INPUTS // (len(run) * c[0].numel())))
    parts, found, at = c.split(chunk), [], 0
    ticks = iter(track(range(len(parts) * len(run)), f"samples, {name}"))
    noise = frozen.schedule.signal_noise(run.times[:1])[1]
    for part in parts:
        z = philox_normal((len(part), *like.shape[1:]), seed, first_sample=at, device=like.device)
        x, null = (noise * z).to(like.dtype), frozen.null_like(part)
        at += len(part)
        x = sampler.sample(
            frozen.denoiser, x, run, part, null, omega, condition=part, callback=lambda step, x: next(ticks, None)
        )
        found.append(x)
    next(ticks, None)  # the bar goes
    return torch.cat(found)
