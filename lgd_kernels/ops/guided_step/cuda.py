"""Launches csrc/guided_step/guided_step_cuda.cu on the current stream."""

from __future__ import annotations

from lgd_kernels.runtime import impls, memory
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(x_s, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, *rest):
    x, cond, uncond, noise = (with_contiguous_rows(tensor) for tensor in (x, cond, uncond, noise))
    with memory.current_stream(x_s) as stream:
        impls.cuda_extension().guided_step(
            x_s, x, cond, uncond, noise, omega, omega_value, table, levels, PREDICTIONS.index(prediction), *rest,
            stream,
        )  # fmt: skip


def backward(
    d_x, d_cond, d_uncond, d_noise, d_omega, upstream, cond, uncond, omega, omega_value, table, levels, prediction,
    *churn,
):  # fmt: skip
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    blocks = memory.cuda_column_blocks(upstream)
    with memory.current_stream(upstream) as stream, memory.partial_sums(d_omega, blocks) as parts:
        impls.cuda_extension().guided_step_backward(
            d_x, d_cond, d_uncond, d_noise, parts, upstream, cond, uncond, omega, omega_value, table, levels,
            PREDICTIONS.index(prediction), *churn, stream,
        )  # fmt: skip
