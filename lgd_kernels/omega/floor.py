"""The floor under a learned omega: 0, from which it can come back."""

from __future__ import annotations

import torch
from torch import Tensor


def above_zero(value: Tensor) -> Tensor:
    """`max(value, 0)`, whose gradient is dropped below the floor only where a step against it would lead further down.

    The gradient of a ReLU is 0 wherever its input is at or below 0, for good: a weight that noise pushed there never
    returns, though the loss may ask for it later. Here upstream < 0, a loss that falls as omega rises, passes; so
    descent is that of a projection onto omega >= 0. Above 0 it is the ReLU's gradient, and forward-mode derivatives are
    the ReLU's everywhere.

    >>> import torch
    >>> value = torch.tensor([-1.0, -1.0, 2.0], requires_grad=True)
    >>> (above_zero(value) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
    >>> value.grad
    tensor([ 0., -1.,  1.])
    """
    return _AboveZero.apply(value)


class _AboveZero(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value):
        return value.relu()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, upstream):
        (value,) = ctx.saved_tensors
        return torch.where((value > 0) | ~(upstream >= 0), upstream, 0.0)  # a NaN stays

    @staticmethod
    def jvp(ctx, tangent):
        (value,) = ctx.saved_tensors
        return torch.where(value > 0, tangent, 0.0)
