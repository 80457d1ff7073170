"""Check a call."""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fuzz import functions
from fuzz.inputs import Call, Spec, Target, build
from fuzz.known import KNOWN
from lgd_kernels.runtime.levels import OmegaLookup


class Fault(NamedTuple):
    """An error of a call. Two calls with the same `key` count as one fault."""

    function: str
    what: str
    detail: str

    @property
    def key(self) -> tuple[str, str]:
        return self.function, re.sub(r"-?\d[\d.e+-]*", "#", f"{self.what}: {self.detail}")[:160]

    @property
    def known(self) -> bool:
        return any(function in (self.function, "*") and re.search(pattern, f"{self.what}: {self.detail}")
                   for function, pattern in KNOWN)  # fmt: skip

    def __str__(self) -> str:
        return f"{self.function}: {self.what}: {self.detail}"


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def low_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


SURROUNDINGS = {  # none of them changes a bit
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": default_device,
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "low matmul precision": low_precision,
}


class Refused(NamedTuple):
    error: Exception


def outcome(call: Call, threads: int = 1, around: str = "") -> list[Tensor] | Refused:
    """Return what a call returns or raises, on fresh arguments."""
    arguments = call.build()
    torch.set_num_threads(threads)
    try:
        with SURROUNDINGS[around]():
            return functions.tensors_of(functions.called(call.function, arguments))
    except Exception as error:
        return Refused(error)
    finally:
        torch.set_num_threads(1)


def check(call: Call) -> Fault | None:
    """Return the first fault of this call, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(call)


def _check(call: Call) -> Fault | None:
    def fault(what, detail=""):
        return Fault(call.function, what, " ".join(str(detail).split())[:300])

    try:
        arguments = call.build()
        held = {id(one): one for one in _held(arguments)}.values()
    except Exception as error:
        raise RuntimeError(f"the arguments of {call!r} cannot be made") from error
    before = [(one, _version(one), one.detach().clone()) for one in held if one.device.type == "cpu"]
    try:
        found = functions.called(call.function, arguments)
    except Exception as error:
        found = Refused(error)
    for one, version, copy in before:
        if version != _version(one):
            return fault("an input was written to", list(one.shape))
        if not _same([one.detach()], [copy]):
            return fault("an input has changed", list(one.shape))
    if isinstance(found, Refused):
        return _refused(call, found.error, fault)
    found = functions.tensors_of(found)
    wrong = functions.dtypes(call.function, arguments, found)
    if wrong:
        return fault("result", wrong)
    if any(tensor.device.type != "cpu" for tensor in found):
        return None
    for what, other in (
        ("called again", outcome(call)),
        *([("on two threads", outcome(call, threads=2))] if call.function not in functions.LINEAR_ALGEBRA else []),
        *([(call.around, outcome(call, around=call.around))] if call.around else []),
    ):
        if isinstance(other, Refused):
            return fault(f"raises {what}", f"{type(other.error).__name__}: {other.error}")
        # a call that records a gradient takes another path, and may round otherwise
        recorded = what in ("no_grad", "inference_mode") and any(one.requires_grad for one in _held(arguments))
        if not _same(found, other) and not recorded:
            return fault("other bits", what)
    return _exactness(call, arguments, found, fault) or _gradients(call, fault)


def _refused(call: Call, error: Exception, fault) -> Fault | None:
    """Check that an error is a TypeError or ValueError that begins with the function's name, and no valid call's."""
    said = f"{type(error).__name__}: {error}"
    if str(error).startswith("Inference tensors cannot be saved for backward"):
        return None  # as in any function of torch
    if isinstance(error, NotImplementedError) and any(
        getattr(one, "kind", "") == "meta" for one in _specs(call.arguments)
    ):
        return None  # there are no values
    if not isinstance(error, (TypeError, ValueError, NotImplementedError)):
        return fault("raises another error", said)
    names = (
        call.function,
        functions.NAMED.get(call.function, call.function),
        call.arguments.get("solver", call.function),
    )
    if not str(error).startswith(tuple(names)):
        return fault("an error that does not name the function", said)
    return fault("a good call is refused", said) if call.good and not _may_refuse(call, str(error)) else None


def _may_refuse(call: Call, said: str) -> bool:
    """Return whether the documentation refuses a call that the strategies draw."""
    finite = all(functions.finite(one) for one in _held(call.build()))
    samples = ("median_bandwidth", "mmd_test", "kernel_inception_distance", "frechet_distance")
    return not finite and call.function in samples


def _exactness(call: Call, arguments, found, fault) -> Fault | None:
    plain = _plain(arguments)
    with torch.no_grad():
        try:
            expected = functions.truths(call.function, plain)
        except (TypeError, ValueError) as error:
            return fault("only the reference refuses", error) if call.good else None
        if expected is None:
            good = call.good and functions.finite(list(_held(plain)))
            bad = good and _ordinary(call) and not functions.finite(found[:1])
            return fault("not finite", found[0].flatten()[:4].tolist()) if bad else None
        found = _plain(found)
        reference, truth = expected
        for k, r in zip(found, reference, strict=False):
            if k.shape != r.shape:
                return fault("shape", f"{list(k.shape)}, the reference has {list(r.shape)}")
        if not (functions.finite(truth) and functions.finite(reference)):
            for k, r in zip(found, reference, strict=True):
                if not torch.equal(k.isnan(), r.isnan()) and _ordinary(call):
                    return fault("NaN where the reference has none, or the other way round", "")
            return None
        if not _ordinary(call):
            return None
        try:
            functions.compare(call.function, plain, found, reference, truth)
        except AssertionError as error:
            return fault("further from float64 than the budget", error)
    return None


def _gradients(call: Call, fault) -> Fault | None:
    """Check the gradients of data that require grad: within 1e-4 of the largest, and twice the reference's error."""
    names = [name for name, one in call.arguments.items() if getattr(one, "kind", "") in ("requires_grad", "parameter")
             and len(one.shape) > 1 and (call.function, name) != ("step_with_log_prob", "noise")]  # fmt: skip
    if (
        not names
        or call.arguments.get("precision") == "product"
        or call.function not in functions.HAVE_REFERENCE
        or not _ordinary(call)
    ):
        return None

    def of(widen: bool, impl: dict):
        arguments = call.build() | impl
        arguments = functions.widened(_plain(arguments)) if widen else arguments
        leaves = [arguments[name].detach().requires_grad_() for name in names]
        found = functions.tensors_of(functions.called(call.function, arguments | dict(zip(names, leaves, strict=True))))
        found = [one for one in found if one.requires_grad]
        return torch.autograd.grad(sum(one.double().sum() for one in found), leaves) if found else []

    try:
        found, reference, truth = of(False, {}), of(False, {"impl": "reference"}), of(True, {"impl": "reference"})
    except RuntimeError as error:
        return None if "nference" in str(error) else fault("no gradient", error)
    if not len(found) == len(reference) == len(truth):
        return fault("gradient", "only one of the kernel and the reference has one")
    for name, k, r, t in zip(names[: len(found)], found, reference, truth, strict=True):
        k, r = _plain(k), _plain(r)
        if k.dtype != r.dtype or k.shape != r.shape:
            return fault("gradient", f"of `{name}`: {k.dtype} {list(k.shape)}, expected {r.dtype} {list(r.shape)}")
        if not t.numel() or not t.isfinite().all() or not r.isfinite().all():
            continue
        largest = max(1e-3, t.abs().max())  # a gradient that is 0 in truth is the rounding of its terms
        limit = 2 * (r.double() - t).abs().max() + (torch.finfo(k.dtype).eps + 1e-4) * largest
        if not (k.double() - t).abs().max() <= limit:
            return fault("gradient", f"of `{name}` is {(k.double() - t).abs().max():.3g} off, allowed {limit:.3g}")
    return None


def _ordinary(call: Call) -> bool:
    """Return whether the error budget covers a call: numbers of ordinary size, and enough of them for rules."""
    specs = list(_specs(call.arguments))
    usual = all(getattr(one, "special", "") in ("", "all zero", "huge") for one in specs)
    ruled = call.arguments.get("rule") is not None
    odd = any(getattr(one, "special", "") or getattr(one, "kind", "") == "zeros" for one in specs)
    sizes = [one.shape for one in specs if hasattr(one, "shape") and len(one.shape) > 1]
    few = any(torch.Size(shape[1:]).numel() < 16 for shape in sizes) or any(len(one) < 2 for one in sizes)
    flat = any(getattr(one, "layout", "") in ("one element", "expanded") for one in specs)
    return call.good and usual and not (ruled and (odd or few or flat))


def _specs(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _specs(one)
    elif isinstance(value, Spec):
        yield value
        if isinstance(value, Target):
            yield from _specs((value.x0, value.seed))


def _held(value):
    """Return every plain tensor among the arguments."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, dict):
        yield from _held(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _held(one)


def _plain(value):
    """Return the same values in plain tensors without autograd history."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.as_subclass(Tensor).resolve_neg().clone() if value.device.type == "cpu" else value
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, OmegaLookup) or hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    return type(value)(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Compare bit for bit; all NaNs are equal."""
    if len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        one, other = _plain(one), _plain(other)
        if one.is_complex() and other.is_complex():
            one, other = (torch.view_as_real(each.resolve_conj()) for each in (one, other))
        if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
            return False
        if one.dtype.itemsize == 1:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        if one.is_floating_point():
            if not torch.equal(one.nan_to_num(0.0, float("inf"), -float("inf")),
                               other.nan_to_num(0.0, float("inf"), -float("inf"))):  # fmt: skip
                return False
            if not torch.equal(one.isnan(), other.isnan()):
                return False
        elif not torch.equal(one, other):
            return False
    return True


__all__ = ["Fault", "build", "check"]
