"""Fit omega without a network: the exact minimum of the loss, from the sums of one pass over the data.

`guided_energy_curve` gives the loss of an item at every omega, and cond and uncond do not depend on omega. So one pass
over the model serves all three fits, every beta and every lam, without training.

    curves, at = [], []
    for batch in batches:                                             # one pass over the model
        curves.append(lgd.guided_energy_curve(x_t, cond, uncond, levels, lgd.Renoise(x0, 4, seed), ...))
        at.append((c, s, t))
    table = fit_table(curves, *(torch.cat(part) for part in zip(*at)), s_knots, t_knots)

All fits run on the CPU in float64, in a fixed order: same inputs, same bits, on any number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.learn.pooled import POINTS, Curves, Problem, alone, count, joined, only, summed
from lgd_kernels.omega.forms import Constant, Interval
from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.ops.guided_energy.curve import EnergyCurve
from lgd_kernels.runtime import checks
from lgd_kernels.runtime.levels import OmegaLookup, omega_at, table_cells

FOLDS = 5  # one item in so many is held out to choose `smooth`
SLACK = 0.03  # stiffness between two neighbours, with 1 for three in a row: values without items become level


def fit_table(
    curves: Curves,
    c: Tensor | None,
    s: Tensor,
    t: Tensor,
    s_knots: Tensor,
    t_knots: Tensor,
    *,
    conditions: int | None = None,
    smooth: float | Sequence[float] = 10.0,
    shared: float = 1.0,
    bracket: tuple[float, float] = (0.0, 10.0),
    beta: float = 1.75,
    lam: float = 1.0,
    unbiased: bool = True,
) -> OmegaTable:
    """Fit the table whose bilinear omega(c, s, t) has the least loss over all items, to rounding.

        minimise  sum_i L_i(omega(c_i, s_i, t_i))  +  h / 2 (smooth bending(V - P)  +  shared sum (V - P)^2)
        bending(V) = sum over three knots in a row (V - 2 V' + V'')^2  +  .03 sum over neighbours (V - V')^2

    over the values V in the bracket, for each condition. P is the table of all items as if of one condition, with
    bending(P) alone: conditions share what they have in common, and the table of a single condition is P. An item acts
    on the four values that a step at its (s, t) reads, by their bilinear weights, so a value is the minimum pooled over
    the cells around it. h is the mean second derivative of an item's loss where the descent starts, so **smooth and
    shared count items**. A value with many more items around it follows them; one with few items continues its
    neighbours and the other conditions. A condition without items is P. Knots with s >= t hold what a lookup reads
    there.

    Args:
        curves: of `guided_energy_curve`, one or several, with N items together. A single item's minimum means little
            (see `EnergyCurve.minimize`): a few hundred for each condition are a start.
        c: `[N]` integers, or None for a table of one condition. s, t: `[N]`, times of the schedule.
        s_knots, t_knots: as in `OmegaTable`.
        conditions: C; by default the largest c + 1.
        smooth: a number >= 0, or several: then the one whose fit to four fifths of the items has the least loss on
            every fifth item. The default is ours.
        shared: a number >= 0; with 0, conditions are independent. The default is ours.
        bracket: of the values, 0 <= low < high.
        beta, lam, unbiased: of the loss.

    Returns an `OmegaTable`, its values in the dtype of the knots. The method is Newton's with Levenberg's damping and
    bounds, from the best constant, and then from P: no step raises the objective. Raises ValueError or TypeError,
    naming the argument.

    >>> import torch, lgd_kernels as lgd
    >>> s, t = torch.rand(400) * 0.5, 0.5 + torch.rand(400) * 0.5
    >>> x0 = torch.randn(400, 8)
    >>> x_t = ((1 - t)[:, None] * x0 + t[:, None] * torch.randn(400, 8))[:, None].repeat(1, 4, 1)
    >>> cond, uncond = (part * x0[:, None].expand_as(x_t) for part in (0.6, 0.2))  # omega = 1 is right everywhere
    >>> levels = lgd.RectifiedFlow().levels(t, s)
    >>> curve = lgd.guided_energy_curve(x_t, cond, uncond, levels, lgd.Renoise(x0, 4, seed=1), churn=1.0, seed=1)
    >>> table = fit_table(curve, None, s, t, torch.linspace(0, 0.4, 3), torch.linspace(0.5, 1, 3))
    >>> bool((table.values - 1).abs().max() < 0.3)
    True
    """
    curve = joined(curves)
    options = {"beta": beta, "lam": lam, "unbiased": unbiased}
    bracket = _bracket("fit_table", bracket)
    c = torch.zeros(count(curve), dtype=torch.int64, device="cpu") if c is None else c
    for name, part in (("c", c), ("s", s), ("t", t)):
        _like_items("fit_table", name, part, curve)
    conditions = int(c.max()) + 1 if conditions is None and len(c) else (conditions or 1)
    candidates = [float(smooth)] if isinstance(smooth, (int, float)) else sorted(map(float, smooth))
    if not candidates or not all(0 <= value < math.inf for value in candidates):
        raise ValueError(f"fit_table: `smooth` is {smooth}, expected numbers of items >= 0")
    if not 0 <= shared < math.inf:
        raise ValueError(f"fit_table: `shared` is {shared}, expected a number of items >= 0")

    for name, knots in (("s_knots", s_knots), ("t_knots", t_knots)):
        checks.tensor("fit_table", name, knots)
    shape = (conditions, len(s_knots), len(t_knots))
    s_knots, t_knots = s_knots.cpu(), t_knots.cpu()
    empty = OmegaTable(torch.zeros(shape, dtype=s_knots.dtype, device="cpu"), s_knots, t_knots)
    cells, weights, _ = table_cells(empty.at(c.cpu(), s.cpu(), t.cpu()), torch.float64)
    problem = Problem(curve, c.cpu().long(), cells % (shape[1] * shape[2]), weights, bracket, options)
    held = s_knots[:, None] < t_knots
    springs = _springs(held)

    def fitted(to: Problem, stiffness: float) -> Tensor:
        own, free, whole = stiffness * springs, held.flatten(), to.together()
        rest = whole.descend(whole.constants(1)[:, None].expand(-1, free.numel()), free, own)
        own = own + shared * torch.diag(free.double())
        return rest if conditions == 1 else to.descend(rest.expand(conditions, -1), free, own, rest)

    if len(candidates) > 1:
        chosen = torch.arange(count(curve), device="cpu") % FOLDS == 0
        some, others = problem.where(~chosen), problem.where(chosen)
        found = [others.loss(fitted(some, value)).sum() for value in candidates]
        candidates = [candidates[int(torch.stack(found).argmin())]]
    values = fitted(problem, candidates[0]).view(shape)

    axes = (torch.arange(size, device="cpu") for size in shape)
    i, j, k = (index.flatten() for index in torch.meshgrid(*axes, indexing="ij"))
    read = omega_at(OmegaLookup(values, s_knots, t_knots, i, s_knots[j], t_knots[k]), values)
    return OmegaTable(read.view(shape).to(s_knots.dtype), s_knots, t_knots)  # each value is what a lookup reads there


def fit_constant(
    curves: Curves,
    *,
    bracket: tuple[float, float] = (0.0, 10.0),
    beta: float = 1.75,
    lam: float = 1.0,
    unbiased: bool = True,
) -> Constant:
    """Fit the one omega with the least loss over all items: the best of 33 in the bracket, refined.

    Args and errors: as in `fit_table`, which with a single knot for s and for t fits one for each condition.

    >>> import torch, lgd_kernels as lgd
    >>> levels = lgd.RectifiedFlow().levels(torch.ones(2), torch.zeros(2))
    >>> cond, uncond = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
    >>> curve = lgd.guided_energy_curve(cond, cond, uncond, levels, torch.tensor([[[2.0]], [[4.0]]]))
    >>> fit_constant(curve, beta=2.0, lam=0.0).omega.item()
    2.0
    """
    bracket = _bracket("fit_constant", bracket)
    problem = alone(joined(curves), bracket, {"beta": beta, "lam": lam, "unbiased": unbiased})
    with torch.device("cpu"):  # where the values are, whatever the default device
        return Constant(float(problem.descend(problem.constants(1)[:, None])))


def fit_interval(
    curves: Curves,
    t: Tensor,
    edges: Tensor,
    *,
    bracket: tuple[float, float] = (0.0, 10.0),
    beta: float = 1.75,
    lam: float = 1.0,
    unbiased: bool = True,
) -> Interval:
    """Fit the limited interval with the least loss over all items: omega where low < t <= high, 0 elsewhere.

    The search covers every pair low < high of the edges, each with its own best omega of 33 in the bracket, improved by
    the parabola through the least three; then it refines the weight of the best pair. One pass sums the items between
    edges.

    Args:
        t: `[N]`, times of the schedule, as the items have them.
        edges: `[E]`, increasing times of the schedule, the candidates for low and high. (0, ..., 1] of rectified flow
            contains the constants.
        bracket, beta, lam, unbiased: as in `fit_table`, with its errors.

    >>> import torch, lgd_kernels as lgd
    >>> t = torch.tensor([0.25, 0.75])
    >>> levels = lgd.RectifiedFlow().levels(t, torch.zeros(2))
    >>> cond, uncond = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
    >>> curve = lgd.guided_energy_curve(cond, cond, uncond, levels, torch.tensor([[[1.0]], [[3.0]]]))
    >>> best = fit_interval(curve, t, torch.tensor([0.0, 0.5, 1.0]), beta=2.0, lam=0.0)
    >>> best.omega.item(), best.low.item(), best.high.item()
    (2.0, 0.5, 1.0)
    """
    curve, (low, high) = joined(curves), _bracket("fit_interval", bracket)
    options = {"beta": beta, "lam": lam, "unbiased": unbiased}
    _like_items("fit_interval", "t", t, curve)
    checks.tensor("fit_interval", "edges", edges)
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise ValueError(f"fit_interval: `edges` is {edges.tolist()}, expected two or more times that increase")
    edges, t = edges.cpu().double(), t.cpu().double()
    between = torch.bucketize(t, edges)  # edges[i - 1] < t <= edges[i]
    grid = torch.linspace(low, high, POINTS, dtype=torch.float64, device="cpu")
    gained = summed(curve, grid, between, len(edges) + 1, options) - summed(
        curve, torch.zeros(1, dtype=torch.float64, device="cpu"), between, len(edges) + 1, options
    )
    before = gained.cumsum(0)[:-1]  # [E, K]: up to and with each edge
    lows, highs = torch.triu_indices(len(edges), len(edges), 1, device="cpu")
    least, weight = _parabola(before[highs] - before[lows], grid)
    best = int(least.argmin())
    start, end = edges[lows[best]], edges[highs[best]]
    inside = (t > start) & (t <= end)
    problem = alone(only(curve, inside), (low, high), options)
    with torch.device("cpu"):
        return Interval(float(problem.descend(weight[best].view(1, 1))), float(start), float(end))


def _parabola(losses: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least loss and its omega, `[P]` each, of losses `[P, K]` on an even grid: the vertex of the parabola
    through the least and its neighbours, or an end of the grid."""
    at = losses.argmin(1, keepdim=True)
    inner = at.clamp(1, len(grid) - 2)
    a, b, c = (losses.gather(1, inner + shift)[:, 0] for shift in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = torch.where(bend > 0, (a - c) / (2 * torch.where(bend > 0, bend, 1.0)), 0.0).clamp(-1, 1)
    least, edge = losses.gather(1, at)[:, 0], (at != inner)[:, 0]
    found = b - shift * (a - c) / 2 + shift * shift * bend / 2
    keep = edge & (least <= found)
    at, inner = at[:, 0], inner[:, 0]
    return torch.where(keep, least, found), torch.where(keep, grid[at], grid[inner] + shift * (grid[1] - grid[0]))


def _springs(held: Tensor) -> Tensor:
    """Return springs `[n, n]` with bending(V) = V @ springs @ V, over knots in a row that all hold steps."""
    n = held.numel()
    index = torch.arange(n, device="cpu").view(held.shape)
    springs = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    for stiff, pattern in ((1.0, (1.0, -2.0, 1.0)), (SLACK, (1.0, -1.0))):
        size = len(pattern)
        for axis in (axis for axis in range(2) if held.shape[axis] >= size):
            rows = index.unfold(axis, size, 1).reshape(-1, size)
            rows = rows[held.flatten()[rows].all(1)]
            for (a, first), (b, second) in itertools.product(enumerate(pattern), repeat=2):
                stretch = torch.full((len(rows),), stiff * first * second, dtype=torch.float64, device="cpu")
                springs.index_put_((rows[:, a], rows[:, b]), stretch, accumulate=True)
    return springs


def _like_items(where: str, name: str, tensor: Tensor, curve: EnergyCurve) -> None:
    checks.tensor(where, name, tensor)
    if tensor.shape != (count(curve),):
        raise ValueError(
            f"{where}: `{name}` has shape {list(tensor.shape)}, expected [N] = [{count(curve)}], "
            "the items of the curves"
        )


def _bracket(where: str, bracket: tuple[float, float]) -> tuple[float, float]:
    low, high = map(float, bracket)
    if not 0 <= low < high < math.inf:
        raise ValueError(f"{where}: `bracket` is {bracket}, expected (low, high) with 0 <= low < high")
    return low, high
