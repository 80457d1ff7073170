"""The operator `torch.ops.lgd.scaled`, and the differentiable op on top of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lgd_kernels.ops.scaled import reference
from torch import Tensor

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.operator import Operator, define, shape_of

IMPLEMENTATIONS = {"triton": impls.FLOATS, "cpu": impls.ALL_FLOATS, "reference": impls.ALL_FLOATS}


class Scaled(NamedTuple):
    x: Tensor
    factor: Tensor


class ScaledBackward(NamedTuple):
    upstream: Tensor
    x: Tensor
    factor: Tensor


def forward(a, impl):
    impl = impls.choose("scaled", impl, a.x.device, a.x.dtype)
    if impl == "reference" or not a.x.numel():
        return reference.scaled(a)
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    impls.launcher("scaled", impl).forward(out, a)
    return out


scaled = Operator(
    "scaled",
    define(Scaled, "scaled", "Tensor", forward, lambda a: a.x.new_empty(a.x.shape)),
    reference=reference.scaled,
    leaves=lambda a: (a.x, a.factor),
    saved=shape_of(ScaledBackward),
    save=lambda a, out, wanted: ScaledBackward(out, a.x, a.factor),
    backward=lambda b, impl, direct: reference.scaled_backward(b),
    reference_backward=reference.scaled_backward,
)
