"""Stand-ins for a GPU, so that a dry run of `make gpu` takes the same paths on a CPU. Its times are no measurement.

CUDA kernels run in the tests' simulator, and Triton's in its interpreter. Events read the clock of the host, a CUDA
graph captures nothing, and torch.compile returns the function that it was given.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.environment import ROOT
from benchmarks.workload import Workload

STAND_INS = [
    "CUDA kernels: compiled for the CPU, thread by thread",
    "Triton: its interpreter",
    "torch.compile: the function itself, eager",
    "CUDA events: the clock of the host; CUDA graphs: nothing",
    "build: of the simulated kernels",
    "compute-sanitizer: none, the script alone",
]
CACHE = 4096  # bytes of an L2 that tiny rows are larger than


def simulate() -> None:
    """Let impl="cuda" take CPU tensors."""
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("simulated").install()


def few(workloads: list[Workload]) -> list[Workload]:
    """Return the first workload of each op and, of guided_step, of each case."""
    first: dict[tuple[str, str], Workload] = {}
    for one in workloads:
        first.setdefault((one.op, one.case if one.op == "guided_step" else ""), one)
    return sorted(first.values(), key=workloads.index)


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    """Stands for torch.cuda.CUDAGraph: nothing is captured, so a replay does nothing."""

    def replay(self) -> None:
        time.sleep(1e-6)


@contextlib.contextmanager
def captured(graph: Graph, stream: object = None) -> Iterator[None]:
    """Stand for torch.cuda.graph."""
    yield


@contextlib.contextmanager
def stand_ins(cuda: bool) -> Iterator[None]:
    """Let benchmarks/timing.py time calls of the CPU as it does on a GPU."""
    if cuda:
        simulate()

    def on_a_gpu(function: Callable) -> Callable:
        return lambda *given: function(*given[:-1], "cuda")  # the device is the last argument

    with contextlib.ExitStack() as patches:
        for name in ("timers", "is_cold", "peak_memory"):
            patches.enter_context(mock.patch.object(timing, name, on_a_gpu(getattr(timing, name))))
        scratch = torch.empty(2 * CACHE, dtype=torch.uint8)
        nothing, zero = lambda *_: None, lambda *_: 0
        for owner, name, value in (
            (timing, "cache_bytes", lambda device: CACHE),
            (timing, "_scratch", lambda: scratch),
            (timing, "_repeats", lambda call, limit: 1),
            (timing, "HOST_CALLS", 2),
            (timing, "GRAPH_CALLS", 2),
            (torch.cuda, "Event", Event),
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", captured),
            (torch.cuda, "current_stream", nothing),
            (torch.cuda, "synchronize", nothing),
            (torch.cuda, "reset_peak_memory_stats", nothing),
            (torch.cuda, "memory_allocated", zero),
            (torch.cuda, "max_memory_allocated", zero),
            (torch, "compile", lambda function, **options: function),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield
