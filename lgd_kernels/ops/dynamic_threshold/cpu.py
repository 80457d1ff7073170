"""Launches csrc/dynamic_threshold/dynamic_threshold_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(out, order, x0, rank, weight, max_value):
    threads = torch.get_num_threads()
    impls.extension().dynamic_threshold(out, order, with_contiguous_rows(x0), rank, weight, max_value, threads)
