"""Check the arguments of the op. Each message names the argument, its value and what was expected."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd.kernels import KINDS, Energy, Gaussian, Kernel, Polynomial, RationalQuadratic
from lgd_kernels.runtime.checks import DATA_DTYPES, dense, flag, power, smallest
from lgd_kernels.runtime.shown import readable

OP = "energy_mmd"
Precision = Literal["direct", "product"]
PRECISIONS = get_args(Precision)
LEAST_SHARE = 2.0**-40  # weight of the pairs of different samples: below it, 1 - sum p^2 is mostly rounding


class Options(NamedTuple):
    """The options of a call, as users pass them."""

    beta: float = 1.0
    lam: float = 1.0
    unbiased: bool = True
    kernel: Kernel | None = None
    target_term: bool = True
    precision: Precision | None = None
    batched: bool = False


@contextlib.contextmanager
def said_by(op: str) -> Iterator[None]:
    """Name the function that the user called in errors about its arguments."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not str(error).startswith(f"{OP}: "):
            raise
        raise type(error)(f"{op}{str(error)[len(OP) :]}") from None


def call(
    x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, given: Options, part: bool = False
) -> None:
    """Check everything. A `part`, the samples of one process of several, may be empty; the number of samples of all
    processes is checked later."""
    samples(x, y, given.batched, part)
    weights("x_weights", x_weights, "x", x, given.batched)
    weights("y_weights", y_weights, "y", y, given.batched)
    options(*given[:-1])
    if part:
        return
    dimension = 1 if given.batched else 0
    partners(x.shape[dimension], y.shape[dimension], given.lam, given.unbiased, given.target_term)
    for name, own, counts in (("x_weights", x_weights, True), ("y_weights", y_weights, given.target_term)):
        if own is not None and readable(own):
            sums(name, own.sum(-1, dtype=torch.float64).reshape(-1))
            if given.lam > 0 and given.unbiased and counts:
                shares = own.double() / own.amax(-1, keepdim=True)
                shared(name, shares.sum(-1).reshape(-1), shares.square().sum(-1).reshape(-1))


def samples(x: Tensor, y: Tensor, batched: bool, part: bool = False) -> None:
    """Raise TypeError or ValueError unless x and y are two sets of samples of one shape."""
    flag(OP, "batched", batched)
    leading = 2 if batched else 1
    said = "[B, n, ...]" if batched else "[n, ...]"
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: `{name}` is a {type(tensor).__name__}, expected a tensor {said}")
        if tensor.dtype not in DATA_DTYPES:
            raise TypeError(f"{OP}: `{name}` has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
        dense(OP, name, tensor)
        if tensor.ndim < leading or (tensor.shape[leading - 1] == 0 and not part):
            other = 0 if batched else 1
            hint = f"; batched={not batched} if the samples are along the {('first', 'second')[other]} dimension"
            hint = hint if tensor.ndim > other and tensor.shape[other] else ""
            raise ValueError(
                f"{OP}: `{name}` has shape {list(tensor.shape)}, expected {said} with one sample or more{hint}"
            )
    if y.shape[leading:] != x.shape[leading:] or y.shape[: leading - 1] != x.shape[: leading - 1]:
        expected = [*x.shape[: leading - 1], "k", *x.shape[leading:]]
        raise ValueError(
            f"{OP}: `y` has shape {list(y.shape)}, expected [{', '.join(map(str, expected))}] to go with `x` "
            f"{list(x.shape)}; only the number of samples may differ"
        )
    if y.device != x.device:
        raise ValueError(f"{OP}: `y` is on {y.device}, expected {x.device} like `x`; .to(...) moves it")


def finite(op: str, waits: bool = False, **tensors: Tensor | None) -> None:
    """Raise ValueError for NaN and infinity where values can be read; with `waits` on any device, since the caller
    waits anyway."""
    for name, tensor in tensors.items():
        if waits and tensor is not None and tensor.device.type == "meta":
            raise ValueError(f"{op}: `{name}` is on meta, where tensors have no values; expected another device")
        if tensor is not None and (waits or readable(tensor)) and not tensor.isfinite().all():
            raise ValueError(f"{op}: `{name}` holds NaN or infinity, expected numbers")


def weights(name: str, value: Tensor | None, like_name: str, like: Tensor, batched: bool) -> None:
    """Raise TypeError or ValueError unless the weights fit the samples `like`; values only where they can be read."""
    if value is None:
        return
    shape = list(like.shape[: 2 if batched else 1])
    if not isinstance(value, Tensor):
        raise TypeError(f"{OP}: `{name}` is a {type(value).__name__}, expected a tensor {shape}")
    if value.dtype not in DATA_DTYPES:
        raise TypeError(f"{OP}: `{name}` has dtype {value.dtype}, expected float32, bfloat16, float16 or float64")
    dense(OP, name, value)
    if list(value.shape) != shape:
        raise ValueError(
            f"{OP}: `{name}` has shape {list(value.shape)}, expected {shape}, one for each sample of `{like_name}`"
        )
    if value.device != like.device:
        raise ValueError(f"{OP}: `{name}` is on {value.device}, expected {like.device} like `{like_name}`")
    if value.requires_grad:
        raise ValueError(f"{OP}: `{name}` requires grad, but weights have none; pass {name}.detach()")
    if readable(value):
        least, most = smallest(value.flatten()), -smallest(-value.flatten())
        if not (least >= 0 and most < math.inf):
            wrong = most if least >= 0 else least
            raise ValueError(f"{OP}: `{name}` has the value {wrong:g}, expected weights of 0 or more, none infinite")


def sums(name: str, totals: Tensor) -> None:
    """Raise ValueError unless sums of weights, `[B]` in float64, are positive and finite, where they can be read."""
    if readable(totals) and not (smallest(totals) > 0 and -smallest(-totals) < math.inf):
        wrong = next(total for total in totals.tolist() if not 0 < total < math.inf)
        hint = "; divide by the largest" if wrong > 0 else ""
        raise ValueError(f"{OP}: `{name}` has the sum {wrong:g}, expected weights of a positive, finite sum{hint}")


def shared(name: str, totals: Tensor, squares: Tensor) -> None:
    """Raise ValueError if one sample has all the weight, where values can be read: P^2 - sum p^2 is rounding."""
    if readable(totals) and not smallest(totals.square() - squares - LEAST_SHARE * totals.square()) > 0:
        raise ValueError(
            f"{OP}: `{name}` gives one sample all the weight, so there is no pair of different samples; pass lam=0, "
            f"unbiased=False{', target_term=False' if name == 'y_weights' else ''} or weights of two samples or more"
        )


def options(
    beta: float,
    lam: float,
    unbiased: bool,
    kernel: Kernel | None,
    target_term: bool,
    precision: Precision | None,
) -> None:
    """Raise TypeError or ValueError unless every option is valid."""
    for name, value in (("unbiased", unbiased), ("target_term", target_term)):
        if not isinstance(value, bool):
            raise TypeError(f"{OP}: `{name}` is a {type(value).__name__}, expected True or False")
    if kernel is not None and beta != 1.0:
        raise ValueError(
            f"{OP}: `beta` is {beta} beside a `kernel`; leave out one of them: beta={beta} is kernel=Energy({beta})"
        )
    power(OP, kernel.beta if isinstance(kernel, Energy) else beta, lam, False, 2)
    if kernel is not None:
        _kernel(kernel)
    if precision is not None and not (isinstance(precision, str) and precision in PRECISIONS):
        raise ValueError(f"{OP}: `precision` is {precision!r}, expected None, 'direct' or 'product'")


def partners(n: int, k: int, lam: float, unbiased: bool, target_term: bool) -> None:
    """Raise ValueError where a term within a set has no pair of different samples."""
    if lam > 0 and unbiased and min(n, k if target_term else n) < 2:
        raise ValueError(
            f"{OP}: `{'x' if n < 2 else 'y'}` holds one sample, which has no other to be compared with; pass "
            "two or more, lam=0, unbiased=False or, for y, target_term=False"
        )


def _kernel(kernel: Kernel) -> None:
    if not isinstance(kernel, tuple(KINDS.values())):
        names = ", ".join(kind.__name__ for kind in KINDS.values())
        raise TypeError(f"{OP}: `kernel` is a {type(kernel).__name__}, expected one of {names}")
    if isinstance(kernel, Polynomial):
        if isinstance(kernel.degree, bool) or not isinstance(kernel.degree, int) or kernel.degree < 1:
            raise ValueError(f"{OP}: `kernel` has degree {kernel.degree!r}, expected an int of 1 or more")
        return
    if isinstance(kernel, Energy):
        return
    given = kernel.bandwidths if isinstance(kernel, Gaussian) else kernel.bandwidth
    values: list[Any] = list(given) if isinstance(given, (tuple, list)) else [given]
    if isinstance(kernel, RationalQuadratic):
        values.append(kernel.alpha)
    for value in values or [None]:
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{OP}: `kernel` is {kernel}, expected bandwidths (and alpha) that are positive numbers")
