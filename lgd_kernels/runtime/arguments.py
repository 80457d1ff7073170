"""Structs that ops share, as csrc/ has them: a number, omega, a seed, and all that a step needs of a sample.

Operators take tensors and numbers only, so each struct is made of both, one of them absent: `of` makes it from what
users pass, and `given` returns that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import Levels, OmegaLookup, arithmetic_dtype, table_gradient, widest


class Number(NamedTuple):
    """A number, or one for each sample, `[B]` (`PerSample` in csrc/common/scalar.h)."""

    tensor: Tensor | None
    value: float

    @staticmethod
    def of(value: float | Tensor, like: Tensor) -> Number:
        """Make a tensor of a number under compilation, where it would be a constant, compiled again for each value."""
        if isinstance(value, Tensor):
            return Number(value, 0.0)
        if torch.compiler.is_compiling():
            ones = torch.ones(like.shape[:1], dtype=arithmetic_dtype(like), device=like.device)
            return Number(ones * value, 0.0)  # full() would keep the constant
        return Number(None, float(value))

    def given(self) -> float | Tensor:
        return self.value if self.tensor is None else self.tensor


class Omega(NamedTuple):
    """A number, one for each sample, or the fields of an `OmegaLookup` (`Omega` in csrc/common/levels.h)."""

    tensor: Tensor | None
    value: float
    table: list[Tensor]  # empty if omega is not looked up

    @staticmethod
    def of(omega: float | Tensor | OmegaLookup, like: Tensor) -> Omega:
        if isinstance(omega, Tensor):
            return Omega(omega, 0.0, [])
        if isinstance(omega, OmegaLookup):
            return Omega(None, 0.0, list(omega))
        if torch.compiler.is_compiling():
            return Omega(*Number.of(omega, like), [])
        return Omega(None, float(omega), [])

    def given(self) -> float | Tensor | OmegaLookup:
        if self.table:
            return OmegaLookup(*self.table)
        return self.value if self.tensor is None else self.tensor

    @property
    def leaf(self) -> Tensor | None:
        """The tensor that may get a gradient: omega itself, or the values of the table."""
        return self.table[0] if self.table else self.tensor


class Seed(NamedTuple):
    """Absent; one for the batch; or one for each sample, `[B]` (`Seed` in csrc/common/philox.h)."""

    tensor: Tensor | None
    value: int | None
    first_sample: int

    @staticmethod
    def of(seed: int | Tensor | None, first_sample: int) -> Seed:
        if seed is None:
            return ABSENT
        return Seed(seed, None, first_sample) if isinstance(seed, Tensor) else Seed(None, seed, first_sample)

    def given(self) -> int | Tensor | None:
        return self.value if self.tensor is None else self.tensor


ABSENT = Seed(None, None, 0)


class StepScalars(NamedTuple):
    """All that a guided step needs of a sample (`StepScalars` in csrc/common/levels.h)."""

    omega: Omega
    levels: list[Tensor]
    prediction: str
    churn: Number

    def given(self) -> tuple[float | Tensor | OmegaLookup, Levels, str, float | Tensor]:
        return self.omega.given(), Levels(*self.levels), self.prediction, self.churn.given()


def to_leaf(grad: Tensor, omega: Omega, impl: str = "reference") -> Tensor:
    """A gradient `[B]` to omega as that of `omega.leaf`."""
    if omega.tensor is not None:
        return grad if grad.dtype == omega.tensor.dtype else grad.to(omega.tensor.dtype)
    if impl != "cpu":
        return table_gradient(OmegaLookup(*omega.table), grad)
    dtype = widest(grad.dtype, *(tensor.dtype for tensor in omega.table))  # as table_cells gives the weights
    total = torch.zeros(omega.table[0].shape, dtype=dtype, device="cpu")
    impls.extension().spread_over_table(total, grad.to(dtype).contiguous(), omega)
    return total.to(omega.table[0].dtype)


def empty_sums(upstream: Tensor, omega: Omega, dtype: torch.dtype) -> Tensor:
    """Allocate d_omega, `[B]`. (empty_like of an omega of that dtype takes a third of the time.)"""
    like = omega.tensor
    if like is not None and like.dtype == dtype:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(upstream.shape[:1], device=upstream.device, dtype=dtype)


def requires_grad(*tensors: Tensor | None) -> bool:
    """Return whether one of the tensors does."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False
