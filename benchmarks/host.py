"""Measure what the host pays for a GPU call, without a GPU: `python -m benchmarks host`.

Triton's launchers run through Triton's own binder and its own C launch, on a libcuda that does nothing
(libcuda_stub.c); tensors of the CPU take the place of a GPU's. What is missing is what the driver itself takes, which
is the same for every kernel. Each time is compared, round by round, with the launch of a kernel of four parameters and
with the eager formula of the op on a few elements, where dispatch is all that costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.verify import with_leaves
from benchmarks.workload import Workload, complete, public, reference, rooms
from lgd_kernels.runtime import impls

STUB = Path(__file__).with_name("libcuda_stub.c")
SMALLEST = "a kernel of 4 parameters"


class Row(NamedTuple):
    """One call. Times are microseconds; every triple is median, 20th and 80th percentile of the rounds."""

    op: str
    call: str
    time: list[float]
    of_smallest: list[float]
    of_eager: list[float]


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Let Triton launch on the stub of libcuda, from tensors of the CPU, as on one GPU of sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", STUB, "-o", library], check=True
        )
        library.with_name("libcuda.so").symlink_to(library)
        cuda = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        here = {"TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": str(Path(folder, "cache"))}
        with mock.patch.dict(os.environ, here), contextlib.ExitStack() as patches:
            for patch in _patches():
                patches.enter_context(patch)
            yield
        if not ctypes.c_int.in_dll(cuda, "launches").value:
            raise RuntimeError("nothing was launched on the stub of libcuda")


def _patches() -> Iterator:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from lgd_kernels.runtime import triton_launch

    target, index = GPUTarget("cuda", 90, 32), functools.partial(int, 0)
    gpu = SimpleNamespace(
        utils=nvidia.CudaUtils(),
        launcher_cls=nvidia.CudaLauncher,
        get_current_target=lambda: target,
        get_current_device=index,
        get_current_stream=lambda device: 0,
        allocate_default_profile_scratch=lambda *_: None,
    )
    yield mock.patch.object(driver, "_active", gpu)
    # As much work as the question on a GPU: its index is asked for and compared with that of the current one.
    yield mock.patch.object(
        triton_launch, "_on_current_device", lambda tensor: tensor.is_cpu and tensor.get_device() + 1 == index()
    )
    yield mock.patch.dict(impls._unfit, triton=lambda device: ())
    yield mock.patch.object(impls, "_choose", functools.cache(impls._choose.__wrapped__))


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


def workloads() -> dict[str, Workload]:
    """Return the call of each op that is measured: `HOST` of `benchmarks/<op>.py`, on a few elements."""
    return {op: importlib.import_module(f"benchmarks.{op}").HOST for op in rooms()}


class Recorder:
    """Stands for a launcher module: calls it, and keeps each call."""

    def __init__(self, calls: list[Callable[[], object]], op: str) -> None:
        self.calls, self.module = calls, importlib.import_module(f"lgd_kernels.ops.{op}.triton")

    def __getattr__(self, name: str) -> Callable[..., object]:
        return functools.partial(self.record, getattr(self.module, name))

    def record(self, function: Callable[..., object], *given: object) -> object:
        self.calls.append(functools.partial(function, *given))
        return function(*given)


def launches(workload: Workload, arguments: dict) -> dict[str, Callable[[], object]]:
    """Return {"launcher, forward" or "..., backward": what calls Triton's launchers as the op did}."""
    forward, backward = [], []
    arguments, leaves = with_leaves(arguments, next(iter(workload.backward), ()))
    with mock.patch.object(impls, "launcher", lambda op, impl: Recorder(forward, op)):
        output = public(workload)(**arguments, impl="triton")
    if leaves:
        output = output[0] if isinstance(output, tuple) else output
        with mock.patch.object(impls, "launcher", lambda op, impl: Recorder(backward, op)):
            torch.autograd.grad(output, leaves, torch.ones_like(output))
    found = {"launcher, forward": forward, "launcher, backward": backward}
    return {name: functools.partial(_all, calls) for name, calls in found.items() if calls}


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def measure(rounds: int) -> Iterator[Row]:
    """Yield, for each op, its launchers and its whole public call without gradients."""
    floor = smallest()
    for op, workload in workloads().items():
        arguments = workload.arguments(torch.Generator().manual_seed(0))
        calls = launches(workload, arguments)
        calls["whole call"] = functools.partial(public(workload), **arguments, impl="triton")
        eager = functools.partial(reference(workload), **complete(workload, arguments))
        with torch.no_grad():
            samplers = {name: timing.wall(call, False) for name, call in {**calls, SMALLEST: floor, "": eager}.items()}
            samples = timing.alternate(samplers, rounds)
        for name in (*calls, ""):
            yield Row(
                op,
                name or "eager formula",
                timing.spread([1e6 * one for one in samples[name]]),
                timing.spread(timing.ratios(samples[name], samples[SMALLEST])),
                timing.spread(timing.ratios(samples[name], samples[""])),
            )


def main(rounds: int) -> int:
    """Print the table."""
    print(f"{'op':18} {'call':20} {'us':>22} {'of 4 parameters':>20} {'of the eager formula':>22}")
    with stubbed():
        for row in measure(rounds):
            time, smallest, eager = (
                f"{m:.{n}f} [{low:.{n}f}, {high:.{n}f}]" for n, (m, low, high) in zip((1, 2, 2), row[2:], strict=True)
            )
            print(f"{row.op:18} {row.call:20} {time:>22} {smallest:>20} {eager:>22}", flush=True)
    return 0
