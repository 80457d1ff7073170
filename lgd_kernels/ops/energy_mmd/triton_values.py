"""The MMD kernels of kernels.py as device functions, of squared distances (or products) s: value and derivative. The
formulas and their rounding are those of csrc/energy_mmd/kernels.h, which comments on them.

Also the sets that both Triton kernels compare.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.energy_mmd.structs import MmdKernel

COINCIDE = tl.constexpr(1.17549435e-38)  # below it points coincide: the smallest normal number


@triton.jit
def _nearest(value):
    return (value + 12582912.0) - 12582912.0  # 1.5 * 2^23; |value| < 2^22


@triton.jit
def _scaled_exp(value, shift):
    """Compute exp(value) 2^shift for |value| < 0.4."""
    shift = tl.minimum(tl.maximum(shift, -126.0), 127.0)
    return tl.exp(value) * ((shift.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp_minus(value):
    """Compute exp(-value), value >= 0; the error of tl.exp alone is value times as large."""
    value = tl.where(value < 88.0, value, 88.0)
    shift = _nearest(value * -1.44269504)
    return _scaled_exp(-value - shift * 0.693359375 - shift * -2.12194440e-4, shift)  # ln 2 in two parts


@triton.jit
def _power(value, exponent, high):
    """Compute value^exponent; `high` holds the first 12 bits of the exponent."""
    bits = value.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    whole = e.to(tl.float32)
    z = (m - 1) / (m + 1)
    zz = z * z
    log2m = z * (2.88539008 + zz * (0.961796694 + zz * (0.577078016 + zz * (0.412198583 + zz * 0.320598898))))
    shift = _nearest(high * whole)
    rest = (high * whole - shift) + ((exponent - high) * whole + exponent * log2m)
    more = _nearest(rest)
    return _scaled_exp((rest - more) * 0.693147181, shift + more)


@triton.jit
def value_and_slope(s, parameters, KIND: tl.constexpr, COUNT: tl.constexpr):
    """Return k(s) and k'(s). COUNT is the number of rates of a Gaussian, or the degree of a polynomial."""
    if KIND == "distance":
        r = tl.sqrt(s)
        return r, tl.where(s < COINCIDE, 0.0, 0.5 / r)
    elif KIND == "square":
        return s, tl.where(s == 0, 0.0, tl.where(s == s, 1.0, s))
    elif KIND == "power":
        apart = s >= COINCIDE
        at = tl.where(s < COINCIDE, 1.0, s)
        found = _power(at, parameters[0], parameters[1]) + (at - at)  # NaN and infinity, which have no exponent
        return tl.where(s < COINCIDE, 0.0, found), tl.where(apart, parameters[0] * found / at, 0.0)
    elif KIND == "gaussian":
        value, slope = tl.zeros_like(s), tl.zeros_like(s)
        for i in tl.static_range(COUNT):
            one = _exp_minus(parameters[i] * s) + (s - s)
            value += one
            slope -= parameters[i] * one
        return value * (1.0 / COUNT), slope * (1.0 / COUNT)
    elif KIND == "laplace":
        r = tl.sqrt(s)
        one = _exp_minus(parameters[0] * r) + (s - s)
        return one, tl.where(s < COINCIDE, 0.0, -0.5 * parameters[0] * one / r)
    elif KIND == "rational":
        base = 1 + parameters[0] * s
        found = _power(base, parameters[1], parameters[2]) + (s - s)
        return found, parameters[1] * parameters[0] * found / base
    else:
        at = parameters[0] * s + parameters[1]
        slope = tl.zeros_like(s) + 1.0
        for _ in tl.static_range(COUNT - 1):
            slope *= at
        return slope * at, COUNT * parameters[0] * slope


@triton.jit
def share_of(rows, columns, SAME: tl.constexpr, DIAGONAL: tl.constexpr):
    """Return the share of a pair's value that counts within a set, of which all pairs are computed ("all": half) or
    only those right of the diagonal ("right"); of a point and itself half, or nothing."""
    own: tl.constexpr = 0.5 if DIAGONAL else 0.0
    if SAME == "right":
        return tl.where(columns > rows, 1.0, tl.where(columns == rows, own, 0.0))
    else:
        return tl.where(columns == rows, own, 0.5)


class Points(NamedTuple):
    """A set of points."""

    points: Tensor  # [B, n, D]
    weights: Tensor  # [B, n] float32
    gradient: Tensor | None  # [B, n, D] float32
    norms: Tensor | None = None  # [B, n], squared; None: not needed


class Meeting(NamedTuple):
    """The pairs of two sets, or within one."""

    x: Points
    y: Points
    coefficient: Tensor  # [B] float64
    diagonal: bool = False  # within a set: whether a point and itself count

    @property
    def same(self) -> bool:
        return self.x is self.y


class Values(NamedTuple):
    """An MMD kernel as the three last arguments of `value_and_slope`."""

    parameters: tuple[float, ...]
    KIND: str
    COUNT: int = 1

    @staticmethod
    def of(kernel: MmdKernel) -> Values:
        name, parameters = kernel
        if name == "energy" and parameters[0] in (1.0, 2.0):
            return Values((0.0,), "distance" if parameters[0] == 1 else "square")
        if name == "energy":
            return Values(_exponent(parameters[0] / 2), "power")
        if name == "gaussian":
            return Values(tuple(float(rate) for rate in parameters), name, len(parameters))
        if name == "laplace":
            return Values((1 / parameters[0],), name)
        if name == "rational":
            bandwidth, alpha = parameters
            return Values((0.5 / (alpha * bandwidth**2), *_exponent(-alpha)), name)
        degree, scale, offset = parameters
        return Values((float(scale), float(offset)), name, int(degree))


def _exponent(value: float) -> tuple[float, float]:
    """Return the number and its first 12 bits."""
    near = np.float32(value)
    return value, float((near.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32))
