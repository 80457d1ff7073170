"""Launches csrc/guided_step/guided_step_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(x_s, x, cond, uncond, noise, omega, omega_value, table, levels, prediction, *rest):
    x, cond, uncond, noise = (with_contiguous_rows(tensor) for tensor in (x, cond, uncond, noise))
    impls.extension().guided_step(
        x_s, x, cond, uncond, noise, omega, omega_value, table, levels, PREDICTIONS.index(prediction), *rest,
        torch.get_num_threads(),
    )  # fmt: skip


def backward(
    d_x, d_cond, d_uncond, d_noise, d_omega, upstream, cond, uncond, omega, omega_value, table, levels, prediction,
    *churn,
):  # fmt: skip
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    impls.extension().guided_step_backward(
        d_x, d_cond, d_uncond, d_noise, d_omega, upstream, cond, uncond, omega, omega_value, table, levels,
        PREDICTIONS.index(prediction), *churn, torch.get_num_threads(),
    )  # fmt: skip
