"""Measure what the host pays for a GPU call, without a GPU: `python -m benchmarks host`.

Launchers run as on a GPU up to the driver (stubs.py): Triton's binder and C launch on a libcuda that does nothing, and
the bindings of the CUDA kernels on launchers that do nothing. What is missing is the time of the driver. Each time is
compared, round by round, with Triton's launch of a kernel of four parameters, and with the eager formula of the op on a
few elements of the CPU, which is all dispatch. Times are CPU time of the thread.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import peers, stubs, timing
from benchmarks.verify import with_leaves
from benchmarks.workload import Workload, complete, public, reference
from lgd_kernels.runtime import impls

SMALLEST, EAGER = "kernel of 4 parameters", "eager formula"


class Row(NamedTuple):
    """One call. Times are microseconds; every triple is median, 20th and 80th percentile of the rounds."""

    op: str
    call: str
    time: list[float]
    of_smallest: list[float]
    of_eager: list[float]


def smallest() -> Callable[[], object]:
    """Launch a kernel of four parameters that copies 1024 elements."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)

    x, y = torch.zeros(1024), torch.zeros(1024)
    return lambda: copy[(1,)](x, y, 1024, BLOCK=1024)


def host_workload(op: str) -> Workload:
    """Return the call of an op that is measured: `HOST` of `benchmarks/<op>.py`, on a few elements."""
    return importlib.import_module(f"benchmarks.{op}").HOST


class Recorder:
    """Stands for the launcher modules of an implementation: calls them, and keeps each call."""

    def __init__(self, impl: str) -> None:
        self.impl, self.calls = impl, []

    def launcher(self, op: str, impl: str) -> SimpleNamespace:
        module = importlib.import_module(f"lgd_kernels.ops.{op}.{self.impl}")
        functions = {name: one for name, one in vars(module).items() if callable(one)}
        return SimpleNamespace(**{name: functools.partial(self.record, one) for name, one in functions.items()})

    def record(self, function: Callable[..., object], *given: object) -> object:
        self.calls.append(functools.partial(function, *given))
        return function(*given)

    def take(self) -> list[Callable[[], object]]:
        calls, self.calls = self.calls, []
        return calls


def launches(workload: Workload, impl: str) -> dict[str, Callable[[], object]]:
    """Return calls of the launchers, in the forward and in the backward, with the arguments that the op gave them."""
    recorder = Recorder(impl)
    arguments = workload.arguments(torch.Generator().manual_seed(0))
    arguments, leaves = with_leaves(arguments, next(iter(workload.backward), ()))
    with mock.patch.object(impls, "launcher", recorder.launcher):
        output = public(workload)(**arguments, impl=impl)
        found = {f"{impl}: launcher": recorder.take()}
        if leaves:
            output = output[0] if isinstance(output, tuple) else output
            torch.autograd.grad(output, leaves, torch.ones_like(output))
            found[f"{impl}: launcher, backward"] = recorder.take()
    return {name: functools.partial(_all, calls) for name, calls in found.items() if calls}


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def measure(op: str, implementations: tuple[str, ...], rounds: int) -> list[Row]:
    """Time an op's launchers, its whole public call without gradients, and the eager formula."""
    workload, calls = host_workload(op), {}
    arguments = workload.arguments(torch.Generator().manual_seed(0))
    for impl in implementations:
        calls |= launches(workload, impl)
        calls[f"{impl}: whole call"] = functools.partial(public(workload), **arguments, impl=impl)
    calls[EAGER] = functools.partial(reference(workload), **complete(workload, arguments))
    if op == "guided_step":  # coefficients from the levels are most of its formula
        calls["the same, coefficients given"] = peers.coefficients_given(lambda function: function, arguments)
    calls[SMALLEST] = smallest()
    with torch.no_grad():
        samples = timing.alternate(
            {name: timing.wall(call, False, time.thread_time_ns) for name, call in calls.items()}, rounds
        )
    return [
        Row(
            op,
            name,
            timing.spread([1e6 * one for one in samples[name]]),
            timing.spread(timing.ratios(samples[name], samples[SMALLEST])),
            timing.spread(timing.ratios(samples[name], samples[EAGER])),
        )
        for name in calls
    ]


def main(chosen: list[str], rounds: int) -> int:
    """Print the table, op by op. Compiling the stubs takes about a minute."""
    print(f"{'op':18} {'call':28} {'us':>20} {'of 4 parameters':>20} {'of the eager formula':>20}")
    with stubs.triton_launches(), stubs.cuda_launches():
        for op in chosen or impls.ops():
            has = importlib.import_module(f"lgd_kernels.ops.{op}.op").IMPLEMENTATIONS
            for row in measure(op, tuple(impl for impl in ("triton", "cuda") if impl in has), rounds):
                print(f"{op:18} {row.call:28} {' '.join(map(shown, row[2:]))}", flush=True)
    return 0


def shown(spread: list[float]) -> str:
    """Return median and percentiles in 20 columns."""
    digits = 1 if spread[0] >= 10 else 2
    median, low, high = (f"{one:.{digits}f}" for one in spread)
    return f"{f'{median} [{low}, {high}]':>20}"
