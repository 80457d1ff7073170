"""What is done with a call of gpu_calls.py: run it, hold it to the error budget, count what Triton compiles for it.

`python -m benchmarks.gpu_checks` runs those of the CUDA kernels, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu_calls import MOST, Call, calls, implementations
from benchmarks.peers import Variant
from benchmarks.verify import Verifier, with_leaves
from benchmarks.workload import Kind, kinds, public
from lgd_kernels import testing

TOLERANCE = {4: 1e-5, 2: 2e-2}  # of gradients to particles, by bytes of an element, relative to the largest


def laid(value: object, layout: str, shape: tuple[int, ...]) -> object:
    """Return a tensor of this shape in the layout, and everything else as it is."""
    if layout == "contiguous" or not isinstance(value, Tensor) or tuple(value.shape) != shape:
        return value
    if layout == "offset":
        there = value.new_zeros(value.numel() + 3)[3:].view(shape)
    else:
        there = value.new_zeros((*shape[:-1], shape[-1] + 3))[..., : shape[-1]]
    return there.copy_(value)


def arguments(call: Call, device: str) -> dict:
    """Return a call's arguments on a device."""
    one = call.workload
    found = one.arguments(torch.Generator().manual_seed(20251001))
    return {name: laid(testing.moved(value, device), call.layout, one.shape) for name, value in found.items()}


def uses(call: Call, inputs: dict, impl: str) -> Iterable[tuple[Kind, Callable[[], object], list[Tensor]]]:
    """Yield each kind of use, the call, and the leaves that want a gradient."""
    for kind in kinds(call.workload):
        given, leaves = with_leaves(inputs, kind.wanted)
        yield kind, functools.partial(public(call.workload), **given, impl=impl), leaves


def check(call: Call, impl: str, device: str) -> None:
    """Hold each use of a call to the error budget; raise AssertionError where it is beyond it."""
    inputs = arguments(call, device)
    for kind, function, leaves in uses(call, inputs, impl):
        with torch.set_grad_enabled(bool(kind.wanted)):
            verified = Verifier(call.workload, kind, inputs)
            loose = set(kind.wanted) - call.workload.terms.keys() and call.workload.op == "guided_energy"
            tolerance = TOLERANCE[call.workload.dtype.itemsize] if loose and kind.part != "forward" else None
            variant = Variant(impl, lambda given: given, ours=True, tolerance=tolerance)
            verified(measure.bound(function, leaves, verified.upstream, kind), variant)


def run(call: Call, impl: str, device: str) -> None:
    """Run each use of a call."""
    for kind, function, leaves in uses(call, arguments(call, device), impl):
        with torch.set_grad_enabled(bool(kind.wanted)):
            output = function()
            output = output[0] if isinstance(output, tuple) else output
            if leaves:
                torch.autograd.grad(output, leaves, torch.ones_like(output))


def count(chosen: Iterable[Call]) -> dict[str, set[tuple[str, str]]]:
    """Return by op the specialisations, (kernel, key), that Triton would compile. Nothing is compiled or launched."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from benchmarks.stubs import tensors_on_a_gpu

    found: dict[str, set[tuple[str, str]]] = {}

    def compiles(*, key, fn, **others) -> bool:
        found.setdefault(fn.module.split(".")[2], set()).add((fn.name, str(key)))
        return True  # it is compiled already

    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: "counted",
        get_current_stream=lambda device: 0,
    )
    empty = mock.patch.object(testing, "_randn", lambda shape, dtype, generator: torch.empty(shape, dtype=dtype))
    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(knobs.runtime, "jit_cache_hook", compiles),
        tensors_on_a_gpu("triton"),
        empty,
    ):
        for call in chosen:
            run(call, "triton", "cpu")
    return found


def counted() -> str:
    """Return the table of specialisations by op."""
    found = {op: len(keys) for op, keys in count(calls()).items()}
    lines = [f"{op:18} {number:4}" for op, number in found.items()]
    return "\n".join([*lines, f"{'all':18} {sum(found.values()):4} of at most {MOST}"])


def main() -> int:
    """Run the calls whose op has CUDA kernels, once each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, in the simulator")
    options = parser.parse_args()
    if options.dry:
        from benchmarks import gpu_dry

        gpu_dry.simulate()
    device = "cpu" if options.dry else "cuda"
    chosen = [call for call in calls() if "cuda" in implementations(call.workload.op)]
    for call in chosen:
        run(call, "cuda", device)
    if not options.dry:
        torch.cuda.synchronize()
    print(f"{len(chosen)} calls were run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
