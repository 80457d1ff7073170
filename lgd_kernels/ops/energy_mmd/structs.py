"""Arguments of the op, in the order of the structs in csrc/energy_mmd/energy_mmd.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.runtime.levels import widest


class MmdKernel(NamedTuple):
    """The function k that pairs of points are compared by, of kernels.py."""

    name: str
    parameters: list[float]

    @property
    def of_product(self) -> bool:
        """Whether k is a function of <x, y>, not of ||x - y||^2."""
        return self.name == "polynomial"

    @property
    def factor(self) -> float:
        """The factor of E k(x, y) - lam/2 (...): MMD^2 is -2 times that; the energy is minus a kernel, and halved."""
        return 1.0 if self.name == "energy" else -2.0


class EnergyMmd(NamedTuple):
    x: Tensor  # [B, n, D]
    y: Tensor  # [B, k, D]
    x_weights: Tensor | None  # [B, n]
    y_weights: Tensor | None  # [B, k]
    kernel: MmdKernel
    lam: float
    unbiased: bool
    between: bool  # whether the term of x with y counts; if not, y only gives the origin of products
    target_term: bool  # whether the term within y counts
    precision: str | None
    wanted: list[bool]  # whether x and y get a gradient

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic dtype, and that of loss and gradients."""
        return widest(self.x.dtype, self.y.dtype)

    def weighted(self, x_weights: Tensor | None, y_weights: Tensor | None) -> EnergyMmd:
        """Return the struct with these weights in place of its own."""
        if x_weights is self.x_weights and y_weights is self.y_weights:
            return self
        return self._replace(x_weights=x_weights, y_weights=y_weights)

    def converted(self) -> EnergyMmd:
        """Return the struct with points and weights in the arithmetic dtype."""
        dtype = self.dtype
        if all(one is None or one.dtype == dtype for one in self[:4]):
            return self
        p, q = (None if one is None else one.to(dtype) for one in (self.x_weights, self.y_weights))
        return self._replace(x=self.x.to(dtype), y=self.y.to(dtype), x_weights=p, y_weights=q)


class EnergyMmdBackward(NamedTuple):
    upstream: Tensor  # [B]
    d_x: Tensor | None  # gradients for an upstream gradient of 1
    d_y: Tensor | None
    call: EnergyMmd


class ProductBlock(NamedTuple):
    """A block of pairs whose products are known. The kernel turns products into weights of pairs."""

    products: Tensor  # [rows, columns]
    x: Tensor  # [rows, D]
    y: Tensor  # [columns, D]
    x_norms: Tensor | None  # [rows], squared; absent for kernels of products
    y_norms: Tensor | None
    x_weights: Tensor
    y_weights: Tensor
    kernel: MmdKernel
    closest: float  # pairs nearer than this share of the norms are taken from differences
    same: bool  # x is y: pairs with i < j alone
