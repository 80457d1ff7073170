"""Launches csrc/guided_score/guided_score_cuda.cu on the current stream."""

from __future__ import annotations

from lgd_kernels.runtime import impls, memory
from lgd_kernels.runtime.memory import with_contiguous_rows


def forward(guided, cond, uncond, *omega):
    cond, uncond = with_contiguous_rows(cond), with_contiguous_rows(uncond)
    with memory.current_stream(guided) as stream:
        impls.cuda_extension().guided_score(guided, cond, uncond, *omega, stream)


def backward(d_cond, d_uncond, d_omega, upstream, cond, uncond, *omega):
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    blocks = memory.cuda_column_blocks(upstream)
    with memory.current_stream(upstream) as stream, memory.partial_sums(d_omega, blocks) as parts:
        impls.cuda_extension().guided_score_backward(d_cond, d_uncond, parts, upstream, cond, uncond, *omega, stream)
