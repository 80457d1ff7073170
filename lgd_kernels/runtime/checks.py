"""Check arguments that ops share. Each message names the argument, what came, what was expected and the remedy.

Shapes, dtypes, devices and choices are always checked. Values are checked only if they are Python numbers or small CPU
tensors outside compilation, so no check waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import PREDICTIONS, Levels, OmegaLookup, is_whole, lookup_problem
from lgd_kernels.runtime.shown import brief, readable

DIFFUSERS_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
NO_DATA_IN_EPS = "where an eps prediction holds no information on the data; start below t = 1, or predict x0, v or flow"
DATA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_REPEATS = 10**6  # permutations or subsets: more would take days


def samples(op: str, **tensors: Tensor | None) -> None:
    """Check data `[B, ...]`: floating point, with the shape and device of the first tensor."""
    name, first = next(iter(tensors.items()))
    if isinstance(first, Tensor) and first.ndim > 0:
        shape, device = first.shape, first.device
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                known = tensor.layout is torch.strided and tensor.dtype in DATA_DTYPES
                if known and tensor.shape == shape and tensor.device == device:
                    continue
            elif tensor is None and name == "noise":
                continue
            break
        else:
            return
    _diagnose_samples(op, name, tensors)


def _diagnose_samples(op: str, name: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise for the tensor of this name."""
    first_name, tensor = next(iter(tensors)), tensors[name]
    first: Any = tensors[first_name]
    if not isinstance(tensor, Tensor):
        hint = "; without guidance, pass cond again" if name == "uncond" else ""
        raise TypeError(f"{op}: `{name}` is a {type(tensor).__name__}, expected a tensor [B, ...]{hint}")
    dense(op, name, tensor)
    if tensor.dtype not in DATA_DTYPES:
        raise TypeError(f"{op}: `{name}` has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    if tensor is first:
        raise ValueError(f"{op}: `{name}` has shape [], expected [B, ...]; unsqueeze(0) makes a batch of one")
    if tensor.shape != first.shape:
        raise ValueError(
            f"{op}: `{name}` has shape {list(tensor.shape)}, expected {list(first.shape)} like `{first_name}`; "
            "expand it if it should broadcast"
        )
    same_device(op, name, tensor, first_name, first)


def dense(op: str, name: str, tensor: Tensor) -> None:
    """Refuse a sparse tensor, whose memory does not hold its values in order."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: `{name}` has layout {tensor.layout}, expected a dense tensor; .to_dense() makes one")


def per_sample(op: str, name: str, value: float | Tensor, like_name: str, like: Tensor) -> None:
    """Check a number, or a tensor `[B]` of any float dtype."""
    if isinstance(value, Tensor):
        if value.dtype not in DATA_DTYPES:
            raise TypeError(
                f"{op}: `{name}` has dtype {value.dtype}, expected float32, bfloat16, float16 or float64; .float()"
            )
        batch = like.shape[0]
        if value.ndim != 1 or value.shape[0] != batch:
            remedy = f"; {name}.flatten()" if value.numel() == batch else ""
            if value.numel() == 1 != batch:
                remedy = f"; {name}.{'flatten().' if value.ndim > 1 else ''}expand({batch}) shares one"
            raise ValueError(
                f"{op}: `{name}` has shape {list(value.shape)}, expected [B] = [{batch}], one for each sample of "
                f"`{like_name}`{remedy}"
            )
        dense(op, name, value)
        same_device(op, name, value, like_name, like)
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        hint = ", or what OmegaTable.at(c, s, t) returns" if name == "omega" else ""
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected a float or a tensor [B]{hint}")


def omega(op: str, value: float | Tensor | OmegaLookup, like_name: str, like: Tensor) -> None:
    """Check a number, a tensor `[B]`, or what `OmegaTable.at` returned for this batch."""
    if not isinstance(value, OmegaLookup):
        return per_sample(op, "omega", value, like_name, like)
    if not is_whole(value, like):
        for name, tensor in zip(value._fields, value, strict=True):
            if isinstance(tensor, Tensor):
                same_device(op, f"omega.{name}", tensor, like_name, like)
        raise ValueError(f"{op}: {lookup_problem(value, like, like_name)}; OmegaTable.at(c, s, t) makes a lookup")


def prediction_name(op: str, value: str) -> None:
    """Check the name of what the network predicts, and suggest ours for one of diffusers'."""
    if not isinstance(value, str) or value not in PREDICTIONS:
        ours = DIFFUSERS_PREDICTIONS.get(value) if isinstance(value, str) else None
        hint = f"; did you mean {ours!r}?" if ours else ""
        raise ValueError(f"{op}: `prediction` is {value!r}, expected one of {', '.join(PREDICTIONS)}{hint}")


def levels(op: str, value: Levels, prediction: str, like_name: str, like: Tensor) -> None:
    """Check five tensors `[B]` of one float dtype, without gradient, and their values if those can be read."""
    prediction_name(op, prediction)
    if not isinstance(value, Levels):
        raise TypeError(
            f"{op}: `levels` is a {type(value).__name__}, expected lgd_kernels.Levels, as a schedule's levels(t, s) "
            "gives them"
        )
    gap = value.gap
    if not _alike(value, like):
        _diagnose_levels(op, value, like_name, like)
    if readable(gap):
        if not smallest(gap) >= 0:
            raise ValueError(
                f"{op}: `levels.gap` is {smallest(gap):g} in one sample, expected 0 or more: s lies on the noise side "
                "of t there (levels(t, s) takes t first)"
            )
        if prediction == "eps" and smallest(value.signal_t) == 0:
            raise ValueError(f"{op}: `levels.signal_t` is 0 in one sample, {NO_DATA_IN_EPS}")


def _alike(value: Levels, like: Tensor) -> bool:
    """Return whether all five tensors are valid. (A loop is faster than a generator here, and every call pays.)"""
    shape, dtype, device = like.shape[:1], getattr(value.gap, "dtype", None), like.device
    if dtype not in (torch.float32, torch.float64) or value.gap.layout is not torch.strided:
        return False
    for tensor in value:
        if not isinstance(tensor, Tensor) or tensor.dtype is not dtype or tensor.requires_grad:
            return False
        if tensor.shape != shape or tensor.device != device:
            return False
    return True


def _diagnose_levels(op: str, value: Levels, like_name: str, like: Tensor) -> None:
    """Raise for the first tensor that is not valid."""
    for name, tensor in zip(Levels._fields, value, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: `levels.{name}` is a {type(tensor).__name__}, expected a tensor [B]")
        per_sample(op, f"levels.{name}", tensor, like_name, like)
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != value[0].dtype:
            raise TypeError(
                f"{op}: `levels.{name}` has dtype {tensor.dtype}, expected float32 or float64, the same for all five"
            )
        if tensor.requires_grad:
            raise ValueError(
                f"{op}: `levels.{name}` requires grad, but no gradient flows to levels; pass levels.{name}.detach()"
            )


def churn(op: str, value: float | Tensor, like_name: str, like: Tensor) -> None:
    """Check churn: values in [0, 1] that need no gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{op}: `churn` requires grad, but no gradient flows to churn; pass churn.detach()")
    unit(op, "churn", value, like_name, like)


def unit(op: str, name: str, value: float | Tensor, like_name: str, like: Tensor) -> None:
    """Check a number or a tensor `[B]` with values in [0, 1]."""
    per_sample(op, name, value, like_name, like)
    if isinstance(value, Tensor):
        inside = not readable(value) or (smallest(value) >= 0 and -smallest(-value) <= 1)
    else:
        inside = torch.compiler.is_compiling() or 0 <= value <= 1
    if not inside:
        raise ValueError(f"{op}: `{name}` is {brief(value)}, expected values in [0, 1]")


def noise(
    op: str, churn: float | Tensor, noise: Tensor | None, seed: int | Tensor | None, name: str = "churn", off: float = 0
) -> None:
    """Check that at most one of `noise` and `seed` is given, and exactly one if there is churn: a value not `off`."""
    if seed is not None:
        not_vmapped(op, "seed", "noise=...")
    if noise is not None and seed is not None:
        raise ValueError(f"{op}: `noise` and `seed` were both given, expected one of them")
    if noise is None and seed is None and (isinstance(churn, Tensor) or churn != off):
        raise ValueError(
            f"{op}: `{name}` is {brief(churn)} but there is no noise; pass seed=... (drawn in the kernel) or noise=..."
        )


def unused(op: str, noise: Tensor | None, seed: int | Tensor | None) -> None:
    """Refuse noise and seed if `churn` was not given."""
    for name, given in (("seed", seed), ("noise", noise)):
        if given is not None:
            raise ValueError(
                f"{op}: `{name}` was given without `churn`, expected both or neither; churn=1.0 is DDPM's step, and "
                "churn=0.0 is a step without noise"
            )


def not_vmapped(op: str, name: str, instead: str) -> None:
    """Refuse a seed under vmap, where every entry would draw the same noise."""
    if impls.vmapped():
        raise ValueError(f"{op}: `{name}` under vmap would draw the same noise for every entry; pass {instead}")


def first_sample(op: str, first_sample: int) -> None:
    """Check the index of the first sample."""
    if isinstance(first_sample, bool) or not isinstance(first_sample, (int, torch.SymInt)):
        raise TypeError(f"{op}: `first_sample` is a {type(first_sample).__name__}, expected an int")
    if not 0 <= first_sample < 2**32 and not torch.compiler.is_compiling():
        raise ValueError(f"{op}: `first_sample` is {first_sample}, expected an index from 0 to 2^32 - 1")


def seed(op: str, value: int | Tensor, first: int, batch: int, like: Tensor | None, name: str = "seed") -> None:
    """Check a seed (an int64 number, or an int64 tensor, 0-dim or `[B]`) and the index of the first sample."""
    first_sample(op, first)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: `{name}` has dtype {value.dtype}, expected int64")
        dense(op, name, value)
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
            raise ValueError(
                f"{op}: `{name}` has shape {list(value.shape)}, expected [] for one seed or [B] = [{batch}] for each "
                "sample's own"
            )
        if like is not None and value.device != like.device:
            raise ValueError(f"{op}: `{name}` is on {value.device}, expected {like.device}; {name}.to(...) moves it")
    elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected an int or an int64 tensor")
    elif not -(2**63) <= value < 2**63 and not torch.compiler.is_compiling():
        raise ValueError(f"{op}: `{name}` is {value}, expected a value in [-2^63, 2^63)")


def particles(op: str, name: str, tensor: Tensor) -> None:
    """Check particles `[B, m, ...]` with m at least 1."""
    if not isinstance(tensor, Tensor):
        hint = ", or Renoise or Expected" if name == "target" else ""
        raise TypeError(f"{op}: `{name}` is a {type(tensor).__name__}, expected a tensor [B, m, ...]{hint}")
    if tensor.ndim < 2 or tensor.shape[1] == 0:
        hint = f"; {name}.unsqueeze(1) makes one of each sample" if tensor.ndim == 1 else ""
        raise ValueError(
            f"{op}: `{name}` has shape {list(tensor.shape)}, expected [B, m, ...] with one particle or more for each "
            f"item{hint}"
        )


def like_item(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...]) -> None:
    """Check data `[B, *shape]` on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: `{name}` is a {type(tensor).__name__}, expected a tensor [B, ...]")
    if tensor.dtype not in DATA_DTYPES:
        raise TypeError(f"{op}: `{name}` has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64")
    dense(op, name, tensor)
    if tensor.shape != (like.shape[0], *shape):
        raise ValueError(
            f"{op}: `{name}` has shape {list(tensor.shape)}, expected {[like.shape[0], *shape]}, to go with "
            f"`{like_name}` {list(like.shape)}"
        )
    same_device(op, name, tensor, like_name, like)


def count(op: str, name: str, value: int, most: int | None = None) -> None:
    """Check an int of 1 or more, and of `most` or less."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{op}: `{name}` is {value}, expected 1 or more")
    if most is not None and value > most:
        raise ValueError(f"{op}: `{name}` is {value}, expected at most {most}")


def function(op: str, name: str, value) -> None:
    """Check a callable."""
    if not callable(value):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected a function")


def tensor(op: str, name: str, value: Tensor) -> None:
    """Check a tensor of any dtype and shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected a tensor")


def flag(op: str, name: str, value: bool) -> None:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected True or False")


def number(op: str, name: str, value: float, low: float, high: float) -> None:
    """Check a Python number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected a float")
    if not low <= value <= high:
        raise ValueError(f"{op}: `{name}` is {value}, expected a number in [{low}, {high}]")


def power(op: str, beta: float, lam: float, unbiased: bool, m: int) -> None:
    """Check the options of an energy: beta in (0, 2], lam in [0, 1], and m of 2 or more if particles repel."""
    flag(op, "unbiased", unbiased)
    for name, value in (("beta", beta), ("lam", lam)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: `{name}` is a {type(value).__name__}, expected a float")
    if not 0 < beta <= 2:
        raise ValueError(f"{op}: `beta` is {beta}, expected a power in (0, 2]")
    if not 0 <= lam <= 1:
        raise ValueError(f"{op}: `lam` is {lam}, expected a weight in [0, 1]")
    if lam > 0 and unbiased and m < 2:
        raise ValueError(
            f"{op}: `lam` is {lam} but one particle has no partner to be repelled by; pass two or more particles, "
            "lam=0 or unbiased=False"
        )


def smallest(tensor: Tensor) -> float:
    """Return the least value of `[B]`, or NaN if one is NaN."""
    extension = impls.extension()
    if extension is None or type(tensor) is not Tensor or impls.is_lazy(tensor):
        return tensor.min().item()
    return extension.smallest(tensor)


def same_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: `{name}` is on {tensor.device}, expected {like.device} like `{like_name}`; .to(...) moves it"
        )


def generator(op: str, seed: int) -> torch.Generator:
    """Make a CPU generator from an int seed, or refuse the seed."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: `seed` is a {type(seed).__name__}, expected an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: `seed` is {seed}, expected a value in [-2^63, 2^63)")
    return torch.Generator(device="cpu").manual_seed(seed)
