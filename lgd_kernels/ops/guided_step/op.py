"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.guided_step` itself is not differentiable; the function below is, and it is what the api calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.guided_step import reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import (
    contiguous,
    empty_sums,
    join_omega,
    requires_grad,
    split_number,
    split_omega,
    split_seed,
    to_omega,
)
from lgd_kernels.runtime.levels import Levels, OmegaLookup, widest

IMPLEMENTATIONS = {
    "cuda": impls.FLOATS,
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

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
    if isinstance(churn, (int, float)) and churn == 0:  # noise would be multiplied by 0
        noise, seed = noise if noise is not None and noise.requires_grad else None, None
    if impls.through_reference("guided_step", impl):
        return reference.guided_step(x, cond, uncond, omega, levels, prediction, churn, noise, seed, first_sample)
    omega, omega_value, table = split_omega(omega, x)
    churn, churn_value = split_number(churn, x)
    seed, seed_value = split_seed(seed)
    scalars = omega, omega_value, table, list(levels), prediction, churn, churn_value
    if torch.is_grad_enabled() and requires_grad(x, cond, uncond, noise, omega, *table[:1]):
        numbers = omega_value, churn_value, prediction, seed, seed_value, first_sample, impl
        return _GuidedStep.apply(x, cond, uncond, noise, omega, table[0] if table else None, churn, *numbers,
                                 *levels, *table[1:])  # fmt: skip
    plain = impls.direct(x, cond, uncond, noise, omega, churn, seed, *levels, *table)
    forward = _forward if plain else torch.ops.lgd.guided_step
    return forward(x, cond, uncond, noise, *scalars, seed, seed_value, first_sample, impl)


class _GuidedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cond, uncond, noise, omega, values, churn, omega_value, churn_value, prediction, seed,
                seed_value, first_sample, impl, *rest):  # fmt: skip
        levels, table = list(rest[:5]), [] if values is None else [values, *rest[5:]]
        trains = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.save_for_backward(*((cond, uncond) if trains else (None, None)), omega, churn, *levels, *table)
        dtypes = cond.dtype, uncond.dtype, x.dtype if noise is None else noise.dtype
        ctx.options = omega_value, churn_value, prediction, dtypes, [*ctx.needs_input_grad[:4], trains], impl
        scalars = omega, omega_value, table, levels, prediction, churn, churn_value
        ctx.plain = impls.direct(x, cond, uncond, noise, omega, churn, seed, *levels, *table)
        forward = _forward if ctx.plain else torch.ops.lgd.guided_step
        return forward(x, cond, uncond, noise, *scalars, seed, seed_value, first_sample, impl)

    @staticmethod
    def backward(ctx, upstream):
        cond, uncond, omega, churn, *rest = ctx.saved_tensors
        levels, table = rest[:5], rest[5:]
        omega_value, churn_value, prediction, dtypes, wanted, impl = ctx.options
        scalars = omega, omega_value, table, levels, prediction, churn, churn_value
        arguments = upstream, cond, uncond, *scalars, *dtypes, wanted
        again = torch.is_grad_enabled() or impls.transforms_active() or impls.batched(upstream)
        if ctx.plain and not again and impls.direct(upstream):
            grads = _launch_backward(*arguments, impl)
        else:  # again: a formula that autograd and vmap can go through
            grads = _backward_reference(*arguments) if again else torch.ops.lgd.guided_step_backward(*arguments, impl)
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        by_omega = (None, grads[4]) if table else (grads[4], None)
        return *grads[:4], *by_omega, *(None,) * (13 + len(table[1:]))


def _forward(x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed,
             seed_value, first_sample, impl):  # fmt: skip
    noise_dtype = () if noise is None else (noise.dtype,)
    impl = impls.choose("guided_step", impl, x.device, x.dtype, cond.dtype, uncond.dtype, *noise_dtype)
    if impl == "reference":
        return reference.guided_step(
            x, cond, uncond, join_omega(omega, omega_value, table), Levels(*levels), prediction,
            churn_value if churn is None else churn, noise, seed_value if seed is None else seed, first_sample,
        )  # fmt: skip
    x_s = torch.empty_like(x, memory_format=torch.contiguous_format)  # half as long as new_empty
    if x_s.numel():
        impls.launcher("guided_step", impl).forward(
            x_s, x, cond, uncond, noise, omega, omega_value, contiguous(table), levels, prediction, churn,
            churn_value, seed, seed_value, first_sample,
        )  # fmt: skip
    return x_s


def _backward(*arguments):
    upstream, grads = arguments[0], _launch_backward(*arguments)
    return tuple(upstream.new_empty(0) if grad is None else grad for grad in grads)


def _launch_backward(upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value,
                     cond_dtype, uncond_dtype, noise_dtype, wanted, impl):  # fmt: skip
    """Gradients to x, cond, uncond, noise and omega (or the table); None where one is not wanted."""
    dtypes = upstream.dtype, cond_dtype, uncond_dtype, noise_dtype
    impl = impls.choose("guided_step", impl, upstream.device, *dtypes)
    scalars = omega, omega_value, table, levels, prediction, churn, churn_value
    if impl == "reference" or not upstream.numel():
        found = _backward_reference(upstream, cond, uncond, *scalars, *dtypes[1:], wanted)
        return [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    grads = [
        torch.empty_like(upstream, dtype=dtype, memory_format=torch.contiguous_format) if want else None
        for dtype, want in zip(dtypes, wanted, strict=False)
    ]
    grads.append(empty_sums(upstream, omega, widest(*dtypes)) if wanted[4] else None)
    impls.launcher("guided_step", impl).backward(
        *grads, upstream, cond, uncond, omega, omega_value, contiguous(table), levels, prediction, churn, churn_value
    )
    if wanted[4]:
        grads[4] = to_omega(grads[4], omega, table, impl)
    return grads


def _backward_reference(upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value,
                        cond_dtype, uncond_dtype, noise_dtype, wanted):  # fmt: skip
    dtypes = upstream.dtype, cond_dtype, uncond_dtype, noise_dtype
    *to_data, d_omega = reference.guided_step_backward(
        upstream.to(widest(*dtypes)), cond, uncond, join_omega(omega, omega_value, table), Levels(*levels), prediction,
        churn_value if churn is None else churn,
    )  # fmt: skip
    to_data = (grad.to(dtype).contiguous() for grad, dtype in zip(to_data, dtypes, strict=True))
    return *to_data, to_omega(d_omega, omega, table) if wanted[4] else None


def _fake_backward(upstream, cond, uncond, omega, omega_value, table, levels, prediction, churn, churn_value,
                   cond_dtype, uncond_dtype, noise_dtype, wanted, impl):  # fmt: skip
    """Shapes alone; the last gradient is that of omega, or of the table."""
    dtypes = upstream.dtype, cond_dtype, uncond_dtype, noise_dtype
    to_data = (
        upstream.new_empty(upstream.shape, dtype=dtype) if want else upstream.new_empty(0)
        for dtype, want in zip(dtypes, wanted, strict=False)
    )
    like = table[0] if table else omega
    return *to_data, upstream.new_empty(like.shape, dtype=like.dtype) if wanted[4] else upstream.new_empty(0)


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("guided_step", _forward, _device)
    _library.impl("guided_step_backward", _backward, _device)
torch.library.register_fake("lgd::guided_step", lambda x, *_: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("lgd::guided_step_backward", _fake_backward, lib=_library)
