"""Samples that lie in several processes: each takes the pairs of its own with all, and values are added up.

The parts go around: a process hands on what it has met to the one before it and gets what the one after it has met, so
it never holds more than its own samples, those it meets and those that are on their way meanwhile.

A process sees n_own k + n_own n pairs of x: an equal share of the work where parts are equal. Where nobody wants the
gradient to a set, a pair of its samples is looked at in one of their two processes; else in both, for the gradient of
its own sample. So no gradient travels, and backward does not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from lgd_kernels.ops.energy_mmd import checks, pieces, reference
from lgd_kernels.ops.energy_mmd.pieces import Form, Piece, Side
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.progress import Report

OP = checks.OP


class Parts(NamedTuple):
    """What the processes of a group know of each other."""

    group: distributed.ProcessGroup
    rank: int
    counts: tuple[list[int], list[int]]  # of x and y, by rank
    wanted: tuple[bool, bool]  # whether anyone wants the gradient


def agreed(group, x, y, x_weights, y_weights, beta, lam, unbiased, kernel, target_term, precision, batched, impl):
    """`Parts`; or an error in every process, where one was called wrongly or two differ."""
    if impls.transformed():  # where processes cannot even be asked
        raise ValueError(f"{OP}: `group` does not go with torch.compile, vmap, jvp and func.grad")
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(f"{OP}: `group` is given, but torch.distributed is not set up; init_process_group(...) first")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{OP}: `group` is a {type(group).__name__}, expected a torch.distributed.ProcessGroup that this process "
            "belongs to, such as torch.distributed.group.WORLD"
        )
    options = beta, lam, unbiased, kernel, target_term, precision, batched
    error = None
    try:
        checks.call(x, y, x_weights, y_weights, *options, part=True)
        impls.choose(OP, impl, x.device, x.dtype, y.dtype)
        own = _described(x, y, x_weights, y_weights, *options)
    except (TypeError, ValueError) as found:
        error, own = found, str(found)
    every = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, own, group=group)
    if error is not None:
        raise error
    for rank, one in enumerate(every):
        if isinstance(one, str):
            raise ValueError(f"another process of the group, rank {rank}, was called wrongly: {one}")
    for name, value in own["same"].items():
        for rank, one in enumerate(every):
            if one["same"][name] != every[0]["same"][name]:
                raise ValueError(
                    f"{OP}: {name} is {every[0]['same'][name]} in rank 0 of the group and {one['same'][name]} in rank "
                    f"{rank}, expected the same in all (here it is {value})"
                )
    counts = tuple([one["counts"][of] for one in every] for of in (0, 1))
    for name, total in zip("xy", map(sum, counts), strict=True):
        if total == 0:
            raise ValueError(f"{OP}: `{name}` holds no sample in any process of the group, expected one or more")
    checks.partners(*map(sum, counts), lam, unbiased, target_term)
    wanted = tuple(any(one["wanted"][of] for one in every) for of in (0, 1))
    return Parts(group, distributed.get_rank(group), counts, wanted)


def _described(x, y, x_weights, y_weights, beta, lam, unbiased, kernel, target_term, precision, batched):
    samples = int(batched)
    shape = list(x.shape)
    shape[samples] = "n"
    same = {
        "the shape of `x`": shape,
        "the dtype of `x`": str(x.dtype),
        "the dtype of `y`": str(y.dtype),
        "the dtype of `x_weights`": x_weights if x_weights is None else str(x_weights.dtype),
        "the dtype of `y_weights`": y_weights if y_weights is None else str(y_weights.dtype),
        "`beta`": float(beta), "`lam`": float(lam), "`unbiased`": unbiased, "`kernel`": repr(kernel),
        "`target_term`": target_term, "`precision`": precision, "`batched`": batched,
    }  # fmt: skip
    counts = x.shape[samples], y.shape[samples]
    return {"same": same, "counts": counts, "wanted": (pieces.wanted(x), pieces.wanted(y))}


def energy_mmd(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    kernel: str,
    parameters: list[float],
    lam: float,
    unbiased: bool,
    target_term: bool,
    precision: str | None,
    impl: str | None,
    parts: Parts,
    report: Report | None,
) -> Tensor:
    """x [B, n, D] and y [B, k, D], of this process, to the loss [B] of all."""
    room = [pieces.room_for(one, other, pieces.wanted(one)) for one, other in ((x, y), (y, x))]
    weights = _scaled({"x_weights": x_weights, "y_weights": y_weights}, parts)
    own = [Side(one.detach(), of_one, found) for one, of_one, found in zip((x, y), weights, room, strict=True)]
    *totals, x_squares, y_squares = _added_up([*(one.total() for one in own), *(one.squares() for one in own)], parts)
    if lam and unbiased:
        for name, total, squares in (("x_weights", totals[0], x_squares), ("y_weights", totals[1], y_squares)):
            if name == "x_weights" or target_term:
                checks.shared(name, total, squares)
    between = 1 / (totals[0] * totals[1])
    nothing = torch.zeros_like(between)
    within = [
        -lam / 2 / (total.square() - (squares if unbiased else 0))
        for total, squares in zip(totals, (x_squares, y_squares), strict=True)
    ]
    size = len(parts.counts[0])

    def meetings(step: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Which set of ours meets which of the process so many ranks on; coefficients of the value and the slope."""
        yield 0, 1, between, between
        if room[1] is not None:
            yield 1, 0, nothing, between
        for of in ((0, 1) if target_term else (0,)) if lam else ():
            once = not parts.wanted[of]  # one process of two looks at a pair, for both
            if step == 0:
                yield of, of, within[of], within[of]
            elif step <= _reach(parts.rank, size, once):
                yield of, of, (1 + once) * within[of], 2 * within[of]

    def todo() -> Iterator[Piece]:
        travel = [bool(lam) or parts.wanted[1], True]
        for step, theirs in _around([Side(one.points, one.weights) for one in own], travel, parts):
            for of, other, value, slope in meetings(step):
                yield Piece(own[of], None if step == 0 and of == other else theirs[other], value, slope)
            del theirs  # before the one after the next is on its way

    total = sum(
        pieces.pairs_within(own[of].count) if step == 0 and of == other
        else own[of].count * parts.counts[other][(parts.rank + step) % size]
        for step in range(size) for of, other, *_ in meetings(step)
    )  # fmt: skip
    form = Form(kernel, parameters, unbiased, precision, impl)
    loss = pieces.run(todo(), form, report, total, nothing)
    return pieces.attached(x, y, _added_up([loss], parts)[0], *room)


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
    """Sums over the processes of some numbers, in the order of ranks: the same bits in all."""
    return sum(_gathered(own, parts))


def _gathered(own: list[Tensor], parts: Parts) -> list[Tensor]:
    stacked = torch.stack(own)
    every = [torch.empty_like(stacked) for _ in parts.counts[0]]
    distributed.all_gather(every, stacked, group=parts.group)
    return every


def _around(own: list[Side], travel: list[bool], parts: Parts) -> Iterator[tuple[int, list[Side | None]]]:
    """How many ranks on, and the x and y that lie there, from our own on; None of a set that does not travel. While one
    is met the next is on its way. Parts are sent at the length of the longest."""
    yield 0, own
    size = len(parts.counts[0])
    here = [
        [_padded(side.points, max(counts)), _padded(side.weights, max(counts))] if goes else [None, None]
        for side, goes, counts in zip(own, travel, parts.counts, strict=True)
    ]
    coming = _handed_on(here, parts) if size > 1 else None
    for step in range(1, size):
        here, works = coming
        while works:
            works.pop().wait()  # and forget it: it holds on to what was sent
        coming = _handed_on(here, parts) if step < size - 1 else None
        counts = [of[(parts.rank + step) % size] for of in parts.counts]
        yield (
            step,
            [
                None if points is None else Side(points, weights)[:count]
                for (points, weights), count in zip(here, counts, strict=True)
            ],
        )


def _handed_on(here: list[list[Tensor | None]], parts: Parts):
    """To the rank before; what the rank after hands on will be in the first of the results when all works are done."""
    size, group = len(parts.counts[0]), parts.group
    coming = [[one if one is None else torch.empty_like(one) for one in side] for side in here]
    sent, received = ([one for side in sides for one in side if one is not None] for sides in (here, coming))
    before, after = (distributed.get_global_rank(group, (parts.rank + by) % size) for by in (-1, 1))
    operations = [distributed.P2POp(distributed.isend, one, before, group) for one in sent]
    operations += [distributed.P2POp(distributed.irecv, one, after, group) for one in received]
    return coming, distributed.batch_isend_irecv(operations)


def _padded(own: Tensor | None, longest: int) -> Tensor | None:
    if own is None:
        return None
    if own.shape[1] < longest:
        own = torch.cat((own, own.new_zeros(own.shape[0], longest - own.shape[1], *own.shape[2:])), 1)
    return own.contiguous()


def _reach(rank: int, size: int, once: bool) -> int:
    """How many of the ranks after it a rank meets: all, or so many that each two ranks meet `once`."""
    return (size - 1) // 2 + (size % 2 == 0 and rank < size // 2) if once else size - 1
