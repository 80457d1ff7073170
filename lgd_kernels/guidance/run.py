"""Runs a rule: moments where it asks for them, then one combination. What `rule=` in guided_score and guided_step
comes to, and a floor above the rooms: it calls two of them, and they ask for it only where there is a rule.

On the CPU, where nobody looks on, all of it is one call of C++, which plays the rule to each sample (`tape`); otherwise
the rule runs on tensors `[B]`, between `moments` and `combine`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.guidance import rules
from lgd_kernels.guidance.program import Noted, Notes, NotNoted, Tape
from lgd_kernels.guidance.rules import Number, Pair, Rule
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.ops.moments.api import moments
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad, split_seed
from lgd_kernels.runtime.columns import Column, flat
from lgd_kernels.runtime.levels import (
    Levels,
    OmegaLookup,
    arithmetic_dtype,
    omega_at,
    step_coefficients,
    x0_coefficients,
)
from lgd_kernels.runtime.memory import with_contiguous_rows

_NOTES: dict[Hashable, Notes] = {}  # of rules that are known
_MOST_NOTES = 100


class _Predictions(NamedTuple):
    """Two tensors, and which columns of them are c, u and D."""

    tensors: tuple[Tensor, Tensor]
    u: Column = 1
    delta: Column = (0, 1)


class _Sum(NamedTuple):
    """What is added up: columns of tensors, and, with a seed, noise to be drawn."""

    tensors: list[Tensor]
    columns: list[Column]
    predictions: int  # where they begin among the tensors
    seed: int | Tensor | None = None
    first_sample: int = 0


def guided_score(cond: Tensor, uncond: Tensor, omega: float | Tensor | OmegaLookup, rule: Rule, impl: str | None):
    """`cond_weight c + delta_weight D`."""
    read = _predictions("guided_score", rule, cond, uncond, impl)

    def factors(m: Pair, w: Tensor) -> list[Number]:
        to_cond, to_delta, to_x = _weights("guided_score", rule, m, w)
        if isinstance(to_x, Tensor) or to_x != 0:
            raise ValueError("guided_score: `rule` reads x, which guided_score does not have; guided_step takes it")
        return [to_cond, to_delta]

    return _run(factors, read, _Sum(list(read.tensors), [0, read.delta], 0), cond, omega, (), impl, _known(rule))


def guided_step(x, cond, uncond, omega, levels, prediction, churn, noise, seed, first_sample, rule, space, impl):
    """One guided step, by a rule in the space of the prediction or of x0."""
    in_x0 = space == "x0" and prediction != "x0"
    if in_x0 and hasattr(rule, "difference"):
        raise ValueError('guided_step: `rule` keeps a difference of predictions, expected rule_space="prediction"')
    read = _predictions("guided_step", rule, cond, uncond, impl)
    quiet = isinstance(churn, (int, float)) and churn == 0
    tensors, columns = [x, *read.tensors], [0, 1, read.delta + 1 if isinstance(read.delta, int) else (1, 2)]
    if noise is not None and not (quiet and not noise.requires_grad):
        tensors, columns = [*tensors, noise], [*columns, len(tensors)]
    sum_of = _Sum(tensors, columns, 1, None if quiet else seed, first_sample)
    noisy = len(tensors) > 3 or sum_of.seed is not None

    def factors(m: Pair, w: Tensor, *given: Number) -> list[Number]:
        *of, amount = given
        if type(w) is not Noted:
            wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=arithmetic_dtype(x, cond, uncond, noise)))
            of = [level.to(wide) for level in of]
        at = Levels(*of)
        kept, to_cond, to_delta, to_x = (1.0, *_weights("guided_step", rule, m, w))
        if in_x0:  # g = to_cond (alpha x + beta c) + to_delta beta D + to_x x
            alpha, kept = x0_coefficients(at, prediction)
            to_x = to_x + to_cond * alpha
        a, b, v = step_coefficients(at, "x0" if in_x0 else prediction, amount)
        found = [a + b * to_x, b * kept * to_cond, b * kept * to_delta]
        return [*found, v] if noisy else found

    known = _known(rule)
    return _run(
        factors, read, sum_of, x, omega, (*levels, churn), impl, known and (known, prediction, noisy),
        (x, levels, prediction) if in_x0 else None,
    )  # fmt: skip


def _predictions(op: str, rule: Rule, cond: Tensor, uncond: Tensor, impl: str | None) -> _Predictions:
    if impl is not None:
        impls.named(op, impl)
    if not callable(rule):
        raise TypeError(f"{op}: `rule` is a {type(rule).__name__}, expected a function of (moments, omega), see rules")
    if hasattr(rule, "difference"):  # D by the rule's own account
        return _Predictions((cond, rule.difference(cond, uncond, impl)), (0, 1), 1)
    return _Predictions((cond, uncond))


def _weights(op: str, rule: Rule, m: Pair, omega: Tensor) -> tuple[Number, Number, Number]:
    found = rule(m, omega)
    if not isinstance(found, tuple) or not 2 <= len(found) <= 3:
        raise TypeError(f"{op}: `rule` returned a {type(found).__name__}, expected Guidance(cond, delta), see rules")
    return found if len(found) == 3 else (*found, 0.0)


def _known(rule: Rule) -> Hashable | None:
    """What tells a rule of `rules`, with numbers for parameters, from any other: its notes are the same every time."""
    if type(rule) is types.FunctionType and rule.__module__ == rules.__name__ and not rule.__closure__:
        return rule
    if type(rule) is not functools.partial or rule.args:
        return None
    parameters = [rule.func, *rule.keywords.values()]
    found = [one if type(one) in (float, int, bool) else _known(one) for one in parameters]
    return None if None in found else (*rule.keywords, *found)


def _run(factors: Callable, read: _Predictions, sum_of: _Sum, like: Tensor, omega, given, impl, known, step=None):
    """`factors(moments, omega, *given)`: a number, or one for each sample, of every column, and then of the noise."""
    count = like.numel() // max(1, like.shape[0])
    ready = isinstance(omega, (int, float)) or type(omega) is Tensor and omega.ndim == 1  # as the kernels take it
    w = omega if ready else omega_at(omega, like.new_empty(0, dtype=arithmetic_dtype(like)))
    if step is None and count and like.device.type == "cpu" and impl in (None, "cpu"):
        found = _in_one_call(factors, read, sum_of, like, (w, *given), count, impl, known)
        if found is not None:
            return found

    def sums(centred: bool):
        if step is None:
            return _wide(moments(read.tensors, columns=(0, read.u, read.delta), centred=centred, impl=impl)[:2])
        return _x0_moments(*step, *read.tensors, centred, impl)

    w = omega_at(w, like.new_empty(0, dtype=arithmetic_dtype(like)))
    found = factors(Pair(sums, count), w.expand(like.shape[0]) if w.ndim == 0 else w, *given)
    drawn = {} if sum_of.seed is None else {
        "noise_scale": found.pop(), "seed": sum_of.seed, "first_sample": sum_of.first_sample
    }  # fmt: skip
    return combine(sum_of.tensors, _stacked(found, sum_of, like), columns=sum_of.columns, impl=impl, **drawn)


def _in_one_call(factors, read, sum_of, like, given, count, impl, known) -> Tensor | None:
    """None where something looks on, or where the rule needs tensors."""
    own = [one for one in given if isinstance(one, Tensor)]
    seed, seed_value = split_seed(sum_of.seed)
    tensors = (*sum_of.tensors, *own)
    if impls.transforms_active() or not impls.direct(*tensors, seed):
        return None
    if torch.is_grad_enabled() and requires_grad(*tensors):
        return None
    if impls.choose("combine", impl, like.device, like.dtype) != "cpu":
        return None
    try:
        notes, numbers = _notes(factors, given, own, like.shape[0], count, known)
    except Exception:  # whatever it is, a rule that runs on tensors will show it
        return None
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if out.numel():
        columns = len(sum_of.columns)
        impls.extension().guided_by_rule(
            out, [with_contiguous_rows(one) for one in sum_of.tensors], sum_of.predictions,
            _flat((0, read.u, read.delta)), notes.wanted, notes.code, notes.constants, numbers,
            _flat(tuple(sum_of.columns)), notes.places[:columns], -1 if sum_of.seed is None else notes.places[columns],
            seed, seed_value, sum_of.first_sample, torch.get_num_threads(),
        )  # fmt: skip
    return out


def _notes(factors, given, own, batch, count, known) -> tuple[Notes, list[Tensor]]:
    """What the rule does, and the tensors `[B]` it speaks of. Notes of a rule that is known are taken once: they hold
    for other weights, and for other tensors as long as no two are one."""
    weight = given[0]
    if known and len(set(map(id, own))) == len(own):
        of_tensors = isinstance(weight, Tensor)
        kinds = [(one.ndim,) if isinstance(one, Tensor) else one for one in given[1:]]
        known = known, count, of_tensors, *kinds
        notes = _NOTES.get(known)
        if notes is not None:
            if not of_tensors:
                notes = notes._replace(constants=[float(weight), *notes.constants[1:]])
            return notes, [one if one.is_floating_point() else one.double() for one in own]
    else:
        known = None
    tape = Tape(batch)
    taken = [tape.take(weight), *(tape.take(one) if isinstance(one, Tensor) else one for one in given[1:])]
    notes = tape.notes([tape.place(one) for one in factors(_Noted(tape, count), *taken)])
    if not impls.direct(*tape.kept):
        raise NotNoted("a tensor that somebody looks at")
    if known and len(tape.kept) == len(own):
        if len(_NOTES) >= _MOST_NOTES:
            _NOTES.clear()
        _NOTES[known] = notes
    return notes, tape.numbers


@functools.cache
def _flat(columns: tuple[Column, ...]) -> list[int]:
    return flat(columns, 0)


class _Noted(Pair):
    """Moments that are nowhere yet."""

    def __init__(self, tape: Tape, count: int) -> None:
        self.tape, self.count = tape, count

    def _at(self, place: int) -> Noted:
        return self.tape.moment(place)


def _x0_moments(x, levels, prediction, cond, uncond, centred, impl):
    """Moments of c and u in x0 space; D stays a scaled difference of predictions. Plain moments keep c and u in
    registers; for centred ones the three tensors are written and read."""
    wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=arithmetic_dtype(x, cond, uncond)))
    alpha, beta = x0_coefficients(Levels(*(level.to(wide) for level in levels)), prediction)
    none = torch.zeros_like(alpha)
    rows = (alpha, beta, none, none), (alpha, none, beta, none), (none, none, none, beta)
    factors = torch.stack([torch.stack(row, 1) for row in rows], 1)
    columns = 0, 1, 2, (1, 2)
    if centred:
        formed = combine((x.to(wide), cond, uncond), factors, columns=columns, impl=impl)
        return moments(formed, centred=True, impl=impl)[:2]
    return _wide(combine((x, cond, uncond), factors, columns=columns, moments=True, written=0, impl=impl)[1:])


def _wide(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rules count in float64: a handful of numbers for each sample."""
    dots, sums = found
    return (dots, sums) if dots.device.type == "mps" else (dots.double(), sums.double())


def _stacked(factors: list[Number], sum_of: _Sum, like: Tensor) -> Tensor:
    """`[B, K]`"""
    of = next((one for one in factors if isinstance(one, Tensor)), None)
    of = like.new_ones(like.shape[0], dtype=arithmetic_dtype(*sum_of.tensors)) if of is None else of
    return torch.stack([one if isinstance(one, Tensor) else torch.full_like(of, one) for one in factors], 1)
