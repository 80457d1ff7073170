"""Launches csrc/combine/combine_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(outputs, tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source,
            low, high, found=None):  # fmt: skip
    tensors = [one if one.is_contiguous() else with_contiguous_rows(one) for one in tensors]
    scalars = [one if one is None else one.contiguous() for one in (coefficients, constant, noise_scale, source)]
    impls.extension().combine(
        outputs, tensors, *scalars[:3], columns, seed, seed_value, first_sample, scalars[3], low, high,
        found, torch.get_num_threads(),
    )  # fmt: skip
