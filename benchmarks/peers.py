"""What a kernel is compared with. A baseline is made for a workload and bound to its arguments."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workload import Workload, complete, drawn, public, reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import step_coefficients


class Variant(NamedTuple):
    """One way to do a workload: an implementation of ours, or a baseline."""

    name: str
    bind: Callable[[dict], Callable[[], Tensor]]  # arguments -> a call
    ours: bool = False
    same_work: bool = True  # may be the best baseline
    noise: str = ""  # whose it is, where a baseline draws: "torch" (randn, seeded) or "compiled" (the compiler's)
    why_not: str = ""
    tolerance: float | None = None  # its own, where the budget of the tests is too strict


def ours(workload: Workload, device: str, names: list[str]) -> list[Variant]:
    """The implementations asked for, or all that the op has for this device."""
    has = importlib.import_module(f"lgd_kernels.ops.{workload.op}.op").IMPLEMENTATIONS
    meant = [name for name in impls.ORDER[device] if name != "reference" and name in has]
    like = torch.empty(0, dtype=workload.dtype, device=device)
    return [
        Variant(
            name,
            lambda arguments, name=name: functools.partial(public(workload), **arguments, impl=name),
            ours=True,
            why_not="; ".join(impls.why_not(workload.op, name, like)),
        )
        for name in names or meant
    ]


def baselines(workload: Workload, arguments: dict, compiles: bool) -> list[Variant]:
    """The reference, eager and compiled. Where we draw noise they draw it as PyTorch does. Some ops have more."""
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    draws, found = arguments.get("seed") is not None, []

    for named, function in (workload.baselines or {"": reference(workload)}).items():
        found += _variants(workload, function, f" {named}".rstrip(), compiled, draws)
    if workload.op == "guided_step" and not draws and isinstance(arguments["omega"], Tensor):
        given = functools.partial(coefficients_given, compiled)
        found.append(Variant("compiled, coefficients given", given, same_work=False))
    return [one for one in found if compiles or not one.name.startswith("compiled")]


def provided(workload: Workload) -> list[Variant]:
    """Other libraries, and what of ours plugs into them."""
    return [
        Variant(name, one.bind, one.ours, why_not=one.why_not(), tolerance=one.tolerance)
        for name, one in workload.providers.items()
    ]


def _variants(workload, function, named, compiled, draws):
    def variant(name, wrap, draw="", noise=""):
        return Variant(name, lambda given: _bind(workload, function, given, wrap, draw), noise=noise)

    if not draws:
        return [variant(f"eager{named}", _same), variant(f"compiled{named}", compiled)]
    found = [
        variant(f"eager{named}, randn", _same, "outside", "torch"),
        variant(f"compiled{named}, eager randn", compiled, "outside", "torch"),
    ]
    if not workload.baselines:  # noise inside cannot be drawn again: it can be looked at where the output is a step's
        found.append(variant("compiled, randn inside", compiled, "inside", "compiled"))
    return found


def _same(function):
    return function


def _bind(workload, step, given, wrap, draw):
    """A function with its tensors as arguments, everything else as constants: what a compiler likes best."""
    arguments = complete(workload, drawn(given) if draw == "outside" else given)
    if draw == "inside":
        del arguments["seed"], arguments["noise"]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, (Tensor, tuple))}
    constants = {name: value for name, value in arguments.items() if name not in tensors}

    def inside(x, **others):
        return step(x, **others, **constants, noise=torch.randn_like(x), seed=None)

    def plain(**tensors):
        return step(**tensors, **constants)

    function = wrap(inside if draw == "inside" else plain)
    if draw != "outside":
        return functools.partial(function, **tensors)

    def outside():
        fresh = drawn(given)
        return function(**{name: fresh.get(name, value) for name, value in tensors.items()})

    return outside


def coefficients_given(wrap, arguments):
    """a, b, v `[B]` are ready: less work than ours, so a bound and not a baseline."""
    x, noise = arguments["x"], arguments.get("noise")
    wide = torch.promote_types(x.dtype, torch.float32)
    coefficients = step_coefficients(arguments["levels"], arguments["prediction"], arguments.get("churn", 0.0))
    a, b, v = (value.to(wide).view(-1, *(1,) * (x.ndim - 1)) for value in coefficients)

    def call(x, cond, uncond, omega, noise, a, b, v):
        c, u = cond.to(wide), uncond.to(wide)
        x_s = a * x.to(wide) + b * (c + omega.to(wide).view_as(a) * (c - u))
        return (x_s if noise is None else x_s + v * noise.to(wide)).to(x.dtype)

    return functools.partial(wrap(call), x, arguments["cond"], arguments["uncond"], arguments["omega"], noise, a, b, v)
