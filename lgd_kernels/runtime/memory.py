"""Helpers of launchers: sizes, rows that a kernel can walk, launches on a CUDA stream, and sums in two stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

# Without the Stream object that torch.cuda.current_stream makes. Triton calls it too, but the name is private to torch.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def sizes(tensor: Tensor) -> tuple[int, int]:
    """Return the number of samples and that of the elements of a sample."""
    batch = tensor.shape[0]
    return batch, tensor.numel() // batch if batch else 0


@overload
def with_contiguous_rows(tensor: Tensor) -> Tensor: ...
@overload
def with_contiguous_rows(tensor: None) -> None: ...
def with_contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, copied only if the elements of a sample are not contiguous. Samples may lie anywhere."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def particle_rows(tensor: Tensor | None) -> Tensor | None:
    """Reshape [B, m, ...] to [B m, ...]: a view, unless the particles of neighbouring items lie apart."""
    return None if tensor is None else tensor.flatten(0, 1)


def launch_cuda(function: Callable[..., None], *arguments: Any, like: Tensor) -> None:
    """Call `function(*arguments, stream)` of the CUDA extension on the current stream of the GPU of `like`."""
    if on_current_device(like):
        function(*arguments, raw_stream(like.get_device()))
    else:
        with torch.cuda.device(like.device):
            function(*arguments, raw_stream(like.get_device()))


def on_current_device(tensor: Tensor) -> bool:
    """Return whether the tensor is on the current GPU. (`torch.cuda.device` costs the host more than this question.)"""
    return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()


def raw_stream(index: int) -> int:
    """Return the address of the current stream of a GPU."""
    return _raw_stream(index) if _raw_stream else torch.cuda.current_stream(index).cuda_stream


def cuda_column_blocks(like: Tensor) -> int:
    """Return the number of parts into which the CUDA kernels split a sample (`Tiling` in csrc/common/vec.cuh)."""
    return max(1, -(-sizes(like)[1] // 2048))


@contextlib.contextmanager
def partial_sums(total: Tensor | None, blocks: int):
    """Yield memory for `[B, blocks]` parts of a sum per sample, or of M sums, and add the parts up in order on leaving.

    So no kernel needs atomics, and the same inputs give the same bits."""
    if total is None or blocks == 1:
        yield total
        return
    parts = total.new_empty((total.shape[0], blocks, *total.shape[1:]))
    yield parts
    torch.sum(parts, 1, out=total)
