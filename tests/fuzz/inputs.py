"""Describe arguments. A description prints as the expression that makes it, and `build` makes the argument anew."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules
from lgd_kernels.runtime.levels import Levels

LAYOUTS = (*testing.LAYOUTS, "transposed", "one element", "odd steps")
SOUND = ("requires_grad", "parameter", "subclass", "negated", "zeros", "inference")  # valid wherever plain tensors are
ODD = ("complex", "conjugate", "sparse", "meta", "integers", "bool", "0-dim", "one dimension more", "one sample more")
SPECIAL = ("nan", "inf", "-inf", "all zero", "constant", "huge", "tiny", "subnormal")


class Subclass(torch.Tensor):
    """A tensor whose type is not torch.Tensor."""


class Spec:
    """A description whose repr shows only the fields that differ from their defaults."""

    def __repr__(self) -> str:
        shown = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v, default in shown if v != default)})"


@dataclass(frozen=True, repr=False)
class T(Spec):
    """A tensor of normals."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    seed: int = 0
    positive: bool = False  # uniform in [low, high) instead of normal
    special: str = ""
    kind: str = ""  # of SOUND or ODD
    low: float = 0.0
    high: float = 1.0

    def build(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape, dtype = self.shape, getattr(torch, self.dtype)
        if self.kind == "one dimension more":
            shape = (*shape, 2)
        elif self.kind == "one sample more":
            shape = (shape[0] + 1, *shape[1:]) if shape else (2,)
        elif self.kind == "0-dim":
            shape = ()
        tensor = laid_out(shape, self.layout, lambda shape: self.values(shape, generator).to(dtype))
        return of_kind(tensor, self.kind)

    def values(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        draw = torch.rand if self.positive else torch.randn
        values = draw(shape, generator=generator, dtype=torch.float64)
        if self.positive:
            values = self.low + (self.high - self.low) * values
        if self.special in ("nan", "inf", "-inf") and values.numel():
            values.view(-1)[self.seed % values.numel()] = float(self.special)
        elif self.special == "all zero" or self.kind == "zeros":
            values.zero_()
        elif self.special == "constant":
            values.fill_(0.7)
        elif self.special in ("huge", "tiny", "subnormal"):
            values *= {"huge": 1e4, "tiny": 1e-6, "subnormal": 1e-41}[self.special]
        return values


def laid_out(shape: tuple[int, ...], layout: str, make) -> Tensor:
    """Return the result of `make(shape)` in this shape and memory layout; `make` is called once."""
    if not shape or 0 in shape or (layout == "channels_last" and len(shape) != 4):
        return make(shape)
    if layout == "sliced":
        return make((2 * shape[0], *shape[1:]))[::2]
    if layout == "strided":
        return make((*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "odd steps":
        return make((*shape[:-1], 3 * shape[-1] + 1))[..., 1::3]
    if layout == "odd stride":
        return make((*shape[:-1], shape[-1] + 3))[..., : shape[-1]]
    if layout == "expanded":
        return make((1, *shape[1:])).expand(shape)
    if layout == "one element":
        return make((1,) * len(shape)).expand(shape)
    if layout == "permuted":
        return make(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "transposed" and len(shape) > 1:
        return make((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if layout == "channels_last":
        return make(shape).contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return make((torch.Size(shape).numel() + 3,))[3:].view(shape)
    return make(shape)


def of_kind(tensor: Tensor, kind: str) -> Tensor:
    if kind in SOUND and tensor.dtype not in testing.DTYPES:
        return tensor
    if kind == "requires_grad":
        return tensor.requires_grad_()
    if kind == "parameter":
        return torch.nn.Parameter(tensor)
    if kind == "subclass":
        return tensor.as_subclass(Subclass)
    if kind == "negated":
        return torch._neg_view(-tensor)
    if kind == "zeros":
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    if kind == "inference":
        with torch.inference_mode():
            return tensor.clone(memory_format=torch.preserve_format)
    if kind in ("complex", "conjugate"):
        wide = torch.complex(tensor.float(), tensor.float())
        return wide.conj() if kind == "conjugate" else wide
    if kind == "sparse":
        return tensor.contiguous().to_sparse()
    if kind == "meta":
        return tensor.to("meta")
    if kind == "integers":
        return tensor.nan_to_num(0, 0, 0).clamp(-100, 100).long()
    return tensor > 0 if kind == "bool" else tensor


@dataclass(frozen=True, repr=False)
class Seeds(Spec):
    """int64 `[B]`, or 0-dim with shape ()."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    seed: int = 0
    high: int = 2**62

    def build(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return laid_out(self.shape, self.layout, lambda shape: torch.randint(0, self.high, shape, generator=generator))


SCHEDULES = {
    "flow": lgd.RectifiedFlow(),
    "cosine": lgd.VPCosine(),
    "linear": lgd.VPLinear.ddpm(),
    "edm": lgd.EDM(),
    "discrete": lgd.Discrete.ddpm(100),
}


@dataclass(frozen=True, repr=False)
class Steps(Spec):
    """Levels of a step for each sample. `ends`: the first starts at the noise, and the last ends at the data; `stays`:
    the first has s = t."""

    batch: int
    schedule: str = "flow"
    dtype: str = "float32"
    layout: str = "contiguous"
    seed: int = 0
    ends: bool = False
    stays: bool = False

    def build(self) -> Levels:
        schedule, generator = SCHEDULES[self.schedule], torch.Generator().manual_seed(self.seed)
        unit = torch.rand(2, self.batch, generator=generator, dtype=torch.float64)
        u, v = (0.02 + 0.96 * unit).sort(0, descending=True).values
        if self.ends and self.batch:
            u[0], v[-1] = 1.0, 0.0
        t, s = schedule.from_unit(u), schedule.from_unit(torch.minimum(v, u * 0.99))
        t = torch.maximum(t, s + 1) if self.schedule == "discrete" else t
        levels = Levels(*schedule.signal_noise(t), *schedule.signal_noise(s), schedule.gap(t, s))
        if self.stays and self.batch:
            for to, of in ((levels.signal_s, levels.signal_t), (levels.noise_s, levels.noise_t)):
                to[0] = of[0]
            levels.gap[0] = 0
        dtype = getattr(torch, self.dtype)
        return Levels(*(laid_out((self.batch,), self.layout, _repeated(one.to(dtype))) for one in levels))


def _repeated(values: Tensor):
    """Return a `make` of any shape, for layouts that use only some of its elements."""
    return lambda shape: values.repeat_interleave(shape[0] // max(1, len(values)) + 1)[: shape[0]]


@dataclass(frozen=True, repr=False)
class Lookup(Spec):
    """What `OmegaTable.at` returns."""

    batch: int
    sizes: tuple[int, int, int] = (2, 3, 4)
    dtype: str = "float32"
    knots: str = "float32"
    layout: str = "contiguous"
    seed: int = 0

    def build(self):
        generator = torch.Generator().manual_seed(self.seed)
        C, S, T_ = self.sizes
        table = Table(self.sizes, self.dtype, self.knots, self.layout, self.seed).build()
        t, s = torch.rand(2, self.batch, generator=generator).sort(0, descending=True).values.to(table.s_knots.dtype)
        return table.at(torch.randint(0, C, (self.batch,), generator=generator), s, t)


@dataclass(frozen=True, repr=False)
class Table(Spec):
    """An `OmegaTable`."""

    sizes: tuple[int, int, int] = (2, 3, 4)
    dtype: str = "float32"
    knots: str = "float32"
    layout: str = "contiguous"
    seed: int = 0

    def build(self):
        C, S, T_ = self.sizes
        knots = getattr(torch, self.knots)
        values = T((C, S, T_), self.dtype, self.layout, self.seed, positive=True).build()
        return lgd.OmegaTable(values, torch.linspace(0, 0.9, S, dtype=knots), torch.linspace(0.1, 1, T_, dtype=knots))


@dataclass(frozen=True, repr=False)
class Target(Spec):
    """Renoise, or Expected without particles."""

    x0: T
    particles: Any = None
    seed: Any = 0

    def build(self):
        if self.particles is None:
            return lgd.Expected(self.x0.build())
        return lgd.Renoise(self.x0.build(), build(self.particles), build(self.seed))


@dataclass(frozen=True, repr=False)
class Number(Spec):
    """A number that is no Python float: numpy's, a bool, a 0-dim tensor, ..."""

    kind: str
    value: Any = 1.0

    def build(self):
        return {
            "complex": complex, "numpy float32": np.float32, "numpy float64": np.float64, "numpy int64": np.int64,
            "numpy array": np.asarray, "0-dim": torch.tensor,
            "float64 0-dim": functools.partial(torch.tensor, dtype=torch.float64),
        }[self.kind](self.value)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Rule(Spec):
    """A rule of lgd_kernels.guidance.rules, with its parameters."""

    name: str
    rescaled: bool = False

    def build(self):
        known = {
            "rescale": functools.partial(rules.rescale, phi=0.7),
            "apg": functools.partial(rules.apg, eta=0.5, radius=3.0),
            "mambo_g": functools.partial(rules.mambo_g, alpha=0.8),
            "beta_cfg": functools.partial(rules.beta_cfg, progress=0.4),
        }
        rule = known.get(self.name) or getattr(rules, self.name)
        return functools.partial(rules.rescale, phi=0.5, rule=rule) if self.rescaled else rule


@dataclass(frozen=True, repr=False)
class Kernel(Spec):
    """A kernel of energy_mmd."""

    name: str
    args: tuple = ()

    def build(self):
        return getattr(lgd, self.name)(*self.args)


@dataclass(frozen=True, repr=False)
class Times(Spec):
    """Falling times of a run, `[N + 1]` or `[N + 1, B]`."""

    steps: int
    schedule: str = "flow"
    batch: int = 0
    dtype: str = "float32"
    zero: bool = True

    def build(self) -> Tensor:
        u = torch.linspace(0.98, 0.0 if self.zero else 0.02, self.steps + 1, dtype=torch.float64)
        if self.batch:
            u = u[:, None] * torch.linspace(0.9, 1, self.batch, dtype=torch.float64)
        times = SCHEDULES[self.schedule].from_unit(u)
        return times if self.schedule == "discrete" else times.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments, described."""

    function: str
    arguments: dict
    good: bool = True  # valid: it must not be refused
    around: str = ""  # the state around it: a key of checks.SURROUNDINGS

    def __repr__(self) -> str:
        rest = "" if self.good else ", good=False"
        rest += f", around={self.around!r}" if self.around else ""
        return f"Call({self.function!r}, {self.arguments!r}{rest})"

    def build(self) -> dict:
        return {name: build(value) for name, value in self.arguments.items()}


def build(value):
    if isinstance(value, Spec):
        return value.build()
    if isinstance(value, (list, tuple)):
        return type(value)(build(one) for one in value)
    return value
