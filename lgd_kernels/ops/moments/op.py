"""The operator `torch.ops.lgd.moments`, and the differentiable op on top of it.

Its backward is a combine, as the backward of a combine consists of moments: each calls the other by the operator's
name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.ops.moments import reference
from lgd_kernels.ops.moments.structs import Moments, MomentsBackward
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.operator import Operator, define, shape_of

IMPLEMENTATIONS = {
    "triton": impls.FLOATS,
    "cpu": impls.ALL_FLOATS,
    "reference": impls.ALL_FLOATS,
}


def forward(a: Moments, impl: str | None) -> Tensor:
    tensors = a.read.tensors
    impl = impls.choose("moments", impl, tensors[0].device, *[tensor.dtype for tensor in tensors])
    if impl == "reference":
        return reference.moments(a).contiguous()
    found = empty(a)
    if not found.numel() or not tensors[-1].numel():
        return found.zero_()
    impls.launcher("moments", impl).forward(found, a)
    return found


def empty(a: Moments) -> Tensor:
    like = a.read.tensors[0]
    dtype = reference.centred_dtype(like) if a.centred else arithmetic_dtype(*a.read.tensors)
    return like.new_empty((a.read.batch, len(a.products) // 2), dtype=dtype)


def backward(b: MomentsBackward, impl: str | None, direct: bool) -> list[Tensor | None]:
    """Compute the gradients to the tensors as outputs of one combine; None for one that is not wanted."""
    if b.call.centred:
        return backward_reference(b)
    tensors = b.call.read.tensors
    coefficients, constant = reference.to_combine(b.upstream, b.call)
    chosen = [n for n, want in enumerate(b.wanted) if want]
    dtypes = {tensors[n].dtype for n in chosen}
    dtype = dtypes.pop() if len(dtypes) == 1 else arithmetic_dtype(*tensors)
    no_noise, no_clamp = (None, None, None, 0), (-torch.inf, torch.inf)
    found = torch.ops.lgd.combine(
        *b.call.read, coefficients[:, chosen], constant[:, chosen], *no_noise, *no_clamp, dtype, impl
    )
    grads = iter(found.unbind(0))
    return [next(grads).to(tensor.dtype) if want else None for tensor, want in zip(tensors, b.wanted, strict=True)]


def backward_reference(b: MomentsBackward) -> list[Tensor | None]:
    tensors = b.call.read.tensors
    grads = (reference.centred_backward if b.call.centred else reference.moments_backward)(b.upstream, b.call)
    return [grad.to(t.dtype) if want else None for grad, t, want in zip(grads, tensors, b.wanted, strict=True)]


moments = Operator(
    "moments",
    define(Moments, "moments", "Tensor", forward, empty),
    reference=reference.moments,
    leaves=lambda a: tuple(a.read.tensors),
    saved=shape_of(MomentsBackward),
    save=lambda a, found, wanted: MomentsBackward(found, a, list(wanted)),
    backward=backward,
    reference_backward=backward_reference,
)
