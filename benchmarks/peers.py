"""What a kernel is compared with. A baseline is made for a workload and bound to its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workload import Workload, complete, public, reference
from lgd_kernels import impls
from lgd_kernels.levels import step_coefficients


class Variant(NamedTuple):
    """One way to do a workload: an implementation of ours, or a baseline."""

    name: str
    bind: Callable[[dict], Callable[[], Tensor]]  # arguments -> a call
    ours: bool = False
    same_work: bool = True  # may be the best baseline
    noise: str = ""  # whose it is, where a baseline draws: "torch" (randn, seeded) or "compiled" (the compiler's)
    why_not: str = ""


def ours(workload: Workload, device: str, names: list[str]) -> list[Variant]:
    """The implementations asked for, or all that are meant for this device."""
    meant = [name for name in impls.ORDER[device] if name != "reference"]
    like = torch.empty(0, dtype=workload.dtype, device=device)
    return [
        Variant(
            name,
            lambda arguments, name=name: functools.partial(public(workload.op), **arguments, impl=name),
            ours=True,
            why_not="; ".join(impls.why_not(workload.op, name, like)),
        )
        for name in names or meant
    ]


def baselines(workload: Workload, arguments: dict, compiles: bool) -> list[Variant]:
    """The reference, eager and compiled. Where we draw noise they draw it as PyTorch does. Some ops have more."""
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)

    def variant(name, wrap, draw="", noise=""):
        return Variant(name, lambda given: _bind(workload, given, wrap, draw), noise=noise)

    if arguments.get("seed") is None:
        found = [variant("eager", _same), variant("compiled", compiled)]
        if workload.op == "guided_step" and isinstance(arguments["omega"], Tensor):
            given = functools.partial(_coefficients_given, compiled)
            found.append(Variant("compiled, coefficients given", given, same_work=False))
    else:
        found = [
            variant("eager, randn", _same, "outside", "torch"),
            variant("compiled, eager randn", compiled, "outside", "torch"),
            variant("compiled, randn inside", compiled, "inside", "compiled"),
        ]
    return [one for one in found if compiles or not one.name.startswith("compiled")]


def _same(function):
    return function


def _bind(workload, arguments, wrap, draw):
    """The reference with its tensors as arguments, everything else as constants: what a compiler likes best."""
    step, arguments = reference(workload.op), complete(workload.op, arguments)
    if draw:
        del arguments["seed"], arguments["noise"]
        x = arguments["x"]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, (Tensor, tuple))}
    constants = {name: value for name, value in arguments.items() if name not in tensors}

    def inside(x, **others):
        return step(x, **others, **constants, noise=torch.randn_like(x), seed=None)

    def outside(noise, **others):
        return step(**others, **constants, noise=noise, seed=None)

    def plain(**tensors):
        return step(**tensors, **constants)

    if draw == "outside":
        function = wrap(outside)
        return lambda: function(torch.randn_like(x), **tensors)
    return functools.partial(wrap(inside if draw else plain), **tensors)


def _coefficients_given(wrap, arguments):
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
