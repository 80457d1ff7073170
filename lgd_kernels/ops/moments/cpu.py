"""Launches csrc/moments/moments_cpu.cpp."""

from __future__ import annotations

import torch

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.columns import every_pair, same_as
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(found, tensors, columns, pairs, source, gathered):
    tensors = [with_contiguous_rows(tensor) for tensor in tensors]
    source = None if source is None else source.contiguous()
    threads = torch.get_num_threads()
    impls.extension().moments(found, tensors, columns, pairs, same_as(pairs), source, gathered, False, threads)


def centred(found, tensors, columns):
    tensors = [with_contiguous_rows(tensor) for tensor in tensors]
    pairs = every_pair(len(columns) // 2)
    threads = torch.get_num_threads()
    impls.extension().moments(found, tensors, columns, pairs, same_as(pairs), None, 0, True, threads)
