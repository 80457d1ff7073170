"""Launches csrc/combine/combine_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels import impls
from lgd_kernels.native import with_contiguous_rows


def forward(outputs, tensors, coefficients, columns, constant, noise_scale, seed, seed_value, first_sample, source,
            low, high, found=None):  # fmt: skip
    scalars = (None if one is None else one.contiguous() for one in (coefficients, constant, noise_scale))
    impls.extension().combine(
        outputs, [with_contiguous_rows(tensor) for tensor in tensors], *scalars, columns, seed, seed_value,
        first_sample, None if source is None else source.contiguous(), low, high, found, torch.get_num_threads(),
    )  # fmt: skip
