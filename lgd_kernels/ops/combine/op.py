"""The operators `torch.ops.lgd.combine` and `combine_moments`, and the differentiable ops on top of them.

Their backward needs no kernel: to the tensors it is a combine, and to the numbers of each sample it is moments, which
it calls by the operator's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lgd_kernels.ops.combine import reference
from lgd_kernels.ops.combine.structs import Combine, CombineBackward, CombineMoments, CombineMomentsBackward
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad
from lgd_kernels.runtime.columns import triangle, twos
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.operator import Operator, define, shape_of
from lgd_kernels.runtime.philox import STREAM_STEP, philox_normal

IMPLEMENTATIONS = {
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}
MOST_OUTPUTS = 8  # kMostOutputs in csrc/combine/combine.h


def forward(a: Combine, impl: str | None) -> Tensor:
    """Compute the outputs, `[P, B', ...]`."""
    impl = chosen(a, impl)
    if impl == "reference":
        return reference.combine(a)
    outputs = empty(a)
    if outputs.numel():
        impls.launcher("combine", impl).forward((outputs, None), a)
    return outputs


def forward_moments(a: CombineMoments, impl: str | None) -> tuple[Tensor, Tensor]:
    """Compute the outputs that are written, and the moments `[B', M]` of all, one for each of `columns.triangle`."""
    impl = chosen(a.combine, impl)
    if impl == "reference":
        return reference.combine_moments(a)
    outputs, found = empty_moments(a)
    if not found.numel() or not a.combine.read.tensors[0].shape[1:].numel():
        return outputs, found.zero_()
    impls.launcher("combine", impl).forward((outputs, found), a.combine)
    return outputs, found


def chosen(a: Combine, impl: str | None) -> str:
    tensors = a.read.tensors
    return impls.choose("combine", impl, tensors[0].device, *[tensor.dtype for tensor in tensors], a.dtype)


def empty(a: Combine) -> Tensor:
    batch, outputs = a.coefficients.shape[:2]
    first = a.read.tensors[0]
    return first.new_empty((outputs, batch, *first.shape[1:]), dtype=a.dtype)


def empty_moments(a: CombineMoments) -> tuple[Tensor, Tensor]:
    tensors = a.combine.read.tensors
    batch, count = a.combine.coefficients.shape[:2]
    outputs = tensors[0].new_empty((a.written, batch, *tensors[0].shape[1:]), dtype=a.combine.dtype)
    dtype = torch.float64 if a.wide else arithmetic_dtype(*tensors)  # the dtype that the launchers compute in
    return outputs, tensors[0].new_empty((batch, len(triangle(count)) // 2), dtype=dtype)


def backward(b: CombineBackward, impl: str | None, direct: bool) -> list[Tensor | None]:
    """Compute the gradients to coefficients, constant, noise_scale and the tensors; None for one that is not wanted."""
    return _to_leaves(_unclamped(b, impl, direct), impl, direct)


def backward_reference(b: CombineBackward) -> list[Tensor | None]:
    b = _unclamped(b, None, False)
    return _wanted(reference.combine_backward(b.upstream, b.call), b)


def backward_moments(b: CombineMomentsBackward, impl: str | None, direct: bool) -> list[Tensor | None]:
    a = b.call.combine
    if b.call.wide and not b.call.written and _is_plain(a):
        return _wanted(_of_moments_alone(b, impl, direct), b)
    tensors, dtype = a.read.tensors, arithmetic_dtype(*a.read.tensors)
    if b.call.wide and tensors[0].device.type == "cpu" and impl in (None, "cpu"):  # in float64, as in the forward
        tensors, dtype = [tensors[0].double(), *tensors[1:]], torch.float64
    again = a._replace(read=a.read._replace(tensors=tensors)).without_clamp(dtype)
    return _to_leaves(_of_outputs(b, raw.run(again, impl, direct)), impl, direct)


def backward_moments_reference(b: CombineMomentsBackward) -> list[Tensor | None]:
    of_outputs = _of_outputs(b, reference.combined(b.call.combine.without_clamp(b.call.combine.dtype), b.call.wide))
    return _wanted(reference.combine_backward(of_outputs.upstream, of_outputs.call), of_outputs)


def _unclamped(b: CombineBackward, impl: str | None, direct: bool) -> CombineBackward:
    """Set the upstream to 0 where the clamp held a value, which is found by the combine before clamp and rounding."""
    low, high = b.call.low, b.call.high
    if low == -torch.inf and high == torch.inf:
        return b
    with torch.no_grad():
        before = raw.run(b.call.without_clamp(arithmetic_dtype(*b.call.read.tensors)), impl, direct)
    zero = torch.zeros_like(b.upstream)
    return b._replace(upstream=torch.where((before >= low) & (before <= high), b.upstream, zero))


def _is_plain(a: Combine) -> bool:
    """Return whether outputs are linear in the tensors, and they and the columns fit into one call."""
    linear = a.noise_scale is None and a.read.source is None and a.low == -torch.inf and a.high == torch.inf
    return linear and a.coefficients.shape[1] + a.coefficients.shape[2] <= MOST_OUTPUTS


def _of_moments_alone(b: CombineMomentsBackward, impl: str | None, direct: bool) -> list[Tensor | None]:
    """Compute the gradients where no output is written: combines of the same columns, in float64 in registers.

    With M the upstream of the products and of their transposes, and s that of the sums, the gradient to the outputs y =
    C x + c is M y + s = (M C) x + (M c + s): in a tensor a combine of x, and in C its inner products with x.
    """
    a, columns = b.call.combine, b.call.combine.read.columns
    c, (outputs, size) = a.coefficients.double(), a.coefficients.shape[1:]
    places = {pair: n for n, pair in enumerate(twos(triangle(outputs)))}
    to = b.upstream[1].double().unbind(1)
    m = [[to[places[min(i, j), max(i, j)]] * (1 + (i == j)) for j in range(outputs)] for i in range(outputs)]
    products = torch.stack([torch.stack(row, 1) for row in m], 1)
    constant = torch.stack([to[places[i, -1]] for i in range(outputs)], 1)
    if a.constant is not None:
        constant = constant + (products @ a.constant.double().unsqueeze(-1)).squeeze(-1)
    factors = products @ c  # [B, P, K]
    found: list[Tensor | None] = [None] * (3 + len(a.read.tensors))
    chosen = [n for n, want in enumerate(b.wanted[3:]) if want]
    if chosen:
        dtypes = {a.read.tensors[n].dtype for n in chosen}
        dtype = dtypes.pop() if len(dtypes) == 1 else arithmetic_dtype(*a.read.tensors)
        to_tensors = reference.to_tensors(c, len(a.read.tensors), columns)[:, chosen]  # [B, N, P]
        shift = (to_tensors @ constant.unsqueeze(-1)).squeeze(-1)
        again = a._replace(coefficients=to_tensors @ factors, constant=shift, dtype=dtype)
        grads, _ = raw_moments.run(CombineMoments(again, len(chosen), True), impl, direct)
        for n, grad in zip(chosen, grads, strict=True):
            found[3 + n] = grad
    if b.wanted[0] or b.wanted[1]:
        single = torch.eye(size, dtype=c.dtype, device=c.device).expand(len(c), -1, -1)
        shift = torch.nn.functional.pad(constant, (0, size))
        again = a._replace(coefficients=torch.cat((factors, single), 1), constant=shift)
        moments = raw_moments.run(CombineMoments(again, 0, True), impl, direct)[1]
        places = {pair: n for n, pair in enumerate(twos(triangle(outputs + size)))}
        inner = [[places[p, outputs + k] for k in range(size)] for p in range(outputs)]
        found[0] = torch.stack([moments[:, row] for row in inner], 1)
        found[1] = moments[:, [places[p, -1] for p in range(outputs)]]
    return found


def _of_outputs(b: CombineMomentsBackward, before: Tensor) -> CombineBackward:
    """Turn the upstream of outputs and moments into that of all outputs, from these `before` clamp and rounding."""
    (upstream, to_moments), a, written = b.upstream, b.call.combine, b.call.written
    total = reference.moments_backward(before.clamp(a.low, a.high), to_moments)
    total = torch.cat((total[:written] + upstream, total[written:]))
    total = torch.where((before >= a.low) & (before <= a.high), total, torch.zeros_like(total))
    return CombineBackward(total, a, b.wanted)


def _to_leaves(b: CombineBackward, impl: str | None, direct: bool) -> list[Tensor | None]:
    return _wanted((*_to_scalars(b, impl), *_to_tensors(b, impl, direct)), b)


def _to_tensors(b: CombineBackward, impl: str | None, direct: bool) -> list[Tensor | None]:
    """Compute a combine of the upstreams, summed over the outputs that read the same sample."""
    tensors, columns, source, _ = b.call.read
    chosen = [n for n, want in enumerate(b.wanted[3:]) if want]
    grads: list[Tensor | None] = [None] * len(tensors)
    if not chosen:
        return grads
    wide = arithmetic_dtype(*tensors)
    transposed = reference.to_tensors(b.call.coefficients.to(wide), len(tensors), columns)[:, chosen]
    dtypes = {tensors[n].dtype for n in chosen}
    dtype = dtypes.pop() if len(dtypes) == 1 and source is None else wide
    d = [one.to(wide) if wide == torch.float64 else one for one in b.upstream.unbind(0)]
    every = [index for p in range(len(d)) for index in (p, -1)]
    found = raw.run(Combine.plain(d, every, transposed, dtype), impl, direct)
    for n, grad in zip(chosen, found.unbind(0), strict=True):
        grads[n] = reference.scattered(grad, source, tensors[n].shape[0])
    return grads


def _to_scalars(b: CombineBackward, impl: str | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the moments of each upstream with the columns, alone, and with the noise, drawn again: one read."""
    to_coefficients, to_constant, to_noise = b.wanted[:3]
    if not any(b.wanted[:3]):
        return None, None, None
    tensors, columns, source, gathered = b.call.read
    size, d = len(columns) // 2, list(b.upstream.unbind(0))
    outputs = range(size, size + len(d))
    read, columns = [*tensors, *d], [*columns, *(n for p in range(len(d)) for n in (len(tensors) + p, -1))]
    if to_noise:
        seed, first = cast("int | Tensor", b.call.seed.given()), b.call.seed.first_sample
        read.append(philox_normal(d[0].shape, seed, stream=STREAM_STEP, first_sample=first, device=d[0].device))
        columns += [len(tensors) + len(d), -1]
    kinds = [
        [(p, k) for p in outputs for k in range(size)] if to_coefficients else [],
        [(p, -1) for p in outputs] if to_constant else [],
        [(p, size + len(d)) for p in outputs] if to_noise else [],
    ]
    products = [index for kind in kinds for product in kind for index in product]
    found = torch.ops.lgd.moments(read, columns, source, gathered, products, False, impl)
    coefficients, constant, noise = found.split([len(kind) for kind in kinds], 1)
    return (
        coefficients.unflatten(1, (len(d), size)) if to_coefficients else None,
        constant if to_constant else None,
        noise if to_noise else None,
    )


def _wanted(grads: Sequence[Tensor | None], b: CombineBackward | CombineMomentsBackward) -> list[Tensor | None]:
    """Return the gradients that are wanted in the dtypes of their leaves."""
    call = b.call if isinstance(b, CombineBackward) else b.call.combine
    found = zip(grads, leaves(call), b.wanted, strict=True)
    return [
        grad.to(leaf.dtype) if want and grad is not None and leaf is not None else None for grad, leaf, want in found
    ]


def leaves(a: Combine) -> tuple[Tensor | None, ...]:
    return a.coefficients, a.constant, a.noise_scale, *a.read.tensors


raw = define(Combine, "combine", "Tensor", forward, empty)
raw_moments = define(
    CombineMoments, "combine_moments", "(Tensor outputs, Tensor moments)", forward_moments, empty_moments
)
combine = Operator(
    "combine",
    raw,
    reference=reference.combine,
    leaves=leaves,
    saved=shape_of(CombineBackward),
    save=lambda a, found, wanted: CombineBackward(found, a, list(wanted)),
    backward=backward,
    reference_backward=backward_reference,
)
combine_moments = Operator(
    "combine",
    raw_moments,
    reference=reference.combine_moments,
    leaves=lambda a: leaves(a.combine),
    saved=shape_of(CombineMomentsBackward),
    save=lambda a, found, wanted: CombineMomentsBackward(found, a, list(wanted)),
    backward=backward_moments,
    reference_backward=backward_moments_reference,
    outputs=2,
)


def combined(tensors: list[Tensor], coefficients: Tensor, columns: list[int], impl: str | None) -> Tensor:
    """Combine for a caller that has checked that the call is direct (`impls.direct`) and no transform is active."""
    a = Combine.plain(tensors, columns, coefficients, tensors[0].dtype)
    if impl == "reference" or (torch.is_grad_enabled() and requires_grad(*tensors, coefficients)):
        return combine(a, impl)
    return forward(a, impl)
