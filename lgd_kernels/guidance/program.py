"""The program of a rule: what it does to the numbers of a sample, recorded for C++ to run for each sample.

A rule is a few lines on tensors `[B]`. Each line costs a call of torch, which takes longer than a kernel takes to read
a sample. So where no tracer, gradient or dispatch mode is active, `run.py` calls the rule once on `Recorded` numbers,
whose operations a `Recorder` writes down, and one kernel computes moments, coefficients and combination of a sample
while the sample lies in the cache. An operation that cannot be recorded (a decision in Python, a function of torch that
is not in the list) raises `NotRecorded`, and the rule runs on tensors.
"""

from __future__ import annotations

import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.arguments import Seed
from lgd_kernels.runtime.columns import Columns

OPS = "constant number add sub mul div pow eq ne gt ge lt le and or max min sqrt exp log abs neg where".split()
CODES = {name: code for code, name in enumerate(OPS)}  # Op in csrc/common/program.h
PLAIN_MOMENTS = 12  # of c, u, D: nine products, row by row, and three sums
ALL_MOMENTS = PLAIN_MOMENTS + 9  # and nine centred products
MOST_VALUES = 200  # moments and results of instructions
SYNONYMS = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "logical_and": "and",
    "logical_or": "or",
    "negative": "neg",
    "greater": "gt",
    "less": "lt",
}


class NotRecorded(Exception):
    """An operation that only tensors can do."""


class Program(NamedTuple):
    """A recorded rule (`Program` in csrc/common/program.h)."""

    code: bytes  # of int32, four for each instruction
    constants: list[float]
    wanted: int  # a bit for each moment
    results: list[int]  # places of the coefficients among the values, and then of noise_scale if noise is drawn


class GuidedByRule(NamedTuple):
    """Arguments of `guided_by_rule` in python/rules.cpp."""

    read: Columns  # the columns to add up; the program computes their coefficients
    predictions: int  # the first of two predictions among the tensors
    moment_columns: list[int]  # c, u and D, of these two
    program: Program
    numbers: list[Tensor]  # [B] each, as many as the program reads
    seed: Seed


class Recorder:
    """Record a program: instructions of four integers, constants, and the tensors `[B]` that it reads."""

    def __init__(self, batch: int) -> None:
        self.batch, self.wanted = batch, 0
        self.code: list[int] = []
        self.constants: list[float] = []
        self.numbers: list[tuple[Tensor, int]] = []  # each with its place among the values

    def moment(self, place: int) -> Recorded:
        self.wanted |= 1 << place
        return Recorded(self, place)

    def record(self, name: str, a: int, b: int = 0, c: int = 0) -> Recorded:
        code = self.code
        code += CODES[name], a, b, c
        place = ALL_MOMENTS - 1 + (len(code) >> 2)
        if place >= MOST_VALUES:
            raise NotRecorded("more instructions than a program may have")
        return Recorded(self, place)

    @property
    def tensors(self) -> list[Tensor]:
        return [number for number, _ in self.numbers]

    def program(self, results: list[int]) -> Program:
        return Program(array.array("i", self.code).tobytes(), self.constants, self.wanted, results)

    def argument(self, value: Tensor | float) -> Recorded:
        """Record an argument of the call. It has a place of its own, even if it is the same tensor as another."""
        if isinstance(value, Tensor) and value.ndim:
            return self._number(value)
        return Recorded(self, self.place(value))

    def place(self, value: Recorded | Tensor | float) -> int:
        """Return the place of a value, which is recorded if it is new."""
        if type(value) is Recorded:
            return value.at
        if type(value) is float:  # most often
            return self._constant(value)
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (int, float)):
            return self._constant(float(value))
        for number, place in self.numbers:
            if number is value:
                return place
        return self._number(value).at

    def _constant(self, value: float) -> int:
        self.constants.append(value)
        return self.record("constant", len(self.constants) - 1).at

    def _number(self, value: Any) -> Recorded:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.shape != (self.batch,):
            raise NotRecorded(f"a {type(value).__name__} that is neither a number nor [B]")
        if value.requires_grad and torch.is_grad_enabled():
            raise NotRecorded("a gradient")
        found = self.record("number", len(self.numbers))
        self.numbers.append((value, found.at))
        return found


def _binary(name: str, turned: bool = False):
    def method(self, other):
        recorder = self.recorder
        place = other.at if type(other) is Recorded else recorder.place(other)
        return recorder.record(name, place, self.at) if turned else recorder.record(name, self.at, place)

    return method


class Recorded:
    """A number of each sample that is not computed yet. It has the operations of tensors `[B]` that rules use."""

    __slots__ = ("at", "recorder")  # its place among the values
    dtype, device, ndim, requires_grad = torch.float64, torch.device("cpu"), 1, False

    def __init__(self, recorder: Recorder, at: int) -> None:
        self.recorder, self.at = recorder, at

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.recorder.batch,))

    __add__ = __radd__ = _binary("add")
    __mul__ = __rmul__ = _binary("mul")
    __sub__, __rsub__ = _binary("sub"), _binary("sub", turned=True)
    __truediv__, __rtruediv__ = _binary("div"), _binary("div", turned=True)
    __pow__, __rpow__ = _binary("pow"), _binary("pow", turned=True)
    __eq__, __ne__ = _binary("eq"), _binary("ne")
    __gt__, __ge__, __lt__, __le__ = (_binary(name) for name in ("gt", "ge", "lt", "le"))
    __and__ = __rand__ = _binary("and")
    __or__ = __ror__ = _binary("or")
    __hash__ = None  # type: ignore[assignment]

    def __neg__(self):
        return self.recorder.record("neg", self.at)

    def __bool__(self):
        raise NotRecorded("a decision in Python")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotRecorded(name)

    def clamp(self, min=None, max=None):
        found = self
        if min is not None:
            found = found.recorder.record("max", found.at, self.recorder.place(min))
        return found if max is None else found.recorder.record("min", found.at, self.recorder.place(max))

    def sqrt(self):
        return self.recorder.record("sqrt", self.at)

    def exp(self):
        return self.recorder.record("exp", self.at)

    def log(self):
        return self.recorder.record("log", self.at)

    def abs(self):
        return self.recorder.record("abs", self.at)

    def square(self):
        return self * self

    def double(self):
        return self

    def to(self, other):
        if other not in (self.dtype, self.device):
            raise NotRecorded(f"to {other}")
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Record torch.sqrt(recorded), torch.where(..., recorded, 1.0), tensor * recorded."""
        name = function.__name__.strip("_")
        name = SYNONYMS.get(name, name)
        if name == "clamp":
            return args[0].clamp(*args[1:], **(kwargs or {}))
        if kwargs:
            raise NotRecorded(f"{name} with {', '.join(kwargs)}")
        recorder = next(one.recorder for one in args if type(one) is cls)
        if name in ("zeros_like", "ones_like"):
            return cls(recorder, recorder.place(float(name == "ones_like")))
        if name == "full_like":
            return cls(recorder, recorder.place(args[1]))
        if name == "square":
            return args[0] * args[0]
        turned = name[0] == "r" and name[1:] in CODES
        if turned:
            name, args = name[1:], args[::-1]
        if name not in CODES or len(args) > 3 or name in ("max", "min"):
            raise NotRecorded(name)
        return recorder.record(name, *map(recorder.place, args))
