"""Samples that lie in several processes: each takes the pairs of its own with all, gathered, and values are added up.

A process sees n_own k + n_own n pairs of x: an equal share of the work where parts are equal. Where nobody wants the
gradient to a set, a pair of its samples is looked at in one of their two processes; else in both, for the gradient of
its own sample. So no gradient travels, and backward does not communicate.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from lgd_kernels import impls
from lgd_kernels.ops.energy_mmd import checks, pieces
from lgd_kernels.ops.energy_mmd.pieces import Form, Piece, Side
from lgd_kernels.progress import Report

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
    given = (x, y), (x_weights, y_weights)
    room = [pieces.room_for(one, other, pieces.wanted(one)) for one, other in ((x, y), (y, x))]
    own = [Side(one.detach(), weights, found) for one, weights, found in zip(*given, room, strict=True)]
    everyone = [
        Side(*(one if one is None else _gathered(one.detach(), counts, parts) for one in (points, weights)))
        for points, weights, counts in zip(*given, parts.counts, strict=True)
    ]
    share = 1 / (everyone[0].total() * everyone[1].total())
    todo = [Piece(own[0], everyone[1], share, share)]
    if room[1] is not None:
        todo.append(Piece(own[1], everyone[0], torch.zeros_like(share), share))
    for of in (0, 1) if target_term else (0,):
        if lam:
            share = -lam / 2 / everyone[of].pairs(unbiased)
            todo.append(Piece(own[of], None, share, share))
            once = not parts.wanted[of]  # one process of two looks at a pair, for both
            others = (everyone[of][rows] for rows in _others(parts.rank, parts.counts[of], once))
            todo += [Piece(own[of], some, (1 + once) * share, 2 * share) for some in others]
    loss = pieces.run(todo, Form(kernel, parameters, unbiased, precision, impl), report)
    every = [torch.empty_like(loss) for _ in parts.counts[0]]
    distributed.all_gather(every, loss, group=parts.group)
    return pieces.attached(x, y, sum(every), *room)  # in the order of ranks: the same bits in all processes


def _gathered(own: Tensor, counts: list[int], parts: Parts) -> Tensor:
    """`[B, n, ...]` of all ranks, in their order: parts are sent at the length of the longest."""
    longest = max(counts)
    if own.shape[1] < longest:
        own = torch.cat((own, own.new_zeros(own.shape[0], longest - own.shape[1], *own.shape[2:])), 1)
    every = own.new_empty(len(counts), *own.shape)
    distributed.all_gather(list(every), own.contiguous(), group=parts.group)
    if own.shape[0] == 1 and min(counts) == longest:
        return every.view(1, -1, *own.shape[2:])  # as they came
    return torch.cat([one[:, :count] for one, count in zip(every, counts, strict=True)], 1)


def _others(rank: int, counts: list[int], once: bool) -> list[slice]:
    """The samples of the ranks that this one meets, those after it, in at most two runs: all, or so many that each two
    ranks meet `once`."""
    size, ends = len(counts), [0, *accumulate(counts)]
    reach = (size - 1) // 2 + (size % 2 == 0 and rank < size // 2) if once else size - 1
    last = rank + 1 + reach
    return [slice(ends[rank + 1], ends[min(last, size)]), slice(0, ends[max(0, last - size)])]
