"""The operator: its schema, allocation, the choice of implementation, and its place in autograd.

`torch.ops.lgd.combine` itself is not differentiable; the function below is, and it is what the api calls. Its backward
needs no kernel: to the tensors it is a combine, to all that is per sample moments (called by the operator's name).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.combine import reference
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad, split_seed
from lgd_kernels.runtime.columns import triangle
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.philox import STREAM_STEP, philox_normal

IMPLEMENTATIONS = {
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}

_library = torch.library.Library("lgd", "FRAGMENT")
_library.define(
    "combine(Tensor[] tensors, Tensor coefficients, int[] columns, Tensor? constant, Tensor? noise_scale, "
    "Tensor? seed, SymInt? seed_value, SymInt first_sample, Tensor? source, float low, float high, ScalarType dtype, "
    "str? impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "combine_moments(Tensor[] tensors, Tensor coefficients, int[] columns, Tensor? constant, Tensor? noise_scale, "
    "Tensor? seed, SymInt? seed_value, SymInt first_sample, Tensor? source, float low, float high, int written, "
    "ScalarType dtype, str? impl, bool wide=False) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def combine(
    tensors: list[Tensor],
    coefficients: Tensor,
    columns: list[int],
    constant: Tensor | None,
    noise_scale: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int,
    source: Tensor | None,
    low: float,
    high: float,
    impl: str | None,
    written: int | None = None,
    wide: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The differentiable op: `[P, B', ...]` from coefficients `[B', P, K]`; with a number of outputs to be `written`
    those alone, and the moments `[B', M]` of all, which `wide` takes in float64 for every dtype."""
    scalars = columns, constant, noise_scale
    rest = first_sample, source, low, high, *(() if written is None else (written,)), tensors[0].dtype
    as_wide = () if written is None else (wide,)
    if impls.through_reference("combine", impl):
        function = reference.combine if written is None else reference.combine_moments
        return function(tensors, coefficients, *scalars, seed, *rest, *as_wide)
    seed, seed_value = split_seed(seed)
    if torch.is_grad_enabled() and requires_grad(*tensors, coefficients, constant, noise_scale):
        return _Combine.apply(
            coefficients,
            *scalars,
            seed,
            seed_value,
            first_sample,
            source,
            low,
            high,
            written,
            wide,
            impl,
            *tensors,
        )
    plain = impls.direct(*tensors, coefficients, constant, noise_scale, seed, source)
    return _raw(plain, written)(tensors, coefficients, *scalars, seed, seed_value, *rest, impl, *as_wide)


def combined(tensors: list[Tensor], coefficients: Tensor, columns: list[int], impl: str | None) -> Tensor:
    """`combine` of these alone, for a caller who knows that nothing looks on (`impls.direct`) and no transform does."""
    if impl == "reference" or (torch.is_grad_enabled() and requires_grad(*tensors, coefficients)):
        return combine(tensors, coefficients, columns, None, None, None, 0, None, -torch.inf, torch.inf, impl)
    dtype = tensors[0].dtype
    return _forward(tensors, coefficients, columns, None, None, None, None, 0, None, -torch.inf, torch.inf, dtype, impl)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low, high,
                written, wide, impl, *tensors):  # fmt: skip
        plain = impls.direct(*tensors, coefficients, constant, noise_scale, seed, source)
        ctx.save_for_backward(coefficients, constant, noise_scale, seed, source, *tensors)
        ctx.options = columns, seed_value, first_sample, low, high, impl
        ctx.written, ctx.wide = written, wide
        return _raw(plain, written)(
            list(tensors), coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low,
            high, *(() if written is None else (written,)), tensors[0].dtype, impl,
            *(() if written is None else (wide,)),
        )  # fmt: skip

    @staticmethod
    def backward(ctx, upstream, to_moments=None):
        coefficients, constant, noise_scale, seed, source, *tensors = ctx.saved_tensors
        columns, seed_value, first_sample, low, high, impl = ctx.options
        if to_moments is not None:
            upstream = _to_outputs(ctx, upstream, to_moments)
        elif low > -torch.inf or high < torch.inf:  # what the clamp saw, before it and before rounding
            with torch.no_grad():
                seen = torch.ops.lgd.combine(
                    list(tensors), coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source,
                    -torch.inf, torch.inf, arithmetic_dtype(*tensors), impl,
                )  # fmt: skip
            upstream = torch.where((seen >= low) & (seen <= high), upstream, torch.zeros_like(upstream))
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4], *ctx.needs_input_grad[13:]
        seeds = seed_value if seed is None else seed, first_sample
        arguments = upstream, tensors, coefficients, columns, noise_scale, *seeds, source
        if torch.is_grad_enabled() or impls.transforms_active() or impls.batched(upstream):
            to_data, *to_scalars = reference.combine_backward(*arguments)
        else:
            to_data = _to_tensors(upstream, tensors, coefficients, columns, source, wanted[3:], impl)
            to_scalars = _to_scalars(*arguments, wanted[:3], impl)
        found = zip((*to_scalars, *to_data), (coefficients, constant, noise_scale, *tensors), wanted, strict=True)
        grads = [grad.to(like.dtype) if want else None for grad, like, want in found]
        return grads[0], None, *grads[1:3], *(None,) * 9, *grads[3:]


def _raw(plain, written):
    """The function, past dispatch where nothing looks on, or the operator."""
    if written is None:
        return _forward if plain else torch.ops.lgd.combine
    return _forward_moments if plain else torch.ops.lgd.combine_moments


def _to_outputs(ctx, upstream, to_moments):
    """What reaches the outputs before clamp and rounding: of the written ones their own upstream, of all that of the
    moments, for which they are formed again."""
    coefficients, constant, noise_scale, seed, source, *tensors = ctx.saved_tensors
    columns, seed_value, first_sample, low, high, impl = ctx.options
    if torch.is_grad_enabled() or impls.transforms_active() or impls.batched(to_moments):
        seed = seed_value if seed is None else seed
        seen = reference.combined(
            tensors, coefficients, columns, constant, noise_scale, seed, first_sample, source, -torch.inf, torch.inf,
            ctx.wide,
        )  # fmt: skip
    else:
        dtype = arithmetic_dtype(*tensors)
        if ctx.wide and tensors[0].device.type == "cpu" and impl in (None, "cpu"):
            tensors, dtype = [tensors[0].double(), *tensors[1:]], torch.float64  # formed in float64, as in the forward
        seen = torch.ops.lgd.combine(
            list(tensors), coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source,
            -torch.inf, torch.inf, dtype, impl,
        )  # fmt: skip
    total = reference.moments_backward(seen.clamp(low, high), to_moments)
    total = torch.cat((total[: ctx.written] + upstream, total[ctx.written :]))
    return torch.where((seen >= low) & (seen <= high), total, torch.zeros_like(total))


def _to_tensors(upstream, tensors, coefficients, columns, source, wanted, impl):
    """A combine of the upstreams, summed over the samples that read the same source."""
    chosen = [n for n, want in enumerate(wanted) if want]
    grads = [None] * len(tensors)
    if not chosen:
        return grads
    wide = arithmetic_dtype(*tensors)
    transposed = reference.to_tensors(coefficients.to(wide), len(tensors), columns)[:, chosen]
    dtypes = {tensors[n].dtype for n in chosen}
    dtype = dtypes.pop() if len(dtypes) == 1 and source is None else wide
    d = [one.to(wide) for one in upstream.unbind(0)] if wide == torch.float64 else list(upstream.unbind(0))
    every = [index for p in range(len(d)) for index in (p, -1)]
    found = torch.ops.lgd.combine(
        d, transposed, every, None, None, None, None, 0, None, -torch.inf, torch.inf, dtype, impl
    )
    for n, grad in zip(chosen, found.unbind(0), strict=True):
        grads[n] = reference.scattered(grad, source, tensors[n].shape[0])
    return grads


def _to_scalars(upstream, tensors, coefficients, columns, noise_scale, seed, first_sample, source, wanted, impl):
    """The moments of each upstream with the columns, alone, and with the noise, drawn again: one read."""
    if not any(wanted):
        return None, None, None
    size, count = len(columns) // 2, len(tensors)
    d = list(upstream.unbind(0))
    outputs = range(size, size + len(d))
    columns = [*columns, *(index for p in range(len(d)) for index in (count + p, -1))]
    read, z = [*tensors, *d], []
    if wanted[2]:
        shape = d[0].shape
        z.append(philox_normal(shape, seed, stream=STREAM_STEP, first_sample=first_sample, device=d[0].device))
        columns += [count + len(d), -1]
    kinds = [
        [(p, k) for p in outputs for k in range(size)] if wanted[0] else [],
        [(p, -1) for p in outputs] if wanted[1] else [],
        [(p, size + len(d)) for p in outputs] if wanted[2] else [],
    ]
    pairs = [index for kind in kinds for pair in kind for index in pair]
    found = torch.ops.lgd.moments([*read, *z], columns, pairs, source, 0 if source is None else count, impl)
    to_coefficients, to_constant, to_noise = found.split([len(kind) for kind in kinds], 1)
    return (
        to_coefficients.unflatten(1, (len(d), size)) if wanted[0] else None,
        to_constant if wanted[1] else None,
        to_noise if wanted[2] else None,
    )


def _forward(tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low, high,
             dtype, impl):  # fmt: skip
    impl = impls.choose("combine", impl, tensors[0].device, *[tensor.dtype for tensor in tensors], dtype)
    if impl == "reference":
        return reference.combine(
            tensors, coefficients, columns, constant, noise_scale, seed_value if seed is None else seed, first_sample,
            source, low, high, dtype,
        )  # fmt: skip
    outputs = _allocate(tensors, coefficients, dtype)
    if outputs.numel():
        impls.launcher("combine", impl).forward(
            outputs, tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source,
            low, high,
        )  # fmt: skip
    return outputs


def _forward_moments(tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low,
                     high, written, dtype, impl, wide=False):  # fmt: skip
    impl = impls.choose("combine", impl, tensors[0].device, *(tensor.dtype for tensor in tensors), dtype)
    if impl == "reference":
        return reference.combine_moments(
            tensors, coefficients, columns, constant, noise_scale, seed_value if seed is None else seed, first_sample,
            source, low, high, written, dtype, wide,
        )  # fmt: skip
    outputs, found = _allocate_moments(tensors, coefficients, written, wide, dtype)
    if not found.numel() or not tensors[0].shape[1:].numel():
        return outputs, found.zero_()
    impls.launcher("combine", impl).forward(
        outputs, tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low,
        high, found,
    )  # fmt: skip
    return outputs, found


def _allocate_moments(tensors, coefficients, written, wide, dtype):
    batch, count = coefficients.shape[:2]
    outputs = tensors[0].new_empty((written, batch, *tensors[0].shape[1:]), dtype=dtype)
    found = torch.float64 if wide else arithmetic_dtype(*tensors)  # the dtype that the launchers compute in
    return outputs, tensors[0].new_empty((batch, len(triangle(count)) // 2), dtype=found)


def _allocate(tensors, coefficients, dtype):
    batch, outputs = coefficients.shape[:2]
    return tensors[0].new_empty((outputs, batch, *tensors[0].shape[1:]), dtype=dtype)


def _fake(tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low, high,
          dtype, impl):  # fmt: skip
    return _allocate(tensors, coefficients, dtype)


def _fake_moments(tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source, low,
                  high, written, dtype, impl, wide=False):  # fmt: skip
    return _allocate_moments(tensors, coefficients, written, wide, dtype)


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("combine", _forward, _device)
    _library.impl("combine_moments", _forward_moments, _device)
torch.library.register_fake("lgd::combine", _fake, lib=_library)
torch.library.register_fake("lgd::combine_moments", _fake_moments, lib=_library)
