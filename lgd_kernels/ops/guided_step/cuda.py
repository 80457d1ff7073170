"""Launch csrc/guided_step/guided_step_cuda.cu on the current stream."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.ops.guided_step.structs import GuidedStep, GuidedStepBackward
from lgd_kernels.runtime import impls, memory


def forward(x_s: Tensor, a: GuidedStep) -> None:
    memory.launch_cuda(impls.cuda_extension().guided_step, x_s, a, like=x_s)


def backward(grads: tuple[Tensor | None, ...], b: GuidedStepBackward) -> None:
    *to_data, d_omega = grads
    blocks = memory.cuda_column_blocks(b.upstream)
    with memory.partial_sums(d_omega, blocks) as parts:
        memory.launch_cuda(impls.cuda_extension().guided_step_backward, (*to_data, parts), b, like=b.upstream)
