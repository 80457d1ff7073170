"""Ahead of time: guided_step."""

from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.guided_step import triton
from lgd_kernels.ops.guided_step.structs import GuidedStep, GuidedStepBackward


def forward(a: Inputs) -> None:
    triton.forward(a.data(), GuidedStep(a.data(), a.data(), a.data(), a.noise, a.scalars, a.seed))


def backward(a: Inputs) -> None:
    dtypes = [a.dtype] * 3
    call = GuidedStepBackward(a.data(), a.data(), a.data(), a.scalars, *dtypes, [True] * 5)
    triton.backward([a.data(), a.data(), a.data(), a.data(), a.numbers], call)


CALLS = {
    "guided_step_kernel": Kernel(forward, of_rows(3)),
    "guided_step_backward_kernel": Kernel(backward, of_rows(3)),
}
LOADS = {"forward": (6, 3), "backward": (6, 3)}  # CUDA: float32, 16 bits
