"""The error budget of the tests, held against every variant before it is timed."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from benchmarks.peers import Variant
from benchmarks.workload import Kind, Workload, complete, drawn, reference
from lgd_kernels import testing
from lgd_kernels.runtime.levels import OmegaLookup


def with_leaves(arguments: dict, wanted: tuple[str, ...]) -> tuple[dict, list[Tensor]]:
    """The arguments with new leaves of autograd among them, and these; of a table, its values."""
    arguments, leaves = dict(arguments), []
    for name in wanted:
        value = arguments[name]
        looked_up = isinstance(value, OmegaLookup)
        leaves.append((value.values if looked_up else value).detach().clone().requires_grad_())
        arguments[name] = value._replace(values=leaves[-1]) if looked_up else leaves[-1]
    return arguments, leaves


class Verifier:
    """Holds a call to the error budget of the tests: kernel, reference of the same dtype, float64 truth."""

    def __init__(self, workload: Workload, kind: Kind, inputs: dict) -> None:
        self.workload, self.kind, self.inputs = workload, kind, inputs
        self.seeded = inputs.get("seed") is not None
        output = reference(workload)(**complete(workload, inputs))
        output = output[0] if isinstance(output, tuple) else output
        upstream = testing.sample(output.shape, output.dtype, torch.Generator().manual_seed(1))
        self.upstream = upstream.to(output.device)
        self.terms = functools.cache(self.terms)
        self.same, self.truth = self.results(inputs, False), self.results(inputs, True)

    def __call__(self, call, variant: Variant) -> float | None:
        """The error against float64, relative to the largest value; AssertionError where it is beyond the budget."""
        if variant.noise == "torch" or (variant.noise and self.kind.part == "forward"):
            call()  # compiles, so that the draw below is the first one
            torch.manual_seed(0)
            found = call()
            torch.manual_seed(0)
            if variant.noise == "compiled":
                return self.is_normal(found)
            given = drawn(self.inputs)
            same, truth, slack = self.results(given, False), self.results(given, True), 0.0
        else:
            with testing.poisoned() if variant.ours else contextlib.nullcontext():
                found = call()
            same, truth = self.same, self.truth
            slack = 6.8e-6 if self.seeded else 0.0  # implementations agree on a normal to 1e-6 max(1, |z|), |z| < 6.8
        found = (found,) if isinstance(found, Tensor) else found
        names = self.kind.wanted if self.kind.part != "forward" else ("output",) * len(truth)
        errors = []
        for name, k, r, t in zip(names, found, same, truth, strict=True):
            if variant.tolerance is not None:
                self.within(variant.tolerance, name, k, t)
            elif name in self.workload.terms or k.shape != self.upstream.shape:
                # torch.cdist adds up a row in float32, one element after the other; its error is in the table
                testing.assert_sum(k, t, self.terms(name) * (1 if variant.ours else 64))
            else:
                testing.assert_elementwise(k, r, t, slack)
            errors.append(((k.double() - t).abs().max() / t.abs().max()).item())
        return max(errors)

    def within(self, tolerance: float, name: str, found: Tensor, truth: Tensor) -> None:
        """Of another library, or of what plugs into one: its own bound."""
        assert found.shape == truth.shape, f"shape {list(found.shape)}, expected {list(truth.shape)}"
        scale = self.terms(name) if name in self.workload.terms else truth.abs().max()
        off = ((found.double() - truth).abs() / scale).max().item()
        assert off <= tolerance, f"error {off:.3g}, allowed {tolerance:.3g} of what it is made of"

    def results(self, inputs: dict, wide: bool) -> tuple[Tensor, ...]:
        """The reference's output, or its gradients."""
        if wide:
            inputs = {name: testing.promoted(value) for name, value in inputs.items()}
        arguments, leaves = with_leaves(inputs, self.kind.wanted)
        output = reference(self.workload)(**complete(self.workload, arguments))
        if self.kind.part == "forward":
            outputs = output if isinstance(output, tuple) else (output,)
            return tuple(one.detach() for one in outputs)
        return torch.autograd.grad(output, leaves, self.upstream.to(output.dtype))

    def terms(self, name: str) -> Tensor:
        """sum |terms| of a sum, in float64. Unless the workload knows better, of a gradient through an elementwise op:
        each element of the output depends on one number only (or on a mean of a few, in a table)."""
        inputs = {key: testing.promoted(value) for key, value in self.inputs.items()}
        upstream = self.upstream.double()
        if name in self.workload.terms:
            return self.workload.terms[name](inputs, upstream)
        step = reference(self.workload)
        value = inputs[name]
        looked_up = isinstance(value, OmegaLookup)
        leaf = value.values if looked_up else value

        def of(leaf):
            changed = {name: value._replace(values=leaf) if looked_up else leaf}
            return step(**complete(self.workload, inputs | changed))

        _, slope = torch.func.jvp(of, (leaf,), (torch.ones_like(leaf),))
        leaf = leaf.detach().requires_grad_()
        terms = torch.autograd.grad(of(leaf), leaf, upstream.abs() * slope.sign())[0]
        return terms.sum() if looked_up else terms  # a cell's weight is a difference, which may cancel

    def is_normal(self, found: Tensor) -> None:
        """Check noise that cannot be drawn again: it has mean 0 and variance 1, and does not depend on the data."""
        zeros = torch.zeros_like(self.inputs["x"], dtype=torch.float64)
        quiet, loud = (self.results(self.inputs | {"seed": None, "noise": zeros + z}, True)[0] for z in (0, 1))
        z = ((found.double() - quiet) / (loud - quiet)).flatten()
        limit = 6 / z.numel() ** 0.5
        assert abs(z.mean()) < limit, f"its noise has mean {z.mean():.3g}, allowed {limit:.3g}"
        assert abs(z.var() - 1) < 2 * limit, f"its noise has variance {z.var():.4g}, allowed 1 +- {2 * limit:.3g}"
        for name in ("x", "cond", "uncond"):
            leaked = (z * self.inputs[name].double().flatten()).mean()
            assert abs(leaked) < limit, f"its noise correlates with {name}: {leaked:.3g}, allowed {limit:.3g}"
