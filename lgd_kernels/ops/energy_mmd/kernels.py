"""The MMD kernels k(x, y) that samples are compared by. To add one, write a NamedTuple here with its name in `KINDS`,
and a functor of the same formula in `csrc/energy_mmd/kernels.h` (docs/energy_mmd.md).

Each is a function of the squared distance s = ||x - y||^2 (`of_product`: of the product <x, y>), with its derivative.
Points that coincide have slope 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd.structs import MmdKernel


class Energy(NamedTuple):
    """||x - y||^beta, beta in (0, 2]: minus a kernel, and the default of energy_mmd.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.energy_mmd(torch.zeros(1, 1), torch.full((1, 1), 4.0), kernel=lgd.Energy(0.5), lam=0.0)
    tensor(2.)
    """

    beta: float = 1.0

    @property
    def of_product(self) -> bool:
        return False

    def value(self, s: Tensor) -> Tensor:
        return torch.where(s == 0, 0.0, _positive(s) ** (self.beta / 2))

    def slope(self, s: Tensor) -> Tensor:
        return torch.where(s == 0, 0.0, self.beta / 2 * _positive(s) ** (self.beta / 2 - 1))


class Gaussian(NamedTuple):
    """exp(-s / (2 bandwidth^2)), for a tuple of bandwidths the mean over them.

    >>> import torch, lgd_kernels as lgd
    >>> two = lgd.energy_mmd(torch.zeros(1, 1), torch.ones(1, 1), kernel=lgd.Gaussian((1.0, 2.0)), unbiased=False)
    >>> round(two.item(), 4)  # 2 - exp(-1/2) - exp(-1/8)
    0.511
    """

    bandwidths: float | tuple[float, ...] = 1.0

    @property
    def of_product(self) -> bool:
        return False

    def rates(self) -> list[float]:
        """Return 1 / (2 bandwidth^2) for each bandwidth."""
        bandwidths = self.bandwidths if isinstance(self.bandwidths, (tuple, list)) else (self.bandwidths,)
        return [0.5 / bandwidth**2 for bandwidth in bandwidths]

    def value(self, s: Tensor) -> Tensor:
        return sum(((-rate * s).exp() for rate in self.rates()), torch.zeros_like(s)) / len(self.rates())

    def slope(self, s: Tensor) -> Tensor:
        return sum((-rate * (-rate * s).exp() for rate in self.rates()), torch.zeros_like(s)) / len(self.rates())


class Laplace(NamedTuple):
    """exp(-||x - y|| / bandwidth).

    >>> import torch, lgd_kernels as lgd
    >>> one = lgd.energy_mmd(torch.zeros(1, 1), torch.ones(1, 1), kernel=lgd.Laplace(1.0), unbiased=False)
    >>> round(one.item(), 4)  # 2 - 2 exp(-1)
    1.2642
    """

    bandwidth: float = 1.0

    @property
    def of_product(self) -> bool:
        return False

    def value(self, s: Tensor) -> Tensor:
        return torch.where(s == 0, 1.0, (-_positive(s).sqrt() / self.bandwidth).exp())

    def slope(self, s: Tensor) -> Tensor:
        r = _positive(s).sqrt()
        return torch.where(s == 0, 0.0, -0.5 / (self.bandwidth * r) * (-r / self.bandwidth).exp())


class RationalQuadratic(NamedTuple):
    """(1 + s / (2 alpha bandwidth^2))^-alpha; alpha = 1/2, the default, is the inverse multiquadric.

    >>> import torch, lgd_kernels as lgd
    >>> one = lgd.energy_mmd(torch.zeros(1, 1), torch.ones(1, 1), kernel=lgd.RationalQuadratic(), unbiased=False)
    >>> round(one.item(), 4)  # 2 - 2 / sqrt(2)
    0.5858
    """

    bandwidth: float = 1.0
    alpha: float = 0.5

    @property
    def of_product(self) -> bool:
        return False

    def value(self, s: Tensor) -> Tensor:
        return (1 + s / (2 * self.alpha * self.bandwidth**2)) ** -self.alpha

    def slope(self, s: Tensor) -> Tensor:
        scale = 2 * self.alpha * self.bandwidth**2
        return -self.alpha / scale * (1 + s / scale) ** (-self.alpha - 1)


class Polynomial(NamedTuple):
    """(scale <x, y> + offset)^degree; scale None is 1 / D. The defaults are those of KID (arXiv 1801.01401).

    >>> import torch, lgd_kernels as lgd
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
    >>> lgd.energy_mmd(x, y, kernel=lgd.Polynomial())  # (1 + 1)^3 + 1 - 2
    tensor(7.)
    """

    degree: int = 3
    scale: float | None = None
    offset: float = 1.0

    @property
    def of_product(self) -> bool:
        return True

    def value(self, s: Tensor) -> Tensor:
        assert self.scale is not None  # split_kernel sets it
        return (self.scale * s + self.offset) ** self.degree

    def slope(self, s: Tensor) -> Tensor:
        assert self.scale is not None
        return self.degree * self.scale * (self.scale * s + self.offset) ** (self.degree - 1)


Kernel = Energy | Gaussian | Laplace | RationalQuadratic | Polynomial
KINDS: dict[str, type[Any]] = {
    "energy": Energy,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "rational": RationalQuadratic,
    "polynomial": Polynomial,
}


def split_kernel(kernel: Kernel, dimension: int) -> MmdKernel:
    """Return the name and the parameters, as the operator takes them."""
    name = next(name for name, kind in KINDS.items() if isinstance(kernel, kind))
    if isinstance(kernel, Gaussian):
        return MmdKernel(name, kernel.rates())
    if isinstance(kernel, Polynomial):
        scale = 1 / max(dimension, 1) if kernel.scale is None else kernel.scale
        return MmdKernel(name, [float(kernel.degree), float(scale), float(kernel.offset)])
    return MmdKernel(name, [float(parameter) for parameter in kernel])


def join_kernel(name: str, parameters: list[float]) -> Kernel:
    """Return the kernel of this name with these parameters."""
    if name == "gaussian":
        return Gaussian(tuple(math.sqrt(0.5 / rate) for rate in parameters))
    return KINDS[name](*parameters)


def _positive(s: Tensor) -> Tensor:
    """Return s, and 1 where s is 0: the branch that `where` drops must not have an infinite slope."""
    return torch.where(s == 0, 1.0, s)
