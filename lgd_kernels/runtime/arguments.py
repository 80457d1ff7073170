"""From what users write to what operators take, and back: operator schemas know tensors and numbers only.

omega and churn are a number or a tensor `[B]`; omega may also be looked up in a table. An operator takes each as
`(Tensor?, float)`, and the table as a list of the tensors of an `OmegaLookup`, empty if there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import OmegaLookup, arithmetic_dtype, table_gradient, widest


def split_number(value: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """(tensor, 0.0) or (None, number). Under compilation a number becomes a tensor: there it would be a constant of
    the graph, compiled again for each value."""
    if isinstance(value, Tensor):
        return value, 0.0
    if torch.compiler.is_compiling():
        ones = torch.ones(like.shape[:1], dtype=arithmetic_dtype(like), device=like.device)
        return ones * value, 0.0  # full() would keep the constant
    return None, float(value)


def split_omega(omega: float | Tensor | OmegaLookup, like: Tensor) -> tuple[Tensor | None, float, list[Tensor]]:
    if isinstance(omega, OmegaLookup):
        return None, 0.0, list(omega)
    return *split_number(omega, like), []


def join_omega(omega: Tensor | None, value: float, table: list[Tensor]) -> float | Tensor | OmegaLookup:
    if table:
        return OmegaLookup(*table)
    return value if omega is None else omega


def to_omega(grad: Tensor, omega: Tensor | None, table: list[Tensor], impl: str = "reference") -> Tensor:
    """A gradient `[B]` as that of what omega came from: a tensor, or the values of a table."""
    if not table:
        return grad if grad.dtype == omega.dtype else grad.to(omega.dtype)
    if impl != "cpu":
        return table_gradient(OmegaLookup(*table), grad)
    dtype = widest(grad.dtype, *(tensor.dtype for tensor in table))  # as table_cells gives the weights
    total = torch.zeros(table[0].shape, dtype=dtype, device="cpu")
    impls.extension().spread_over_table(total, grad.to(dtype).contiguous(), contiguous(table))
    return total.to(table[0].dtype)


def empty_sums(upstream: Tensor, omega: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Room for d_omega, `[B]`. (Likening it to an omega of that dtype takes a third of the time.)"""
    if omega is not None and omega.dtype == dtype:
        return torch.empty_like(omega, memory_format=torch.contiguous_format)
    return torch.empty(upstream.shape[:1], device=upstream.device, dtype=dtype)


def contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """A table as the kernels read it."""
    return [tensor.contiguous() for tensor in tensors]


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of them does."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def split_seed(seed: int | Tensor | None) -> tuple[Tensor | None, int | None]:
    return (seed, None) if isinstance(seed, Tensor) else (None, seed)
