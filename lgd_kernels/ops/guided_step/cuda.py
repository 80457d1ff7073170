"""Launches csrc/guided_step/guided_step_cuda.cu on the current stream."""

from __future__ import annotations

from lgd_kernels import impls, native
from lgd_kernels.levels import PREDICTIONS
from lgd_kernels.native import per_sample, rows, sizes, with_contiguous_rows


def forward(
    x_s, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed, seed_value,
    first_sample,
):  # fmt: skip
    x, cond, uncond, noise = (with_contiguous_rows(tensor) for tensor in (x, cond, uncond, noise))
    draws = seed is not None or seed_value is not None
    with native.current_stream(x_s) as stream:
        impls.cuda_extension().guided_step(
            rows(x_s), rows(x), rows(cond), rows(uncond), rows(noise),
            per_sample(omega, omega_value), native.table(table), native.levels(levels), PREDICTIONS.index(prediction),
            per_sample(churn, churn_value), native.seed(seed, seed_value, first_sample) if draws else None,
            *sizes(x_s), stream,
        )  # fmt: skip


def backward(
    d_x, d_cond, d_uncond, d_noise, d_omega, upstream, cond, uncond, omega, omega_value, table, levels, prediction,
    churn, churn_value,
):  # fmt: skip
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    blocks = native.cuda_column_blocks(upstream)
    with native.current_stream(upstream) as stream, native.partial_sums(d_omega, blocks) as parts:
        impls.cuda_extension().guided_step_backward(
            rows(d_x), rows(d_cond), rows(d_uncond), rows(d_noise), 0 if parts is None else parts.data_ptr(),
            rows(upstream), rows(cond), rows(uncond),
            per_sample(omega, omega_value), native.table(table), native.levels(levels), PREDICTIONS.index(prediction),
            per_sample(churn, churn_value), *sizes(upstream), stream,
        )  # fmt: skip
