"""Launches csrc/guided_score/guided_score_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels import impls
from lgd_kernels.native import per_sample, rows, sizes, table, wide, with_contiguous_rows


def forward(guided, cond, uncond, omega, omega_value, lookup):
    cond, uncond = with_contiguous_rows(cond), with_contiguous_rows(uncond)
    impls.extension().guided_score(
        rows(guided), rows(cond), rows(uncond), per_sample(omega, omega_value), table(lookup),
        *sizes(guided), wide(cond, uncond), torch.get_num_threads(),
    )  # fmt: skip


def backward(d_cond, d_uncond, d_omega, upstream, cond, uncond, omega, omega_value, lookup):
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    impls.extension().guided_score_backward(
        rows(d_cond), rows(d_uncond), 0 if d_omega is None else d_omega.data_ptr(),
        rows(upstream), rows(cond), rows(uncond), per_sample(omega, omega_value), table(lookup),
        *sizes(upstream), wide(d_cond, d_uncond, d_omega, upstream, cond, uncond), torch.get_num_threads(),
    )  # fmt: skip
