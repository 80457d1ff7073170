"""Show tensors in reprs and error messages: by their values, if reading them does not wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.runtime import impls


def readable(tensor: Tensor) -> bool:
    """Return whether there are values to read without a device sync: on the CPU, outside compilation and transforms."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not impls.transforms_active()
        and tensor.numel() > 0
    )


def brief(value) -> str:
    """Format a value for an error message or a repr."""
    if not isinstance(value, Tensor):
        return str(value)
    if not readable(value):
        return f"a tensor of shape {list(value.shape)}"
    shown = ", ".join(f"{one:g}" for one in value.flatten()[:4].tolist())
    return f"[{shown}{', ...' if value.numel() > 4 else ''}]"


def span(values: Tensor) -> str:
    """Format the first and the last value of `[N]` for a repr, or the shape if values cannot be read."""
    if values.ndim != 1 or not readable(values):
        return str(list(values.shape))
    return f"{values[0]:g} to {values[-1]:g}"


def kind(tensor: Tensor) -> str:
    """Format dtype and device for a repr."""
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
