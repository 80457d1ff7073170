"""Launches csrc/guided_step/guided_step_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels import impls, native
from lgd_kernels.levels import PREDICTIONS
from lgd_kernels.native import per_sample, rows, sizes, wide, with_contiguous_rows


def forward(
    x_s, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, churn, churn_value, seed, seed_value,
    first_sample,
):  # fmt: skip
    x, cond, uncond, noise = (with_contiguous_rows(tensor) for tensor in (x, cond, uncond, noise))
    draws = seed is not None or seed_value is not None
    impls.extension().guided_step(
        rows(x_s), rows(x), rows(cond), rows(uncond), rows(noise),
        per_sample(omega, omega_value), native.table(table), native.levels(levels), PREDICTIONS.index(prediction),
        per_sample(churn, churn_value), native.seed(seed, seed_value, first_sample) if draws else None,
        *sizes(x_s), wide(x, cond, uncond, noise), torch.get_num_threads(),
    )  # fmt: skip


def backward(
    d_x, d_cond, d_uncond, d_noise, d_omega, upstream, cond, uncond, omega, omega_value, table, levels, prediction,
    churn, churn_value,
):  # fmt: skip
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    is_wide = wide(d_x, d_cond, d_uncond, d_noise, d_omega, upstream, cond, uncond)
    impls.extension().guided_step_backward(
        rows(d_x), rows(d_cond), rows(d_uncond), rows(d_noise), 0 if d_omega is None else d_omega.data_ptr(),
        rows(upstream), rows(cond), rows(uncond),
        per_sample(omega, omega_value), native.table(table), native.levels(levels), PREDICTIONS.index(prediction),
        per_sample(churn, churn_value),
        *sizes(upstream), is_wide, torch.get_num_threads(),
    )  # fmt: skip
