"""Ahead of time: guided_score."""

from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.guided_score import triton
from lgd_kernels.ops.guided_score.structs import GuidedScore, GuidedScoreBackward


def forward(a: Inputs) -> None:
    triton.forward(a.data(), GuidedScore(a.data(), a.data(), a.omega))


def backward(a: Inputs) -> None:
    call = GuidedScoreBackward(a.data(), a.data(), a.data(), a.omega, a.dtype, a.dtype, [True] * 3)
    triton.backward([a.data(), a.data(), a.numbers], call)


CALLS = {
    "guided_score_kernel": Kernel(forward, of_rows(2)),
    "guided_score_backward_kernel": Kernel(backward, of_rows(3)),
}
LOADS = {"forward": (4, 2), "backward": (6, 3)}  # CUDA: float32, 16 bits
