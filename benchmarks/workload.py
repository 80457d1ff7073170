"""What a workload declares, which measurements follow from it, and how workloads are found."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import lgd_kernels
from lgd_kernels.runtime import impls

COMPARED = ("steps", "energies", "rules")  # files with workloads that other libraries have too, beside those of the ops
SMALL = 2**20  # bytes moved: below it the call is the cost, not its memory


class Provider(NamedTuple):
    """Another library that does the same, or (`ours`) a part of this package that needs one."""

    package: str  # that is imported; where it is not installed, the row says so
    bind: Callable[[dict], Callable[[], Tensor]]  # arguments -> a call; imports the package
    # What it may be off by, where the budget of the tests is too strict: relative to the largest value, or to the sum
    # of |terms| of a result that declares its terms.
    tolerance: float | None = None
    ours: bool = False

    def why_not(self) -> str:
        found = importlib.util.find_spec(self.package)
        return "" if found else f"{self.package} is not installed (pip install {self.package})"


@dataclass(frozen=True)
class Workload:
    """One call, and what it costs at least. Nothing about how it is timed or judged."""

    op: str  # the public function and the reference have its name
    case: str  # what it is called in the table
    shape: tuple[int, ...]
    dtype: torch.dtype
    arguments: Callable[[torch.Generator], dict]  # keyword arguments of the public function, on the CPU
    bytes: int  # read and written by the forward
    backward: Mapping[tuple[str, ...], int] = field(default_factory=dict)  # {gradients wanted: bytes of the backward}
    flops: int = 0  # of the forward, where they matter
    quick: bool = False  # part of --quick
    devices: tuple[str, ...] = ("cpu", "cuda")
    # For results that are sums, "output" or the name of a gradient: what to measure their error against, the sum of
    # |terms| in float64, from (float64 arguments, float64 upstream). Gradients to omega of an elementwise op need none.
    terms: Mapping[str, Callable[[dict, Tensor], Tensor]] = field(default_factory=dict)
    # What it is compared with, instead of the reference, by name: functions with the reference's arguments.
    baselines: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    # And with these, by name; `python -m benchmarks --peers`.
    providers: Mapping[str, Provider] = field(default_factory=dict)
    seconds: float = math.inf  # of a row's rounds, where calls are long: then 5 have to do
    parts: tuple[str, ...] = ("forward", "backward", "both")  # what is timed; "recording" is a part of "backward"
    # The specification as a function of the public arguments; otherwise the public function with impl="reference".
    formula: Callable[..., Tensor] | None = None
    # (what is timed, its specification) instead of the op's public function and reference
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None


class Kind(NamedTuple):
    """One thing to time of a workload."""

    name: str
    part: str  # "forward", "backward" or "both"
    wanted: tuple[str, ...]  # what requires a gradient
    bytes: int


def kinds(workload: Workload) -> list[Kind]:
    """Inference; then, for each set of gradients, recording (small calls), the backward alone, and both."""
    found = [Kind("forward", "forward", (), workload.bytes)]
    for number, (wanted, moved) in enumerate(workload.backward.items()):
        to = f"backward to {', '.join(wanted)}"
        if workload.bytes < SMALL and number == 0:
            found.append(Kind("forward, recording", "forward", wanted, workload.bytes))
        found.append(Kind(to, "backward", wanted, moved))
        if number == 0:
            found.append(Kind(f"forward + {to}", "both", wanted, workload.bytes + moved))
    return [
        kind for kind in found if (kind.part if not kind.name.endswith("recording") else "backward") in workload.parts
    ]


def ops() -> list[str]:
    """The ops that have workloads: `benchmarks/<op>.py` with a list `WORKLOADS`."""
    return [op for op in impls.ops() if importlib.util.find_spec(f"benchmarks.{op}")]


def find(names: list[str], device: str, dtypes: list[str], quick: bool, peers: bool = False) -> list[Workload]:
    """The workloads of some files that belong on a device. If none is named, those of all ops; beside peers, those
    that other libraries have too, and the short ones of the ops that are not among them."""
    found = [workload for name in names or (COMPARED if peers else ops()) for workload in _declared(name)]
    if peers and not names:
        found = [one for one in found if one.providers]
        known = {one.op for one in found}
        found += [one for op in ops() for one in _declared(op) if one.quick and one.op not in known]
    return [
        workload
        for workload in found
        if device in workload.devices
        and (not dtypes or str(workload.dtype).removeprefix("torch.") in dtypes)
        and (workload.quick or not quick)
    ]


def _declared(name: str) -> list[Workload]:
    return importlib.import_module(f"benchmarks.{name}").WORKLOADS


def public(workload: Workload) -> Callable[..., Tensor]:
    return workload.functions[0] if workload.functions else getattr(lgd_kernels, workload.op)


def reference(workload: Workload) -> Callable[..., Tensor]:
    """Return the specification, which takes every argument of the public function but `impl`."""
    if workload.functions:
        return workload.functions[1]
    return workload.formula or functools.partial(public(workload), impl="reference")


def complete(workload: Workload, arguments: dict) -> dict:
    """The arguments with the public function's defaults, as its reference wants them."""
    ours = ("impl", "rule", "rule_space")  # what a reference does not know of
    parameters = inspect.signature(public(workload)).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty and one.name not in ours}
    arguments = defaults | arguments
    if arguments.get("churn", 0.0) is None:
        arguments["churn"] = 0.0
    if "target" in arguments:
        arguments["target"] = with_noise(arguments["target"], arguments["levels"])
    return arguments


def drawn(arguments: dict) -> dict:
    """The arguments with noise from PyTorch where we draw from seeds: x's, and, in the place of their seed, that of
    targets."""
    x, target = arguments["x"], arguments.get("target")
    arguments = arguments | {"seed": None, "noise": torch.randn_like(x)}
    if isinstance(target, lgd_kernels.Renoise):
        shape = (target.x0.shape[0], target.particles, *target.x0.shape[1:])
        noise = torch.randn(shape, dtype=target.x0.dtype, device=target.x0.device)
        arguments["target"] = target._replace(seed=noise)
    return arguments


def with_noise(target, levels):
    """Targets of which the noise is given, as a tensor."""
    if not (isinstance(target, lgd_kernels.Renoise) and isinstance(target.seed, Tensor)):
        return target
    signal, noise = (level.view(-1, *(1,) * target.x0.ndim) for level in (levels.signal_s, levels.noise_s))
    return signal * target.x0[:, None] + noise * target.seed
