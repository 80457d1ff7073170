"""What launchers share: sizes, rows that a kernel can walk, streams, and sums in two stages."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def sizes(tensor: Tensor) -> tuple[int, int]:
    """(samples, elements of a sample)"""
    batch = tensor.shape[0]
    return batch, tensor.numel() // batch if batch else 0


def with_contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied only if the elements of a sample do not lie next to each other. Samples may lie anywhere."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors of a table as kernels read them."""
    return [tensor.contiguous() for tensor in tensors]


def particle_rows(tensor: Tensor | None) -> Tensor | None:
    """[B, m, ...] as [B m, ...]: a view, unless the particles of neighbouring items lie apart."""
    return None if tensor is None else tensor.flatten(0, 1)


def with_particle_rows(tensor: Tensor | None) -> Tensor | None:
    """[B, m, ...] whose particles are rows a kernel can walk, of all items one after the other: a copy only if not."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    return with_contiguous_rows(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])


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
    """Room for `[B, blocks]` parts of a sum per sample, or of M of them; added up in order at the end: no atomics, same
    bits."""
    if total is None or blocks == 1:
        yield total
        return
    parts = total.new_empty((total.shape[0], blocks, *total.shape[1:]))
    yield parts
    torch.sum(parts, 1, out=total)
