"""Launches csrc/guided_score/guided_score_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(guided, cond, uncond, *omega):
    cond, uncond = with_contiguous_rows(cond), with_contiguous_rows(uncond)
    impls.extension().guided_score(guided, cond, uncond, *omega, torch.get_num_threads())


def backward(d_cond, d_uncond, d_omega, upstream, cond, uncond, *omega):
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    impls.extension().guided_score_backward(
        d_cond, d_uncond, d_omega, upstream, cond, uncond, *omega, torch.get_num_threads()
    )
