"""A rule, written down while it runs: what it does to numbers of a sample, as a list that C++ plays for each of them.

A rule is a few lines on tensors `[B]`. Run on those, each line costs a call of torch, which is longer than a kernel
takes to read a sample. So where nobody looks on (no gradient, no compiler), `rule_passes` runs it on `Noted` numbers,
which note what is done to them, and hands the notes to one kernel: moments, coefficients and combination of a sample
while it lies in the cache. A rule does not know. One that asks for something that is not noted here (a loop over a
comparison, a function of torch that is not in the list) raises `NotNoted`, and runs on tensors.
"""

from __future__ import annotations

import array
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = (
    "constant", "number", "add", "sub", "mul", "div", "pow", "eq", "ne", "gt", "ge", "lt", "le", "and", "or",
    "max", "min", "sqrt", "exp", "log", "abs", "neg", "where",
)  # fmt: skip
CODES = {name: code for code, name in enumerate(NAMES)}  # Op in csrc/common/tape.h
PLAIN = 12  # moments of c, u, D: nine products, row by row, and three sums
GIVEN, MOST = PLAIN + 9, 200  # places of these and of nine centred products; and of all values of a rule
_SAME = {"truediv": "div", "true_divide": "div", "divide": "div", "subtract": "sub", "multiply": "mul",
         "logical_and": "and", "logical_or": "or", "negative": "neg", "greater": "gt", "less": "lt"}  # fmt: skip


class NotNoted(Exception):
    """Something that only tensors can do."""


class Notes(NamedTuple):
    """As C++ takes them."""

    code: bytes  # of int32, four for each instruction
    constants: list[float]
    wanted: int  # a bit for each moment
    places: list[int]  # of the results


class Tape:
    """The notes: instructions of four integers, the constants, and the tensors `[B]` that they speak of."""

    def __init__(self, batch: int) -> None:
        self.batch, self.code, self.constants, self.numbers = batch, [], [], []
        self.kept, self.places, self.wanted = [], {}, 0  # wanted: a bit for each moment

    def moment(self, place: int) -> Noted:
        self.wanted |= 1 << place
        return Noted(self, place)

    def note(self, name: str, a: int, b: int = 0, c: int = 0) -> Noted:
        code = self.code
        code += CODES[name], a, b, c
        place = GIVEN - 1 + (len(code) >> 2)
        if place >= MOST:
            raise NotNoted("a rule of more steps than are noted")
        return Noted(self, place)

    def notes(self, places: list[int]) -> Notes:
        return Notes(array.array("i", self.code).tobytes(), self.constants, self.wanted, places)

    def take(self, value: Noted | Tensor | float) -> Noted:
        return Noted(self, self.place(value))

    def place(self, value: Noted | Tensor | float) -> int:
        """Where a value is among those of the tape, which takes it in if it is new."""
        if type(value) is Noted:
            return value.at
        if type(value) is float:  # most often
            self.constants.append(value)
            return self.note("constant", len(self.constants) - 1).at
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (int, float)):
            self.constants.append(float(value))
            return self.note("constant", len(self.constants) - 1).at
        if type(value) not in (Tensor, torch.nn.Parameter) or value.shape != (self.batch,):
            raise NotNoted(f"a {type(value).__name__} that is neither a number nor [B]")
        if value.requires_grad and torch.is_grad_enabled():
            raise NotNoted("a gradient")
        found = self.places.get(id(value))
        if found is None:
            self.kept.append(value)  # so that its id stays its own
            self.numbers.append(value if value.is_floating_point() else value.double())
            found = self.places[id(value)] = self.note("number", len(self.numbers) - 1).at
        return found


def _binary(name: str, turned: bool = False):
    def method(self, other):
        tape = self.tape
        place = other.at if type(other) is Noted else tape.place(other)
        return tape.note(name, place, self.at) if turned else tape.note(name, self.at, place)

    return method


class Noted:
    """A number of each sample, that is nowhere yet. It answers to what rules do with tensors `[B]`."""

    __slots__ = ("at", "tape")
    dtype, device, ndim, requires_grad = torch.float64, torch.device("cpu"), 1, False

    def __init__(self, tape: Tape, at: int) -> None:
        self.tape, self.at = tape, at

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.tape.batch,))

    __add__ = __radd__ = _binary("add")
    __mul__ = __rmul__ = _binary("mul")
    __sub__, __rsub__ = _binary("sub"), _binary("sub", turned=True)
    __truediv__, __rtruediv__ = _binary("div"), _binary("div", turned=True)
    __pow__, __rpow__ = _binary("pow"), _binary("pow", turned=True)
    __eq__, __ne__ = _binary("eq"), _binary("ne")
    __gt__, __ge__, __lt__, __le__ = (_binary(name) for name in ("gt", "ge", "lt", "le"))
    __and__ = __rand__ = _binary("and")
    __or__ = __ror__ = _binary("or")
    __hash__ = None

    def __neg__(self):
        return self.tape.note("neg", self.at)

    def __bool__(self):
        raise NotNoted("a decision in Python")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotNoted(name)

    def clamp(self, min=None, max=None):
        found = self
        if min is not None:
            found = found.tape.note("max", found.at, self.tape.place(min))
        return found if max is None else found.tape.note("min", found.at, self.tape.place(max))

    def sqrt(self):
        return self.tape.note("sqrt", self.at)

    def exp(self):
        return self.tape.note("exp", self.at)

    def log(self):
        return self.tape.note("log", self.at)

    def abs(self):
        return self.tape.note("abs", self.at)

    def square(self):
        return self * self

    def double(self):
        return self

    def to(self, other):
        if other not in (self.dtype, self.device):
            raise NotNoted(f"to {other}")
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """torch.sqrt(noted), torch.where(..., noted, 1.0), tensor * noted."""
        name = function.__name__.strip("_")
        name = _SAME.get(name, name)
        if name == "clamp":
            return args[0].clamp(*args[1:], **(kwargs or {}))
        if kwargs:
            raise NotNoted(f"{name} with {', '.join(kwargs)}")
        tape = next(one.tape for one in args if type(one) is cls)
        if name in ("zeros_like", "ones_like"):
            return cls(tape, tape.place(float(name == "ones_like")))
        if name == "full_like":
            return cls(tape, tape.place(args[1]))
        if name == "square":
            return args[0] * args[0]
        turned = name[0] == "r" and name[1:] in CODES
        if turned:
            name, args = name[1:], args[::-1]
        if name not in CODES or len(args) > 3 or name in ("max", "min"):
            raise NotNoted(name)
        return tape.note(name, *map(tape.place, args))
