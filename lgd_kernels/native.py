"""How the C++ floor sees arguments: addresses, dtype codes and strides (`python/arguments.h` is the other side)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from lgd_kernels.levels import OmegaLookup

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/common/scalar.h
ABSENT = (0, 0, 0)


def sizes(tensor: Tensor) -> tuple[int, int]:
    """(samples, elements of a sample)"""
    batch = tensor.shape[0]
    return batch, tensor.numel() // batch if batch else 0


def wide(*tensors: Tensor | None) -> bool:
    """Arithmetic is float64: a tensor is."""
    return any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors)


def with_contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied only if the elements of a sample do not lie next to each other. Samples may lie anywhere."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def rows(tensor: Tensor | None) -> tuple[int, int, int]:
    """A tensor `[B, ...]` with contiguous rows, or an absent one."""
    return ABSENT if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0))


def per_sample(tensor: Tensor | None, value: float) -> tuple[int, int, int, float]:
    """One number for each sample, or one for all."""
    return (0, 0, 0, value) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0), 0.0)


def levels(tensors: list[Tensor]) -> tuple[list[int], int, int]:
    """Five tensors `[B]` of one dtype and stride."""
    return [tensor.data_ptr() for tensor in tensors], DTYPES[tensors[0].dtype], tensors[0].stride(0)


def table(lookup: list[Tensor]) -> tuple | None:
    """A table and where each sample looks into it (the fields of `OmegaLookup`), or None."""
    if not lookup:
        return None
    values, s_knots, t_knots, c, s, t = OmegaLookup(*lookup)
    return (
        *(values.data_ptr(), DTYPES[values.dtype], list(values.shape)),
        *(s_knots.data_ptr(), t_knots.data_ptr(), DTYPES[s_knots.dtype]),
        *(c.data_ptr(), s.data_ptr(), t.data_ptr(), DTYPES[s.dtype]),
    )


def seed(tensor: Tensor | None, value: int | None, first_sample: int) -> tuple[int, int, int, int]:
    """One seed for the batch (stride 0), or one for each sample."""
    if tensor is None:
        return 0, 0, value, first_sample & 0xFFFFFFFF
    if tensor.ndim == 0:
        return tensor.data_ptr(), 0, 0, first_sample & 0xFFFFFFFF
    return tensor.data_ptr(), tensor.stride(0), 0, 0


@contextlib.contextmanager
def current_stream(tensor: Tensor):
    """The address of the current stream of the tensor's GPU, which is the current one for as long as this lasts."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def cuda_column_blocks(like: Tensor) -> int:
    """Into how many parts the CUDA kernels split a sample (`Tiling` in csrc/common/vec.cuh)."""
    return max(1, -(-sizes(like)[1] // 2048))


@contextlib.contextmanager
def partial_sums(total: Tensor | None, blocks: int):
    """Room for `[B, blocks]` parts of a sum per sample; added up in order at the end: no atomics, same bits."""
    if total is None or blocks == 1:
        yield total
        return
    parts = total.new_empty((total.shape[0], blocks))
    yield parts
    torch.sum(parts, 1, out=total)
