"""Ahead of time: dynamic_threshold."""

import math

import torch
from aot import Inputs, Kernel, of_rows

from lgd_kernels.ops.dynamic_threshold import triton
from lgd_kernels.ops.dynamic_threshold.structs import DynamicThreshold


def forward(a: Inputs) -> None:
    triton.forward((a.data(), torch.zeros(a.batch, 2)), DynamicThreshold(a.data(), 0.5, math.inf))


CALLS = {
    "dynamic_threshold_kernel": Kernel(forward, of_rows(1)),
    "dynamic_threshold_select_kernel": Kernel(forward, of_rows(1)),
}
