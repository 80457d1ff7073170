"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

Where gradients are wanted they come from the pass that computes the value, for an upstream gradient of 1: the distances
are the cost, and are computed once. `torch.ops.lgd.energy_mmd` itself is not differentiable; the function below is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad
from lgd_kernels.runtime.levels import widest

IMPLEMENTATIONS = {"triton": impls.FLOATS, "cpu": impls.ALL_FLOATS, "reference": impls.ALL_FLOATS}

_library = torch.library.Library("lgd", "FRAGMENT")
_library.define(
    "energy_mmd(Tensor x, Tensor y, Tensor? x_weights, Tensor? y_weights, str kernel, float[] parameters, float lam, "
    "bool unbiased, bool target_term, str? precision, bool[] wanted, str? impl) "
    "-> (Tensor loss, Tensor d_x, Tensor d_y)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def energy_mmd(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    kernel: str,
    parameters: list[float],
    lam: float,
    unbiased: bool,
    target_term: bool,
    precision: str | None,
    impl: str | None,
) -> Tensor:
    """The differentiable op: x [B, n, D], y [B, k, D] -> [B]."""
    definition = x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term
    if impls.through_reference("energy_mmd", impl):
        return reference.energy_mmd(*definition)
    if torch.is_grad_enabled() and requires_grad(x, y):
        return _EnergyMmd.apply(*definition, precision, impl)
    return _run(*definition, precision, [False, False], impl)[0]


class _EnergyMmd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, x_weights, y_weights, *options):
        *definition, precision, impl = options
        wanted = list(ctx.needs_input_grad[:2])
        loss, d_x, d_y = _run(x, y, x_weights, y_weights, *definition, precision, wanted, impl)
        ctx.save_for_backward(x, y, x_weights, y_weights, d_x, d_y)
        ctx.definition, ctx.wanted = definition, wanted
        return loss

    @staticmethod
    def backward(ctx, upstream):
        x, y, x_weights, y_weights, *slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients that have gradients; views, since one tensor may be both arguments
            leaves = [one.view_as(one) for one in (x, y)]
            loss = reference.energy_mmd(*leaves, x_weights, y_weights, *ctx.definition)
            asked = [leaf for leaf, want in zip(leaves, ctx.wanted, strict=True) if want]
            found = iter(torch.autograd.grad(loss, asked, upstream, create_graph=True))
            grads = [next(found) if want else None for want in ctx.wanted]
        else:
            grads = [
                (upstream[:, None, None] * slope).to(one.dtype) if want else None
                for one, slope, want in zip((x, y), slopes, ctx.wanted, strict=True)
            ]
        return *grads, *(None,) * 9


def _run(x, y, x_weights, y_weights, *options):
    forward = _forward if impls.direct(x, y, x_weights, y_weights) else torch.ops.lgd.energy_mmd
    return forward(x, y, x_weights, y_weights, *options)


def _forward(x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term, precision, wanted, impl):
    options = kernel, parameters, lam, unbiased, target_term, precision, wanted, impl
    loss, *grads = unrounded(x, y, x_weights, y_weights, *options)
    return loss.to(widest(x.dtype, y.dtype), copy=True), *(x.new_empty(0) if grad is None else grad for grad in grads)


def unrounded(x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term, precision, wanted, impl):
    """(loss in float64, d_x, d_y), a gradient that is not wanted None: the operator, for sums that go on."""
    impl, dtype = impls.choose("energy_mmd", impl, x.device, x.dtype, y.dtype), widest(x.dtype, y.dtype)
    definition = x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term
    if impl == "reference" or not x.numel():
        grads = reference.energy_mmd_gradients(*definition) if any(wanted) else (None, None)
        kept = (grad.contiguous() if want else None for grad, want in zip(grads, wanted, strict=True))
        return reference.energy_mmd(*definition).double(), *kept
    definition = x, y, reference.scaled(x_weights), reference.scaled(y_weights), *definition[4:]
    loss = x.new_empty(x.shape[0], dtype=torch.float64)
    grads = [one.new_empty(one.shape, dtype=dtype) if want else None for one, want in zip((x, y), wanted, strict=True)]
    impls.launcher("energy_mmd", impl).forward(loss, *grads, *definition, precision)
    return loss, *grads


def _fake(x, y, x_weights, y_weights, kernel, parameters, lam, unbiased, target_term, precision, wanted, impl):
    dtype = widest(x.dtype, y.dtype)
    grads = (
        one.new_empty(one.shape, dtype=dtype) if want else x.new_empty(0)
        for one, want in zip((x, y), wanted, strict=True)
    )
    return x.new_empty(x.shape[0], dtype=dtype), *grads


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("energy_mmd", _forward, _device)
torch.library.register_fake("lgd::energy_mmd", _fake, lib=_library)
