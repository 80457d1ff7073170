"""The floor under a learned omega: 0, from which it can come back."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 0.25


def above_zero(value: Tensor) -> Tensor:
    """`max(value, 0)`, with the gradient of `value` itself down to -SLACK; below, only what would raise it passes.

    The gradient of a ReLU is 0 wherever its input is at or below 0, for good: a weight that noise pushed there never
    returns, though the loss may ask for it later. Here the loss goes on being asked: at omega = 0 it says which way it
    falls, and over many batches that decides. Where 0 is best, values come to rest some way below it, so that the noise
    of a batch does not lift omega off 0; SLACK bounds how far, and so the way back. Forward-mode derivatives are the
    ReLU's.

    >>> import torch
    >>> value = torch.tensor([-1.0, -1.0, -0.1, 2.0], requires_grad=True)
    >>> (above_zero(value) * torch.tensor([1.0, -1.0, 1.0, 1.0])).sum().backward()
    >>> value.grad
    tensor([ 0., -1.,  1.,  1.])
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
        return torch.where((value > -SLACK) | ~(upstream >= 0), upstream, 0.0)  # a NaN stays

    @staticmethod
    def jvp(ctx, tangent):
        (value,) = ctx.saved_tensors
        return torch.where(value > 0, tangent, 0.0)
