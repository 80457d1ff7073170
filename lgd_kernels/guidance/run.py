"""Run a rule: read the moments that it uses, then compute one combination. `guided_score` and `guided_step` call this
module if they have a rule.

On the CPU, where the call is direct (`impls.direct`) and needs no gradient, all of it is one call of C++, which runs
the recorded program of the rule for each sample. Otherwise the rule runs on tensors `[B]`, between `moments` and
`combine`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.guidance import rule_checks, rules
from lgd_kernels.guidance.program import GuidedByRule, NotRecorded, Program, Recorded, Recorder
from lgd_kernels.guidance.rules import PairMoments, PerSample, Rule
from lgd_kernels.ops.combine.api import combine
from lgd_kernels.ops.guided_score.structs import GuidedScore
from lgd_kernels.ops.guided_step.structs import GuidedStep
from lgd_kernels.ops.moments.api import moments
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import ABSENT, Seed, requires_grad
from lgd_kernels.runtime.columns import Column, Columns, flat
from lgd_kernels.runtime.impls import Impl
from lgd_kernels.runtime.levels import (
    Levels,
    OmegaLookup,
    arithmetic_dtype,
    omega_at,
    step_coefficients,
    x0_coefficients,
)

_PROGRAMS: dict[Hashable, Program] = {}  # of rules in rules.py
_MOST_PROGRAMS = 100


class Predictions(NamedTuple):
    """Two tensors, and which columns of them are c, u and D."""

    tensors: tuple[Tensor, Tensor]
    u: Column = 1
    delta: Column = (0, 1)


class Sum(NamedTuple):
    """Columns of tensors to add up, and with a seed the noise to draw."""

    tensors: list[Tensor]
    columns: list[Column]
    predictions: int  # where they begin among the tensors
    seed: Seed


class Guided(NamedTuple):
    """A call with a rule. `factors(moments, omega, *given)` are the coefficients of every column, and then of noise."""

    factors: Callable[..., list[PerSample]]
    predictions: Predictions
    total: Sum
    omega: float | Tensor | OmegaLookup
    given: tuple[PerSample, ...]
    known: Hashable | None  # equal for calls whose programs are equal
    in_x0: GuidedStep | None  # the step, if the rule takes its moments in x0 space


def guided_score(a: GuidedScore, rule: Rule, impl: Impl | None) -> Tensor:
    """Compute `cond_weight c + delta_weight D`."""
    read = _predictions("guided_score", rule, a.cond, a.uncond, impl)

    def factors(m: PairMoments, w: Tensor) -> list[PerSample]:
        to_cond, to_delta, to_x = _weights("guided_score", rule, m, w)
        if isinstance(to_x, Tensor) or to_x != 0:
            raise ValueError("guided_score: `rule` reads x, which guided_score does not have; guided_step takes it")
        return [to_cond, to_delta]

    total = Sum(list(read.tensors), [0, read.delta], 0, ABSENT)
    return _run(Guided(factors, read, total, a.omega.given(), (), _known(rule), None), impl)


def guided_step(a: GuidedStep, rule: Rule, space: str, impl: Impl | None) -> Tensor:
    """Compute one guided step, by a rule in the space of the prediction or of x0."""
    omega, levels, prediction, churn = a.scalars.given()
    in_x0 = space == "x0" and prediction != "x0"
    if in_x0 and hasattr(rule, "difference"):
        raise ValueError('guided_step: `rule` keeps a difference of predictions, expected rule_space="prediction"')
    read = _predictions("guided_step", rule, a.cond, a.uncond, impl)
    tensors = [a.x, *read.tensors]
    columns: list[Column] = [0, 1, read.delta + 1 if isinstance(read.delta, int) else (1, 2)]
    if a.noise is not None:
        tensors, columns = [*tensors, a.noise], [*columns, len(tensors)]
    noisy = a.noise is not None or _draws(a.seed)

    def factors(m: PairMoments, w: Tensor, *given: Any) -> list[PerSample]:
        *of, amount = given
        if type(w) is not Recorded:
            data = arithmetic_dtype(a.x, a.cond, a.uncond, a.noise)
            wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=data))
            of = [level.to(wide) for level in of]
        at = Levels(*of)
        kept: PerSample = 1.0
        to_cond, to_delta, to_x = _weights("guided_step", rule, m, w)
        if in_x0:  # g = to_cond (alpha x + beta c) + to_delta beta D + to_x x
            alpha, kept = x0_coefficients(at, prediction)
            to_x = to_x + to_cond * alpha
        to_own, to_guided, to_noise = step_coefficients(at, "x0" if in_x0 else prediction, amount)
        found: list[PerSample] = [to_own + to_guided * to_x, to_guided * kept * to_cond, to_guided * kept * to_delta]
        return [*found, to_noise] if noisy else found

    known = _known(rule)
    known = known and (known, prediction, noisy)
    total = Sum(tensors, columns, 1, a.seed)
    return _run(Guided(factors, read, total, omega, (*levels, churn), known, a if in_x0 else None), impl)


def _draws(seed: Seed) -> bool:
    return seed.tensor is not None or seed.value is not None


def _predictions(op: str, rule: Rule, cond: Tensor, uncond: Tensor, impl: Impl | None) -> Predictions:
    if impl is not None:
        impls.named(op, impl)
    rule_checks.rule(op, rule)
    if hasattr(rule, "difference"):  # D as the rule computes it
        return Predictions((cond, rule.difference(cond, uncond, impl)), (0, 1), 1)
    return Predictions((cond, uncond))


def _weights(op: str, rule: Rule, m: PairMoments, omega: Tensor) -> tuple[PerSample, PerSample, PerSample]:
    found = rule(m, omega)
    if not isinstance(found, tuple) or not 2 <= len(found) <= 3:
        raise TypeError(f"{op}: `rule` returned a {type(found).__name__}, expected Guidance(cond, delta), see rules")
    return found if len(found) == 3 else (*found, 0.0)


def _known(rule: Rule) -> Hashable | None:
    """Return a key for a rule of rules.py whose parameters are numbers: its program is the same in every call."""
    if type(rule) is types.FunctionType and rule.__module__ == rules.__name__ and not rule.__closure__:
        return rule
    if type(rule) is not functools.partial or rule.args:
        return None
    parameters = [rule.func, *rule.keywords.values()]
    found = [one if type(one) in (float, int, bool) else _known(one) for one in parameters]
    return None if None in found else (*rule.keywords, *found)


def _run(g: Guided, impl: Impl | None) -> Tensor:
    like, omega = g.total.tensors[0], g.omega
    count = like.numel() // max(1, like.shape[0])
    as_read = isinstance(omega, (int, float)) or type(omega) is Tensor and omega.ndim == 1  # by the kernels
    w = omega if as_read else omega_at(omega, like.new_empty(0, dtype=arithmetic_dtype(like)))
    if g.in_x0 is None and count and like.device.type == "cpu" and impl in (None, "cpu"):
        found = _in_one_call(g, (w, *g.given), count, impl)
        if found is not None:
            return found

    def read(centred: bool) -> tuple[Tensor, Tensor]:
        tensors, u, delta = g.predictions
        if g.in_x0 is not None:
            return _x0_moments(g.in_x0, tensors, centred, impl)
        dots, rest = moments(tensors, columns=(0, u, delta), centred=centred, impl=impl)[:2]
        return _double(dots, rest)

    w = omega_at(w, like.new_empty(0, dtype=arithmetic_dtype(like)))
    factors = g.factors(PairMoments(read, count), w.expand(like.shape[0]) if w.ndim == 0 else w, *g.given)
    seed = g.total.seed
    drawn: dict[str, Any] = {}
    if _draws(seed):
        drawn = dict(noise_scale=factors.pop(), seed=seed.given(), first_sample=seed.first_sample)
    return combine(g.total.tensors, _stacked(factors, g.total), columns=g.total.columns, impl=impl, **drawn)


def _in_one_call(g: Guided, given: tuple, count: int, impl: Impl | None) -> Tensor | None:
    """Return None unless the call is direct, needs no gradient, and has a rule that can be recorded."""
    total, like = g.total, g.total.tensors[0]
    arguments = [one for one in given if isinstance(one, Tensor)]
    tensors = (*total.tensors, *arguments)
    if impls.transforms_active() or not impls.direct(*tensors, total.seed.tensor):
        return None
    if torch.is_grad_enabled() and requires_grad(*tensors):
        return None
    if impls.choose("combine", impl, like.device, like.dtype) != "cpu":
        return None
    try:
        program, numbers = _program(g, given, arguments, count)
    except Exception:  # of any kind: a rule that runs on tensors will raise it again
        return None
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if out.numel():
        read = Columns(total.tensors, _flat(tuple(total.columns)), None, 0)
        columns = _flat((0, g.predictions.u, g.predictions.delta))
        a = GuidedByRule(read, total.predictions, columns, program, numbers, total.seed)
        impls.extension().guided_by_rule(out, a, torch.get_num_threads())
    return out


def _program(g: Guided, given: tuple, arguments: list[Tensor], count: int) -> tuple[Program, list[Tensor]]:
    """Record the rule, and return the tensors `[B]` that its program reads.

    The program of a known rule is recorded once: it holds for other weights and other arguments."""
    weight, key = given[0], None
    if g.known is not None:
        kinds = [(one.ndim,) if isinstance(one, Tensor) else one for one in given[1:]]
        key = g.known, count, weight.ndim if isinstance(weight, Tensor) else None, *kinds
        program = _PROGRAMS.get(key)
        if program is not None:
            if not isinstance(weight, Tensor):
                program = program._replace(constants=[float(weight), *program.constants[1:]])
            return program, [_floating(one) for one in arguments]
    recorder = Recorder(g.total.tensors[0].shape[0])
    taken = [recorder.argument(weight)]
    taken += [recorder.argument(one) if isinstance(one, Tensor) else one for one in given[1:]]
    results = g.factors(RecordedMoments(recorder, count), *taken)
    program, numbers = recorder.program([recorder.place(one) for one in results]), recorder.tensors
    if not impls.direct(*numbers):
        raise NotRecorded("a tensor that a tracer or a subclass has to see")
    if key is not None and len(numbers) == len(arguments):
        if len(_PROGRAMS) >= _MOST_PROGRAMS:
            _PROGRAMS.clear()
        _PROGRAMS[key] = program
    return program, [_floating(one) for one in numbers]


def _floating(number: Tensor) -> Tensor:
    return number if number.is_floating_point() else number.double()


@functools.cache
def _flat(columns: tuple[Column, ...]) -> list[int]:
    return flat(columns, 0)


class RecordedMoments(PairMoments):
    """Moments that are not computed yet."""

    def __init__(self, recorder: Recorder, count: int) -> None:
        self.recorder, self.count = recorder, count

    def _at(self, place: int) -> Any:
        return self.recorder.moment(place)


def _x0_moments(
    a: GuidedStep, tensors: tuple[Tensor, Tensor], centred: bool, impl: Impl | None
) -> tuple[Tensor, Tensor]:
    """Compute moments of c and u in x0 space; D stays a scaled difference of predictions.

    Plain moments keep c and u in registers; for centred ones the three columns are written and read."""
    _, levels, prediction, _ = a.scalars.given()
    wide = arithmetic_dtype(levels.gap, levels.gap.new_empty(0, dtype=arithmetic_dtype(a.x, *tensors)))
    alpha, beta = x0_coefficients(Levels(*(level.to(wide) for level in levels)), prediction)
    none = torch.zeros_like(alpha)
    rows = (alpha, beta, none, none), (alpha, none, beta, none), (none, none, none, beta)
    factors = torch.stack([torch.stack(row, 1) for row in rows], 1)
    columns: tuple[Column, ...] = 0, 1, 2, (1, 2)
    if centred:
        formed = combine((a.x.to(wide), *tensors), factors, columns=columns, impl=impl)
        return moments(list(formed), centred=True, impl=impl)[:2]
    found = combine((a.x, *tensors), factors, columns=columns, moments=True, written=0, impl=impl)
    return _double(found.dots, found.sums)


def _double(dots: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return moments in float64, in which rules compute: a handful of numbers for each sample."""
    return (dots, sums) if dots.device.type == "mps" else (dots.double(), sums.double())


def _stacked(factors: Sequence[PerSample], total: Sum) -> Tensor:
    """Return coefficients `[B, K]`."""
    of = next((one for one in factors if isinstance(one, Tensor)), None)
    if of is None:
        of = total.tensors[0].new_ones(total.tensors[0].shape[0], dtype=arithmetic_dtype(*total.tensors))
    return torch.stack([one if isinstance(one, Tensor) else torch.full_like(of, one) for one in factors], 1)
