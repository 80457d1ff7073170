"""Timers, the copy that they are compared with, and peak memory. All times are seconds for one call."""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one sample

SAMPLE_SECONDS = 1e-2  # a sample lasts at least this long: its first call meets caches and threads as others left them
MANY = 2000  # calls in one sample at most
LEAST = 5  # rounds that a spread is worth something of
GRAPH_CALLS, HOST_CALLS = 200, 30  # the host's calls must not fill the queue of launches, some 1000


def timers(device: str) -> dict[str, Callable[[Call, bool], Sampler]]:
    """The first one is what bandwidths and ratios are of, unless they say otherwise."""
    return {"direct": events, "graph": graph, "host": host} if device == "cuda" else {"direct": wall}


def wall(call: Call, cold: bool, clock: Callable[[], int] = time.perf_counter_ns) -> Sampler:
    """Take the clock around repeated calls. On the CPU nothing is flushed: a large working set evicts itself."""
    repeats = _repeats(call, MANY)

    def sample():
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) * 1e-9 / repeats

    return sample


def events(call: Call, cold: bool) -> Sampler:
    """CUDA events around repeated calls, or, cold, around a single one after the L2 cache was overwritten. (While the
    GPU writes it the host runs ahead, so little of a cold sample is waiting for launches.)"""
    repeats = 1 if cold else _repeats(call, MANY)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample():
        if cold:
            _scratch().zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    return sample


def graph(call: Call, cold: bool) -> Sampler:
    """A CUDA graph of many calls, replayed: the GPU's work without the host's. It must run on a side stream."""
    repeats = _repeats(call, GRAPH_CALLS)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            call()
    replay = events(captured.replay, cold)
    return lambda: replay() / repeats


def host(call: Call, cold: bool) -> Sampler:
    """Return what a call costs the host, from many calls without a device sync between them."""
    for _ in range(3):
        call()

    def sample():
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(HOST_CALLS):
            call()
        seconds = (time.perf_counter_ns() - start) * 1e-9 / HOST_CALLS
        torch.cuda.synchronize()
        return seconds

    return sample


def alternate(samplers: dict[str, Sampler], rounds: int, seconds: float = math.inf) -> dict[str, list[float]]:
    """One sample of each in every round, so that a noisy machine hits all alike; in an order drawn for each round, so
    that none always finds the cache as the same other one left it. After `seconds` no round begins but the first 5."""
    names, samples = list(samplers), {name: [] for name in samplers}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= LEAST and time.perf_counter() - start > seconds:
                break
            for name in order.sample(names, len(names)):
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Formed round by round: what slows a whole round down cancels."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def spread(values: list[float]) -> list[float]:
    """Median, 20th and 80th percentile."""
    return [float(value) for value in numpy.percentile(values, (50, 20, 80))]


def copy(moved: int, dtype: torch.dtype, device: str) -> Call:
    """`copy_` between two tensors that are there already and together have as many bytes: the ceiling."""
    source = torch.randn(max(1, moved // 2 // dtype.itemsize), device=device).to(dtype)
    return functools.partial(torch.empty_like(source).copy_, source)


def product(flops: int, dtype: torch.dtype, device: str) -> tuple[Call, float]:
    """A square matrix product of about as many flops, the ceiling of arithmetic, and what to multiply its time by: from
    2^31 flops on it is one of 2^31."""
    side = max(1, round((min(flops, 2**31) / 2) ** (1 / 3)))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return functools.partial(torch.mm, left, right, out=torch.empty_like(left)), flops / (2 * side**3)


def is_cold(working_set: int, device: str) -> bool:
    """More than half of the GPU's L2: its samples start from memory. On the CPU that is left to the sizes."""
    return device == "cuda" and working_set > cache_bytes(device) // 2


@functools.cache
def cache_bytes(device: str) -> int:
    """Return the size of the last level of cache, or 0 if it is not known."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=0)


def peak_memory(call: Call, device: str) -> int | None:
    """The most bytes that torch's allocator held at a time during one call, beyond those that were there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        kept = call()
    try:
        recorded = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    except AttributeError:  # private names: a torch without them leaves the column empty
        return None
    del kept  # released after the profile, so it counts until the end
    held = peak = 0
    for event in sorted(recorded, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _repeats(call: Call, limit: int) -> int:
    """How many calls a sample takes; warms up on the way."""
    for _ in range(3):
        call()
    repeats = 1
    while repeats < limit:
        _wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        _wait()
        seconds = time.perf_counter() - start
        if seconds >= SAMPLE_SECONDS:
            break
        repeats = min(limit, max(2 * repeats, int(repeats * 1.1 * SAMPLE_SECONDS / seconds)) if seconds else limit)
    return repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@functools.cache
def _scratch() -> torch.Tensor:
    return torch.empty(2 * cache_bytes("cuda"), dtype=torch.uint8, device="cuda")
