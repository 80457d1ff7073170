"""Choose the implementation that runs, and give the reasons why the others do not.

Every op has up to four: "cuda", "triton", "cpu" (C++) and "reference" (plain PyTorch). An explicit `impl=` runs that
one or raises. `impl=None` takes the first of `ORDER` that can run. Each op lists its implementations, with the dtypes
of each, as `IMPLEMENTATIONS` in its `op.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lgd_kernels.runtime import builds

Impl = Literal["cuda", "triton", "cpu", "reference"]
NAMES = get_args(Impl)
# The automatic choice, by device; other devices run the reference. CUDA comes before Triton because its launch takes
# the host a fifth of the time. The kernels of neither have been timed on a GPU yet.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

HALF = frozenset((torch.bfloat16, torch.float16))
FLOATS = HALF | {torch.float32}
ALL_FLOATS = FLOATS | {torch.float64}

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
try:
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _tracer, _profiled = torch._C._get_tracing_state, torch._C._autograd._profiler_enabled
except AttributeError:  # a torch that renamed these private functions: every call is dispatched
    _dispatch_modes = lambda: 1  # noqa: E731


def available_impls(op: str, device: torch.device | str = "cpu") -> tuple[Impl, ...]:
    """Return the implementations of `op` that run on `device` for float32 tensors, the automatic choice first.

    The device need not be present: for "cuda" the result is what would run there.

    >>> import lgd_kernels as lgd
    >>> "reference" in lgd.available_impls("guided_step", "cpu")
    True
    """
    device = torch.device(device).type
    order = ORDER.get(device, ("reference",))
    rest = [impl for impl in NAMES if impl not in order]
    return tuple(impl for impl in (*order, *rest) if not _reasons(op, impl, device, (torch.float32,)))


def why_not(op: str, impl: Impl, *tensors: Tensor, device: torch.device | str | None = None) -> list[str]:
    """Return every reason why `impl` of `op` cannot run on these tensors (or on `device`); [] if it can.

    Pass the tensors in the order of the op's arguments: for `guided_energy` x, cond, uncond and the target.

    >>> import torch, lgd_kernels as lgd
    >>> lgd.why_not("guided_step", "reference", torch.ones(2, 3))
    []
    """
    if impl not in NAMES:
        raise ValueError(f"why_not: `impl` is {impl!r}, expected one of {', '.join(NAMES)}")
    for n, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"why_not: `tensors[{n}]` is a {type(tensor).__name__}, expected a tensor of the call")
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    dtypes = tuple(dict.fromkeys(tensor.dtype for tensor in tensors))
    reasons = list(_reasons(op, impl, torch.device(device).type, dtypes))
    unfit = getattr(_op_module(op), "unfit", None)  # for reasons that depend on shapes
    return reasons + (unfit(impl, *tensors) if unfit and tensors else [])


def choose(op: str, impl: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    """Return the implementation that runs. Raise ValueError with every reason if an explicit one cannot."""
    try:
        return _choose(op, impl, device.type, dtypes)
    except TypeError:  # impl cannot be hashed
        return named(op, impl)


def named(op: str, impl: str | None) -> str:
    """Return `impl` if it is one of the four names; raise otherwise."""
    if not isinstance(impl, str):
        raise TypeError(f"{op}: `impl` is a {type(impl).__name__}, expected None or one of {', '.join(NAMES)}")
    if impl not in NAMES:
        raise ValueError(f"{op}: `impl` is {impl!r}, expected None or one of {', '.join(NAMES)}")
    return impl


@functools.cache
def launcher(op: str, impl: str):
    """Return what launches an implementation's kernels: functions `forward(outputs, struct)` and `backward`.

    It is the module `lgd_kernels/ops/<op>/<impl>.py`. On the CPU an op needs one only if it does more than to call its
    binding.
    """
    module = f"lgd_kernels.ops.{op}.{impl}"
    if impl == "cpu" and importlib.util.find_spec(module) is None:
        bindings = extension()
        return Bindings(*(_with_threads(getattr(bindings, name, None)) for name in (op, f"{op}_backward")))
    return importlib.import_module(module)


class Bindings(NamedTuple):
    """The launcher of an op whose bindings in `_C` take (outputs, struct, threads)."""

    forward: Callable[[Any, tuple], None]
    backward: Callable[[Any, tuple], None]


def _with_threads(binding: Any) -> Callable[[Any, tuple], None]:
    return lambda outputs, arguments: binding(outputs, arguments, torch.get_num_threads())


def through_reference(op: str, impl: str | None) -> bool:
    """Return whether a call must run as plain PyTorch: because of its `impl`, or under vmap, jvp or func.grad."""
    if impl is None:
        return transforms_active()
    if named(op, impl) == "reference":
        return True
    if not transforms_active():
        return False
    raise ValueError(f"{op}: impl={impl!r} has no rule for vmap, jvp or func.grad; impl=None takes the reference there")


def direct(*tensors: Tensor | None) -> bool:
    """Return whether a call may skip the dispatcher, which costs more than a small step.

    It may if no compilation, tracer, profiler, dispatch mode or subclass is active, and the memory of each tensor holds
    its values.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or _tracer() is not None or _profiled():
        return False
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    for tensor in tensors:  # is_lazy, inlined: a call for each tensor takes twice as long
        if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()):
            return False
    return True


def is_lazy(tensor: Tensor) -> bool:
    """Return whether memory does not hold the values: a negative view, or a zero of forward AD, which has no memory."""
    return tensor.is_neg() or tensor._is_zerotensor()


def ops() -> list[str]:
    """Return the names of all ops: the packages in `lgd_kernels.ops`."""
    return sorted(module.name for module in pkgutil.iter_modules([str(builds.PACKAGE / "ops")]) if module.ispkg)


def transforms_active() -> bool:
    """Return whether vmap, func.grad, jvp or forward AD is active, where the differentiable reference runs."""
    try:
        if torch._C._are_functorch_transforms_active():
            return True
        return torch.autograd.forward_ad._current_level >= 0
    except AttributeError:  # a torch that renamed them: ordinary autograd still works
        return False


def transformed() -> bool:
    """Return whether compilation or a function transform is active."""
    return torch.compiler.is_compiling() or transforms_active()


def batched(upstream: Tensor) -> bool:
    """Return whether a gradient is a batch in disguise, as in `torch.autograd.grad(..., is_grads_batched=True)`."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream)


def vmapped() -> bool:
    """Return whether vmap is active at any depth. (Compilation hides it.)"""
    if torch.compiler.is_compiling() or not transforms_active():
        return False
    functorch = torch._C._functorch
    return any(level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ())


def extension():
    """Return the C++ module `lgd_kernels._C`, or None if it was not built."""
    return _load("_C")[0]


def extension_error() -> str:
    """Return why `_C` is missing, or ""."""
    return _load("_C")[1]


def cuda_extension():
    """Return the CUDA module `lgd_kernels._C_cuda`, or None if it was not built."""
    return _load("_C_cuda")[0]


def cuda_extension_error() -> str:
    """Return why `_C_cuda` is missing, or ""."""
    return _load("_C_cuda")[1]


def triton_interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU. (It reads the variable when a kernel is loaded.)"""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _choose(op: str, impl: str | None, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    if impl is None:
        for candidate in ORDER.get(device, ()):
            if not _reasons(op, candidate, device, dtypes):
                return candidate
        return "reference"
    reasons = _reasons(op, named(op, impl), device, dtypes)
    if reasons:
        others = [name for name in NAMES if not _reasons(op, name, device, dtypes)]
        raise ValueError(
            f"{op}: impl={impl!r} cannot run here: {'; '.join(reasons)}. These can: {', '.join(others)}; "
            "impl=None chooses"
        )
    return impl


def _reasons(op: str, impl: str, device: str, dtypes: tuple[torch.dtype, ...]) -> tuple[str, ...]:
    offered = _implementations(op)
    if impl not in offered:
        return (f"{op} has no {impl!r} implementation in this version",)
    reasons = list(_unfit[impl](device))
    for dtype in dict.fromkeys(dtypes):
        if dtype not in offered[impl]:
            names = ", ".join(sorted(str(one).removeprefix("torch.") for one in offered[impl]))
            reasons.append(f"{impl} does not take {str(dtype).removeprefix('torch.')} (it takes {names})")
    return tuple(reasons)


def _implementations(op: str) -> dict[str, frozenset[torch.dtype]]:
    return _op_module(op).IMPLEMENTATIONS


def _op_module(op: str):
    if op not in ops():
        raise ValueError(f"`op` is {op!r}, expected one of {', '.join(ops())}")
    return importlib.import_module(f"lgd_kernels.ops.{op}.op")


def _cpu_unfit(device: str):
    if extension_error():
        yield extension_error()
    if device != "cpu":
        yield f"cpu runs on CPU tensors, these are on {device}"


def _triton_unfit(device: str):
    if importlib.util.find_spec("triton") is None:
        yield _no_triton()
    if device == "cpu" and not triton_interpreted():
        yield "triton runs on GPU tensors, these are on the CPU (tests run its interpreter: TRITON_INTERPRET=1)"
    elif device not in ("cpu", "cuda"):
        yield f"triton runs on CUDA and ROCm tensors, these are on {device}"


def _no_triton() -> str:
    if sys.platform != "linux":
        return "triton is not installed (torch brings it on Linux only)"
    if torch.version.cuda is None and torch.version.hip is None and not triton_interpreted():
        return "triton is not installed (torch's wheels for CUDA and ROCm bring it; this torch is for the CPU)"
    try:
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        needs = []
    pinned = [need.partition(";")[0].strip() for need in needs if "triton" in need.partition(";")[0]]
    if torch.version.hip is not None:
        return (
            f"triton is not installed (install {(pinned or ['the one for ROCm'])[0]} from where this torch came from)"
        )
    return f"triton is not installed (pip install '{(pinned or ['triton'])[0]}')"


@functools.cache
def _load(name: str):
    """Return (module, "") or (None, the reason)."""
    full = f"lgd_kernels.{name}"
    if full in sys.modules and sys.modules[full] is None:  # disabled, as tests do
        return None, builds.why_missing(name)
    own = builds.extension_in(builds.PACKAGE, name)
    path = own or builds.same_elsewhere(name)
    if path is None:
        reason = builds.why_missing(name)
        if name == "_C" and builds.elsewhere(name):
            warnings.warn(f"{reason}. Until then everything runs on the slower reference", stacklevel=2)
        return None, reason
    try:  # after torch, so both share one OpenMP runtime
        if own:
            return importlib.import_module(full), ""
        spec: Any = importlib.util.spec_from_file_location(full, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the extension {full if own else path} does not load: {error}"
    sys.modules[full] = module
    return module, ""


def _cuda_unfit(device: str):
    if _load("_C_cuda")[1]:
        yield _load("_C_cuda")[1]
    elif torch.version.hip is not None:
        yield "cuda runs on NVIDIA GPUs, this torch is built for ROCm"
    if device != "cuda":
        yield f"cuda runs on CUDA tensors, these are on the {device.upper()}"


_unfit = {"cuda": _cuda_unfit, "triton": _triton_unfit, "cpu": _cpu_unfit, "reference": lambda device: ()}
