"""Keep a learned omega at 0 or above, with a gradient that lets it rise from 0 again."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 0.25


def above_zero(value: Tensor) -> Tensor:
    """Return `max(value, 0)`, with the gradient of `value` itself down to -SLACK; below, only gradients that raise it.

    The gradient of a ReLU is 0 wherever its input is at or below 0: a weight that the noise of a batch pushed there
    would never return, even where a larger weight lowers the loss. Here the gradient passes at omega = 0, and the mean
    over many batches decides. Where 0 is best, values settle below 0, so that the noise of one batch does not lift
    omega above 0; SLACK bounds how far below, and so how long the return takes. Forward-mode derivatives are those of
    the ReLU.

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
