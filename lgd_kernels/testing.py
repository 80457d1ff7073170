"""Make inputs and check the error budget, for tests and benchmarks: one budget, the same everywhere.

Every check is three-way. Inputs are made in the dtype under test; k is the kernel's result on them, r the reference's
on the same tensors, t the truth: the reference on the inputs promoted to float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from lgd_kernels.omega.table import OmegaTable
from lgd_kernels.runtime.levels import Levels, OmegaLookup
from lgd_kernels.sampling.schedules import RectifiedFlow

# 1, odd, prime, larger than a kernel's block and than a chunk, not a multiple of a vector, no trailing dimension
SHAPES = ((1, 1), (1,), (7,), (3, 5), (2, 3, 7, 11), (5, 127), (2, 1031), (2, 8209), (3, 4, 16, 16))
EMPTY_SHAPES = ((0, 4), (3, 0), (0,), (2, 3, 0))
LAYOUTS = ("contiguous", "sliced", "strided", "expanded", "permuted", "channels_last", "offset", "odd stride")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, layout: str = "contiguous"
) -> Tensor:
    """Return standard normals in a memory layout of `LAYOUTS`."""
    if layout == "sliced":  # rows lie apart
        return _randn((shape[0] * 2, *shape[1:]), dtype, generator)[::2]
    if layout == "strided":  # elements lie apart
        return _randn((*shape[:-1], shape[-1] * 2), dtype, generator)[..., ::2]
    if layout == "expanded":  # one row for all samples
        return _randn((1, *shape[1:]), dtype, generator).expand(shape)
    if layout == "permuted":
        return _randn(shape[::-1], dtype, generator).permute(*reversed(range(len(shape))))
    if layout == "channels_last":
        return _randn(shape, dtype, generator).contiguous(memory_format=torch.channels_last)
    if layout == "offset":  # not aligned to a vector
        flat = _randn((torch.Size(shape).numel() + 3,), dtype, generator)
        return flat[3:].view(shape)
    if layout == "odd stride":  # the first row is aligned to a vector, the next is not
        return _randn((*shape[:-1], shape[-1] + 3), dtype, generator)[..., : shape[-1]]
    return _randn(shape, dtype, generator)


def step_levels(batch: int, dtype: torch.dtype = torch.float32) -> Levels:
    """Return levels of a different (t, s) for each sample, t = 1 and s = 0 among them if the batch is large enough."""
    t = (
        torch.linspace(1.0, 0.3, max(batch, 2), dtype=dtype, device="cpu")[-batch:]
        if batch
        else torch.empty(0, dtype=dtype, device="cpu")
    )
    return RectifiedFlow().levels(t, (t - 0.4).clamp(min=0))


def omegas(batch: int, generator: torch.Generator) -> dict[str, float | Tensor | OmegaLookup]:
    """Return an omega of every form, by name."""
    values = torch.rand(3, 4, 5, generator=generator, device="cpu") * 3
    table = OmegaTable(values, torch.linspace(0, 0.9, 4, device="cpu"), torch.linspace(0.1, 1, 5, device="cpu"))
    c = torch.randint(0, 3, (batch,), generator=generator, device="cpu")
    t = torch.rand(batch, generator=generator, device="cpu")
    per_sample = torch.rand(batch, generator=generator, device="cpu") * 3
    return {"float": 1.5, "per sample": per_sample, "half": per_sample.half(), "table": table.at(c, t * 0.5, t)}


def promoted(value):
    """Return tensors, alone or in a tuple, in float64; everything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return _each(promoted, value)


def moved(value, device: str):
    """Return tensors, alone or in a tuple, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return _each(lambda field: moved(field, device), value)


@contextlib.contextmanager
def poisoned() -> Iterator[dict[int, torch.UntypedStorage]]:
    """Fill fresh memory with NaN (integers: with their largest value), whichever function of torch allocates it.

    Yield what was filled, by address. It is kept, so that no address comes twice.
    """
    filled: dict[int, torch.UntypedStorage] = {}

    def poison(owner, name):
        function = getattr(owner, name)

        def fresh(*args, **kwargs):
            found = function(*args, **kwargs)
            if found.numel() and found.device.type != "meta":
                storage = found.untyped_storage()
                filled[storage.data_ptr()] = storage
                found.fill_(torch.nan if found.is_floating_point() else torch.iinfo(found.dtype).max)
            return found

        return mock.patch.object(owner, name, fresh)

    with contextlib.ExitStack() as patches:
        for name in ("empty", "empty_like", "empty_strided"):
            patches.enter_context(poison(torch, name))
        patches.enter_context(poison(torch.Tensor, "new_empty"))
        yield filled


def assert_elementwise(kernel: Tensor, reference: Tensor, truth: Tensor, slack: float = 0.0) -> None:
    """Assert that each element is about as close to the truth as the reference of the same dtype.

        max |k - t| <= 2 max |r - t| + eps scale          mean |k - t| <= 1.2 mean |r - t| + 2^-26 scale
        float64: max |k - t| <= 64 * 2^-53 scale          (scale = max |t|)

    The maximum alone lets a 1 % error in omega through in bfloat16; the mean, over 1000 elements and more, does not.
    `slack` is how much the inputs themselves may differ, where two implementations draw the noise.
    """
    assert kernel.shape == truth.shape, f"shape {list(kernel.shape)}, expected {list(truth.shape)}"
    assert kernel.dtype == reference.dtype, f"dtype {kernel.dtype}, expected {reference.dtype}"
    if not kernel.numel():
        return
    k, r, t = (tensor.detach().cpu().double() for tensor in (kernel, reference, truth))
    assert torch.equal(k.isnan(), t.isnan()), "NaN where the truth has none, or the other way round"
    k, r, t = (tensor.nan_to_num(0.0) for tensor in (k, r, t))
    scale = t.abs().max().item()
    error, allowed = (k - t).abs(), (r - t).abs()
    if kernel.dtype == torch.float64:
        limit = 64 * 2.0**-53 * scale + slack
    else:
        limit = 2 * allowed.max().item() + torch.finfo(kernel.dtype).eps * scale + slack
    assert error.max().item() <= limit, f"max error {error.max():.3g}, allowed {limit:.3g}"
    if kernel.numel() >= 1000:
        limit = 1.2 * allowed.mean().item() + 2.0**-26 * scale + slack
        assert error.mean().item() <= limit, f"mean error {error.mean():.3g}, allowed {limit:.3g}"


def assert_sum(kernel: Tensor, truth: Tensor, terms: Tensor) -> None:
    """Assert that a sum is right to its terms: `|k - t| <= 8 * 2^-24 sum |terms|` (float64: 64 * 2^-53), plus one
    rounding of the result where that is stored as half."""
    unit = 64 * 2.0**-53 if kernel.dtype == torch.float64 else 8 * 2.0**-24
    rounding = torch.finfo(kernel.dtype).eps if kernel.dtype.itemsize == 2 else 0.0
    error = (kernel.detach().cpu().double() - truth.detach().cpu().double()).abs()
    limit = unit * terms.detach().cpu().double() + rounding * truth.detach().cpu().double().abs() + 1e-300
    assert bool((error <= limit).all()), f"error {error.max():.3g}, allowed {limit.min():.3g}"


def _each(change, value):
    """Return a tuple, named or not, with every field changed; everything else as it is."""
    if not isinstance(value, tuple):
        return value
    changed = [change(field) for field in value]
    return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)


def _randn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
