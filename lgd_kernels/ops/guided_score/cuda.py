"""Launch csrc/guided_score/guided_score_cuda.cu on the current stream."""

from __future__ import annotations

from torch import Tensor

from lgd_kernels.ops.guided_score.structs import GuidedScore, GuidedScoreBackward
from lgd_kernels.runtime import impls, memory


def forward(guided: Tensor, a: GuidedScore) -> None:
    memory.launch_cuda(impls.cuda_extension().guided_score, guided, a, like=guided)


def backward(grads: tuple[Tensor | None, ...], b: GuidedScoreBackward) -> None:
    *to_data, d_omega = grads
    blocks = memory.cuda_column_blocks(b.upstream)
    with memory.partial_sums(d_omega, blocks) as parts:
        memory.launch_cuda(impls.cuda_extension().guided_score_backward, (*to_data, parts), b, like=b.upstream)
