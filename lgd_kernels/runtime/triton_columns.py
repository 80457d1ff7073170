"""Device functions of moments and combine: tensors at a source, and the columns made of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.runtime.triton_common import load_tile


@triton.jit
def sources(source, samples, rows, mask, GATHERED: tl.constexpr):
    """The sample that each row reads, and what to add to what comes of it: 0, or NaN where there is no such sample."""
    if GATHERED > 0:
        at = tl.load(source + rows, mask=mask, other=0)
        inside = (at >= 0) & (at < samples)
        return tl.where(inside, at, 0), tl.where(inside, 0.0, float("nan"))
    else:
        return rows, tl.zeros_like(rows).to(tl.float32)


@triton.jit
def load_tensors(tensors, strides, rows, at, first, columns, mask, GATHERED: tl.constexpr):
    """A tile of each; the first GATHERED are read at other samples than their own."""
    found = ()
    for n in tl.static_range(len(tensors)):
        if n < GATHERED:
            found += (load_tile(tensors[n], strides[n], at, first, columns, mask),)
        else:
            found += (load_tile(tensors[n], strides[n], rows, first, columns, mask),)
    return found


@triton.jit
def form_columns(tensors, COLUMNS: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """Each column as a tile of DTYPE: a tensor, or the difference of two."""
    found = ()
    for k in tl.static_range(len(COLUMNS) // 2):
        if COLUMNS[2 * k + 1] < 0:
            found += (tensors[COLUMNS[2 * k]].to(DTYPE),)
        else:
            found += (tensors[COLUMNS[2 * k]].to(DTYPE) - tensors[COLUMNS[2 * k + 1]].to(DTYPE),)
    return found


def source_arguments(source: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """(source, samples that there are)"""
    return (like if source is None else source.contiguous()), like.shape[0]
