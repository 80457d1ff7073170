"""Verify, then time: from a workload to the rows of the table."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import peers, timing
from benchmarks.peers import Variant
from benchmarks.verify import Verifier, with_leaves
from benchmarks.workload import Kind, Workload, kinds
from lgd_kernels import testing

FAILURES = ("WRONG", "FAILED")


def measure(
    workload: Workload, device: str, names: list[str], rounds: int, compiles: bool, seconds: float = math.inf
) -> Iterator[dict]:
    """A row for each kind of measurement; fewer rounds (5 at least) where they would take longer than `seconds`."""
    inputs = workload.arguments(torch.Generator().manual_seed(20251001))
    inputs = {name: testing.moved(value, device) for name, value in inputs.items()}
    variants = peers.ours(workload, device, names) + peers.baselines(workload, inputs, compiles)
    variants += peers.provided(workload)
    for wanted, group in itertools.groupby(kinds(workload), lambda kind: kind.wanted):
        torch.compiler.reset()  # so that a baseline has guards for this use only
        # the backward alone is timed on a graph that is kept, and then nothing may be donated
        with torch._functorch.config.patch(donated_buffer=False), torch.set_grad_enabled(bool(wanted)):
            arguments, leaves = with_leaves(inputs, wanted)
            here = [one for one in variants if one.same_work or not wanted]  # a bound is of the forward only
            functions = {one.name: prepared(one, arguments) for one in here}
            for kind in group:
                yield row(workload, kind, device, inputs, leaves, here, functions, rounds, seconds)


def prepared(variant: Variant, arguments: dict):
    """A call; or, where it cannot be made, one that says why."""
    if variant.why_not:
        return functools.partial(cannot, NotImplementedError(variant.why_not))
    try:
        return variant.bind(arguments)
    except Exception as error:
        return functools.partial(cannot, error)


def cannot(error: Exception):
    raise error


def row(workload, kind, device, inputs, leaves, variants, functions, rounds, seconds) -> dict:
    """Every variant of one kind of measurement: what is right is timed, what is not says so."""
    verified, found, calls = Verifier(workload, kind, inputs), [], {}
    for one in variants:
        result = {"name": one.name, "ours": one.ours, "same_work": one.same_work, "status": "ok", "message": ""}
        found.append(result)
        try:
            call = bound(functions[one.name], leaves, verified.upstream, kind)
            result["error"] = verified(call, one)
            result["memory"] = timing.peak_memory(call, device)
            calls[one.name] = call
        except AssertionError as error:
            result |= {"status": "WRONG", "message": str(error)}
        except Exception as error:  # a peer may lack what it needs; ours, where it says it runs, may not
            broken = one.ours and not one.why_not
            result |= {"status": "FAILED" if broken else "cannot run", "message": f"{error}".split("\n")[0]}
    cold = timing.is_cold(kind.bytes, device)
    about = {"op": workload.op, "case": workload.case, "shape": list(workload.shape),
             "dtype": str(workload.dtype).removeprefix("torch."), "kind": kind.name, "bytes": kind.bytes,
             "flops": workload.flops if kind.part == "forward" else 0, "cold": cold}  # fmt: skip
    ceilings = {"copy": timing.copy(kind.bytes, workload.dtype, device)}
    if about["flops"]:
        ceilings["product"], share = timing.product(about["flops"], workload.dtype, device)
    samples = timed(calls | ceilings, device, cold, rounds, seconds)
    if about["flops"]:
        about["product"] = {
            timer: [one * share for one in taken] if _taken(taken) else taken
            for timer, taken in samples.pop("product").items()
        }
    return about | compared(samples, found)


def timed(calls: dict, device: str, cold: bool, rounds: int, seconds: float) -> dict[str, dict]:
    """{name: {timer: samples, or a reason in words}}"""
    found = {name: {} for name in calls}
    for timer, make in timing.timers(device).items():
        samplers = {}
        for name, call in calls.items():
            try:
                samplers[name] = make(call, cold)
            except RuntimeError as error:
                if timer != "graph":  # not everything can be captured in one
                    raise
                found[name][timer] = f"{error}".split("\n")[0]
        for name, samples in timing.alternate(samplers, rounds, seconds).items():
            found[name][timer] = samples
    return found


def compared(samples: dict[str, dict], variants: list[dict]) -> dict:
    """Adds to each variant its samples, and in each round the copy's time and the best baseline's over its own."""
    copy, bests = samples.pop("copy"), {}
    for timer in copy:
        peers = [one["name"] for one in variants if one["same_work"] and not one["ours"] and one["name"] in samples]
        medians = {name: timing.spread(samples[name][timer])[0] for name in peers if _taken(samples[name][timer])}
        bests[timer] = min(medians, key=medians.get, default=None)
    for one in variants:
        mine = {timer: taken for timer, taken in samples.get(one["name"], {}).items() if _taken(taken)}
        one["samples"] = samples.get(one["name"], {})
        one["of_copy"] = {
            timer: timing.spread(timing.ratios(copy[timer], mine[timer])) for timer in mine if _taken(copy[timer])
        }
        one["ratio"] = {
            timer: timing.spread(timing.ratios(samples[bests[timer]][timer], mine[timer]))
            for timer in mine
            if bests[timer]
        }
    return {"copy": copy, "best": bests, "variants": variants}


def _taken(samples) -> bool:
    return isinstance(samples, list)


def bound(function, leaves: list[Tensor], upstream: Tensor, kind: Kind):
    """What is timed."""
    if kind.part == "forward":
        return function
    if kind.part == "both":
        return lambda: torch.autograd.grad(function(), leaves, upstream)
    torch.manual_seed(0)  # whoever draws noise, so that it can be drawn again
    output = function()
    return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True)
