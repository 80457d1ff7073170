"""Launches csrc/guided_score/guided_score_cuda.cu on the current stream."""

from __future__ import annotations

from lgd_kernels import impls, native
from lgd_kernels.native import with_contiguous_rows


def forward(guided, cond, uncond, *omega):
    cond, uncond = with_contiguous_rows(cond), with_contiguous_rows(uncond)
    with native.current_stream(guided) as stream:
        impls.cuda_extension().guided_score(guided, cond, uncond, *omega, stream)


def backward(d_cond, d_uncond, d_omega, upstream, cond, uncond, *omega):
    upstream, cond, uncond = (with_contiguous_rows(tensor) for tensor in (upstream, cond, uncond))
    blocks = native.cuda_column_blocks(upstream)
    with native.current_stream(upstream) as stream, native.partial_sums(d_omega, blocks) as parts:
        impls.cuda_extension().guided_score_backward(d_cond, d_uncond, parts, upstream, cond, uncond, *omega, stream)
