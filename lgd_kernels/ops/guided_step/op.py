"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.guided_step` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels import impls
from lgd_kernels.arguments import join_omega, same_stride, split_number, split_omega, split_seed
from lgd_kernels.levels import Levels, OmegaLookup, arithmetic_dtype, table_gradient
from lgd_kernels.ops.guided_step import reference

IMPLEMENTATIONS = {"triton": impls.FLOATS, "cpu": impls.ALL_FLOATS, "reference": impls.ALL_FLOATS}

_library = torch.library.Library("lgd", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_scalars = (
    "Tensor? omega, float omega_value, Tensor[] table, Tensor[] levels, str prediction, Tensor? churn, "
    "float churn_value"
)
_library.define(
    f"guided_step(Tensor x, Tensor cond, Tensor uncond, Tensor? noise, {_scalars}, Tensor? seed, SymInt? seed_value, "
    "SymInt first_sample, str? impl) -> Tensor",
    tags=_tags,
)
_library.define(
    f"guided_step_backward(Tensor upstream, Tensor? cond, Tensor? uncond, {_scalars}, ScalarType cond_dtype, "
    "ScalarType uncond_dtype, ScalarType noise_dtype, bool[] wanted, str? impl) "
    "-> (Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_omega)",
    tags=_tags,
)


def guided_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor,
    omega: float | Tensor | OmegaLookup,
    levels: Levels,
    prediction: str,
    churn: float | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    impl: str | None,
) -> Tensor:
    """The differentiable op."""
    if impls.through_reference("guided_step", impl):
        return reference.guided_step(x, cond, uncond, omega, levels, prediction, churn, noise, seed, first_sample)
    if isinstance(churn, (int, float)) and churn == 0:  # noise would be multiplied by 0
        noise, seed = noise if noise is not None and noise.requires_grad else None, None
    omega, omega_value, table = split_omega(omega, x)
    churn, churn_value = split_number(churn, x)
    levels = same_stride(levels)
    drawn = *split_seed(seed), first_sample
    trainable = x, cond, uncond, noise, omega, *table[:1]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trainable):
        numbers = omega_value, churn_value, prediction, *drawn, impl
        return _GuidedStep.apply(x, cond, uncond, noise, omega, table[0] if table else None, churn, *numbers,
                                 *levels, *table[1:])  # fmt: skip
    forward = _forward if impls.direct(x, cond, uncond, noise) else torch.ops.lgd.guided_step
    return forward(
        x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, *drawn, impl
    )


class _GuidedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cond, uncond, noise, omega, values, churn, omega_value, churn_value, prediction, seed,
                seed_value, first_sample, impl, *rest):  # fmt: skip
        levels, table = list(rest[:5]), [] if values is None else [values, *rest[5:]]
        to_omega = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.save_for_backward(*((cond, uncond) if to_omega else (None, None)), omega, churn, *levels, *table)
        dtypes = cond.dtype, uncond.dtype, x.dtype if noise is None else noise.dtype
        ctx.options = omega_value, churn_value, prediction, dtypes, [*ctx.needs_input_grad[:4], to_omega], impl
        run = _forward if impls.direct(x, cond, uncond, noise) else torch.ops.lgd.guided_step
        return run(
            x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
            seed_value, first_sample, impl,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, upstream):
        cond, uncond, omega, churn, *rest = ctx.saved_tensors
        levels, table = rest[:5], rest[5:]
        omega_value, churn_value, prediction, dtypes, wanted, impl = ctx.options
        if torch.is_grad_enabled():  # create_graph: a formula that autograd can go through again
            grads = reference.guided_step_backward(
                upstream, cond, uncond, join_omega(omega, omega_value, table), Levels(*levels), prediction,
                churn_value if churn is None else churn,
            )  # fmt: skip
        else:
            run = _backward if impls.direct(upstream) else torch.ops.lgd.guided_step_backward
            grads = run(
                upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value, *dtypes,
                wanted, impl,
            )  # fmt: skip
        dtypes = upstream.dtype, *dtypes
        to_data = [grad.to(dtype) if want else None for grad, dtype, want in zip(grads, dtypes, wanted, strict=False)]
        d_omega = d_values = None
        if wanted[4] and table:
            d_values = table_gradient(OmegaLookup(*table), grads[4])
        elif wanted[4]:
            d_omega = grads[4].to(omega.dtype)
        return *to_data, d_omega, d_values, *(None,) * (8 + len(rest) - bool(table))


def _forward(x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
             seed_value, first_sample, impl):  # fmt: skip
    data = [tensor for tensor in (x, cond, uncond, noise) if tensor is not None]
    impl = impls.choose("guided_step", impl, *data)
    if impl == "reference":
        return reference.guided_step(
            x, cond, uncond, join_omega(omega, omega_value, table), Levels(*levels), prediction,
            churn_value if churn is None else churn, noise, seed_value if seed is None else seed, first_sample,
        ).contiguous()  # fmt: skip
    x_s = x.new_empty(x.shape)
    if x_s.numel():
        impls.launcher("guided_step", impl).forward(
            x_s, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
            seed_value, first_sample,
        )  # fmt: skip
    return x_s


def _backward(upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value, cond_dtype,
              uncond_dtype, noise_dtype, wanted, impl):  # fmt: skip
    grads = _allocate(upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value,
                      cond_dtype, uncond_dtype, noise_dtype, wanted, impl)  # fmt: skip
    impl = impls.choose("guided_step", impl, upstream, *grads[:4])
    if impl == "reference" or not upstream.numel():
        found = reference.guided_step_backward(
            upstream, cond, uncond, join_omega(omega, omega_value, table), Levels(*levels), prediction,
            churn_value if churn is None else churn,
        )  # fmt: skip
        for grad, value, want in zip(grads, found, wanted, strict=True):
            if want:
                grad.copy_(value)
    else:
        outputs = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        impls.launcher("guided_step", impl).backward(
            *outputs, upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value
        )
    return grads


def _allocate(upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value, cond_dtype,
              uncond_dtype, noise_dtype, wanted, impl):  # fmt: skip
    """One tensor for each gradient, empty where it is not wanted."""
    shape, dtypes = upstream.shape, (upstream.dtype, cond_dtype, uncond_dtype, noise_dtype)
    to_data = [
        upstream.new_empty(shape if want else 0, dtype=dtype) for dtype, want in zip(dtypes, wanted, strict=False)
    ]
    d_omega = upstream.new_empty(shape[:1] if wanted[4] else 0, dtype=arithmetic_dtype(upstream, cond, uncond))
    return *to_data, d_omega


for _device in ("CPU", "CUDA"):
    _library.impl("guided_step", _forward, _device)
    _library.impl("guided_step_backward", _backward, _device)
torch.library.register_fake("lgd::guided_step", lambda x, *_: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("lgd::guided_step_backward", _allocate, lib=_library)
