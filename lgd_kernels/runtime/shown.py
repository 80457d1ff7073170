"""Show tensors in reprs and error messages: by their values, if reading these takes no device sync."""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.runtime import impls


def readable(tensor: Tensor) -> bool:
    """Return whether values can be read without a device sync: on the CPU, not empty, outside a trace or transform."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not impls.transforms_active()
        and tensor.numel() > 0
    )


def brief(value: object) -> str:
    """Return a value as an error message shows it."""
    if not isinstance(value, Tensor):
        return str(value)
    if not readable(value):
        return f"a tensor of shape {list(value.shape)}"
    shown = ", ".join(f"{one:g}" for one in value.flatten()[:4].tolist())
    return f"[{shown}{', ...' if value.numel() > 4 else ''}]"


def span(values: Tensor) -> str:
    """Return the first and the last value of `[N]` for a repr, or the shape if values are not readable."""
    if values.ndim != 1 or not readable(values):
        return str(list(values.shape))
    return f"{values[0]:g} to {values[-1]:g}"


def kind(tensor: Tensor) -> str:
    """Return dtype and device, for a repr."""
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
