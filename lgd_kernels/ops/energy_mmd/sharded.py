"""Samples that lie in several processes: each computes the pairs of its own with all, and values are added up.

The parts travel around a ring: a process sends the part it has just used to the rank before it, and receives the next
one from the rank after it. It never holds more than its own samples, those in use and those on their way.

A process computes n_own k + n_own n pairs of x: an equal share of the work where parts are equal. Where no process
wants the gradient to a set, one of two processes computes a pair of its samples; else both do, each for the gradient of
its own sample. So no gradient travels, and backward does not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from lgd_kernels.ops.energy_mmd import checks, pieces, reference
from lgd_kernels.ops.energy_mmd.pieces import Piece, Side
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.progress import Report

OP = checks.OP


class Parts(NamedTuple):
    """The parts of a group of processes, as all of them know them."""

    group: distributed.ProcessGroup
    rank: int
    counts: tuple[list[int], list[int]]  # of x and y, by rank
    wanted: tuple[bool, bool]  # whether any process wants the gradient

    @property
    def size(self) -> int:
        return len(self.counts[0])


class _Described(NamedTuple):
    """What a process sends to the others before a call."""

    same: dict[str, Any]  # equal in all processes
    counts: tuple[int, int]
    wanted: tuple[bool, bool]


def agreed(
    group: distributed.ProcessGroup,
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    options: checks.Options,
    impl: str | None,
) -> Parts:
    """Return the parts of all processes, or raise in every process if one of them has a wrong call or two differ."""
    if impls.transformed():  # where processes cannot even be asked
        raise ValueError(f"{OP}: `group` does not go with torch.compile, vmap, jvp and func.grad")
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(f"{OP}: `group` is given, but torch.distributed is not set up; init_process_group(...) first")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{OP}: `group` is a {type(group).__name__}, expected a torch.distributed.ProcessGroup that this process "
            "belongs to, such as torch.distributed.group.WORLD"
        )
    error, own = None, None
    try:
        checks.call(x, y, x_weights, y_weights, options, part=True)
        impls.choose(OP, impl, x.device, x.dtype, y.dtype)
        own = _described(x, y, x_weights, y_weights, options)
    except (TypeError, ValueError) as found:
        error = found
    answers: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(answers, own if error is None else str(error), group=group)
    if error is not None:
        raise error
    for rank, answer in enumerate(answers):
        if isinstance(answer, str):
            raise ValueError(f"another process of the group, rank {rank}, was called wrongly: {answer}")
    every = [_Described(*answer) for answer in answers]
    _check_same(every, distributed.get_rank(group))
    x_counts, y_counts = ([one.counts[of] for one in every] for of in (0, 1))
    for name, counts in (("x", x_counts), ("y", y_counts)):
        if sum(counts) == 0:
            raise ValueError(f"{OP}: `{name}` holds no sample in any process of the group, expected one or more")
    checks.partners(sum(x_counts), sum(y_counts), options.lam, options.unbiased, options.target_term)
    x_wanted, y_wanted = (any(one.wanted[of] for one in every) for of in (0, 1))
    return Parts(group, distributed.get_rank(group), (x_counts, y_counts), (x_wanted, y_wanted))


def _described(
    x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, options: checks.Options
) -> _Described:
    samples = int(options.batched)
    shape: list[Any] = list(x.shape)
    shape[samples] = "n"
    same = {
        "the shape of `x`": shape,
        "the dtype of `x`": str(x.dtype),
        "the dtype of `y`": str(y.dtype),
        "the dtype of `x_weights`": None if x_weights is None else str(x_weights.dtype),
        "the dtype of `y_weights`": None if y_weights is None else str(y_weights.dtype),
    }
    plain = options._replace(beta=float(options.beta), lam=float(options.lam))._asdict()
    plain["kernel"] = repr(options.kernel)
    same |= {f"`{name}`": value for name, value in plain.items()}
    return _Described(same, (x.shape[samples], y.shape[samples]), (pieces.wanted(x), pieces.wanted(y)))


def _check_same(every: list[_Described], own: int) -> None:
    for name, first in every[0].same.items():
        for rank, one in enumerate(every):
            if one.same[name] != first:
                raise ValueError(
                    f"{OP}: {name} is {first} in rank 0 of the group and {one.same[name]} in rank {rank}, expected the "
                    f"same in all (here it is {every[own].same[name]})"
                )


class _Meeting(NamedTuple):
    """A set of this process (0: x, 1: y) meets one of another process, with the coefficients of value and slope."""

    own: int
    other: int
    value: Tensor
    slope: Tensor


class _Ring(NamedTuple):
    """The meetings of this process with each part, `step` ranks on."""

    parts: Parts
    between: Tensor  # [B]: the coefficient of the term of x with y
    within: list[Tensor]  # [B]: the coefficients of the terms that count, of x, or of x and y
    slopes: tuple[bool, bool]  # whether this process wants the gradient

    def meetings(self, step: int) -> Iterator[_Meeting]:
        nothing = torch.zeros_like(self.between)
        yield _Meeting(0, 1, self.between, self.between)
        if self.slopes[1]:
            yield _Meeting(1, 0, nothing, self.between)
        for of, share in enumerate(self.within):
            once = not self.parts.wanted[of]  # one process of two computes a pair, for both
            if step == 0:
                yield _Meeting(of, of, share, share)
            elif step <= _reach(self.parts.rank, self.parts.size, once):
                yield _Meeting(of, of, (1 + once) * share, 2 * share)

    def pieces(self, own: list[Side], travel: list[bool]) -> Iterator[Piece]:
        sent = [Side(side.points, side.weights) for side in own]  # a part that is met gets no gradient
        for step, theirs in _around(sent, travel, self.parts):
            for of, other, value, slope in self.meetings(step):
                yield Piece(own[of], None if step == 0 and of == other else theirs[other], value, slope)
            del theirs  # before the one after the next is on its way

    def total(self) -> int:
        """Return the number of pairs of all pieces."""
        counts, rank, size = self.parts.counts, self.parts.rank, self.parts.size
        total = 0
        for step in range(size):
            for of, other, *_ in self.meetings(step):
                own = counts[of][rank]
                same = step == 0 and of == other
                total += pieces.pairs_within(own) if same else own * counts[other][(rank + step) % size]
        return total


def energy_mmd(a: EnergyMmd, impl: str | None, parts: Parts, report: Report | None) -> Tensor:
    """Compute the loss [B] of all processes, from the samples of this one."""
    x_weights, y_weights = _scaled({"x_weights": a.x_weights, "y_weights": a.y_weights}, parts)
    x = Side(a.x.detach(), x_weights, pieces.zeros_for(a.x, a.dtype))
    y = Side(a.y.detach(), y_weights, pieces.zeros_for(a.y, a.dtype))
    *totals, x_squares, y_squares = _added_up([x.total(), y.total(), x.squares(), y.squares()], parts)
    within = []
    names = ("x_weights", "y_weights") if a.target_term else ("x_weights",)
    for name, total, squares in zip(names, totals, (x_squares, y_squares), strict=False):
        if a.lam and a.unbiased:
            checks.shared(name, total, squares)
        if a.lam:
            within.append(-a.lam / 2 / (total.square() - (squares if a.unbiased else 0)))
    ring = _Ring(parts, 1 / (totals[0] * totals[1]), within, (x.gradient is not None, y.gradient is not None))
    todo = ring.pieces([x, y], [bool(a.lam) or parts.wanted[1], True])
    loss = pieces.run(todo, a, impl, report, ring.total(), torch.zeros_like(ring.between))
    return pieces.attached(a, _added_up([loss], parts)[0], x.gradient, y.gradient)


def _scaled(weights: dict[str, Tensor | None], parts: Parts) -> list[Tensor | None]:
    """Scale the weights by the largest one in any process. All processes raise if the sum is not positive and
    finite."""
    scaled = []
    for name, own in weights.items():
        if own is not None:
            own = own.detach().double()
            largest = own.amax(1) if own.shape[1] else own.new_zeros(len(own))
            every = torch.stack(_gathered([own.sum(1), largest], parts))
            checks.sums(name, every[:, 0].sum(0))
            own = reference.scaled(own, every[:, 1].amax(0))
        scaled.append(own)
    return scaled


def _added_up(own: list[Tensor], parts: Parts) -> Tensor:
    """Add some numbers over the processes in the order of ranks: the same bits in all."""
    first, *rest = _gathered(own, parts)
    return sum(rest, first)


def _gathered(own: list[Tensor], parts: Parts) -> list[Tensor]:
    stacked = torch.stack(own)
    every = [torch.empty_like(stacked) for _ in parts.counts[0]]
    distributed.all_gather(every, stacked, group=parts.group)
    return every


Part = list[list[Tensor | None]]  # points and weights of x, and of y; None: absent, or a set that does not travel


def _around(own: list[Side], travel: list[bool], parts: Parts) -> Iterator[tuple[int, list[Side]]]:
    """Yield how many ranks on, and the x and y of that rank, from our own on. Points of a set that does not travel are
    those of this process. While one part is used the next is on its way. Parts are sent at the length of the longest.
    """
    yield 0, own
    here: Part = [
        [_padded(side.points, max(counts)), _padded(side.weights, max(counts))] if goes else [None, None]
        for side, goes, counts in zip(own, travel, parts.counts, strict=True)
    ]
    coming = _handed_on(here, parts) if parts.size > 1 else ([], [])
    for step in range(1, parts.size):
        here, works = coming
        while works:
            works.pop().wait()  # and forget it: it refers to what was sent
        coming = _handed_on(here, parts) if step < parts.size - 1 else ([], [])
        rank = (parts.rank + step) % parts.size
        yield (
            step,
            [_trimmed(one, counts[rank], side) for one, counts, side in zip(here, parts.counts, own, strict=True)],
        )


def _handed_on(here: Part, parts: Parts) -> tuple[Part, list[distributed.Work]]:
    """Send to the rank before. The part that the rank after sends is complete when all works are done."""
    coming: Part = [[None if one is None else torch.empty_like(one) for one in side] for side in here]
    sent, received = ([one for side in sides for one in side if one is not None] for sides in (here, coming))
    before, after = (distributed.get_global_rank(parts.group, (parts.rank + by) % parts.size) for by in (-1, 1))
    operations = [distributed.P2POp(distributed.isend, one, before, parts.group) for one in sent]
    operations += [distributed.P2POp(distributed.irecv, one, after, parts.group) for one in received]
    return coming, distributed.batch_isend_irecv(operations)


def _padded(own: Tensor | None, longest: int) -> Tensor | None:
    if own is None:
        return None
    if own.shape[1] < longest:
        own = torch.cat((own, own.new_zeros(own.shape[0], longest - own.shape[1], *own.shape[2:])), 1)
    return own.contiguous()


def _trimmed(part: list[Tensor | None], samples: int, own: Side) -> Side:
    points, weights = part
    return own if points is None else Side(points, weights).rows(0, samples)


def _reach(rank: int, size: int, once: bool) -> int:
    """Return how many of the ranks after it a rank meets: all, or so many that each two ranks meet `once`."""
    return (size - 1) // 2 + (size % 2 == 0 and rank < size // 2) if once else size - 1
