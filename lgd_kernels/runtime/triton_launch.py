"""Turn the structs of ops into arguments of Triton kernels, and launch.

Triton's binder takes time for every parameter of a kernel and for every keyword. So a tensor and its stride are one
tuple, an absent argument is None, and launchers pass arguments by position. Sizes are computed by integer arithmetic,
because `cdiv` and `next_power_of_2` of Triton cost the host 2 us a call.

Three limits of Triton shape the arguments. `do_not_specialize` does not reach into a tuple, so the words of a seed are
parameters of their own. A parameter that may be None has no annotation. Triton 3.6 cannot compile `t is None` for a
tuple t that contains None, so a kernel asks for an element: `t[0] is None`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lgd_kernels.runtime import memory
from lgd_kernels.runtime.arguments import Number, Omega, Seed

TILE = 1024  # elements of a program: 8 for each of 128 threads
SUMS_TILE = 4096  # where a program ends in many sums over its threads


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not below n, for n > 0."""
    return 1 << (n - 1).bit_length()


def tiling(batch: int, row: int, most: int = TILE) -> tuple[tuple[int], int, tuple[int, int, int, int]]:
    """Cut `[batch, row]` into tiles of up to `most` elements, of several samples where these are short.

    Returns the grid, the column blocks of a sample, and (batch, row, ROWS, BLOCK) for the device function `tile`."""
    block = min(most, max(4, power_of_2(row)))
    rows, blocks = max(1, TILE // block), cdiv(row, block)
    return (cdiv(batch, rows) * blocks,), blocks, (batch, row, rows, block)


def rows_argument(tensor: Tensor | None) -> tuple[Tensor, int] | None:
    """Return (tensor, stride between samples) with contiguous rows, for `load_tile(*argument, ...)`."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        tensor = memory.with_contiguous_rows(tensor)
    return tensor, tensor.stride(0)


def number_argument(number: Number) -> tuple[Tensor | None, float]:
    """Return (tensor, stride) or (None, value), for `number_at`."""
    tensor, value = number
    return (None, value) if tensor is None else (tensor, tensor.stride(0))


def omega_arguments(omega: Omega) -> tuple[tuple, tuple[int, int] | None]:
    """Return the two arguments of `omega_at`: omega, and how many knots of s and of t a table is padded to."""
    tensor, value, table = omega
    if not table:
        return ((None, value) if tensor is None else (tensor, tensor.stride(0))), None
    conditions, knots_s, knots_t = table[0].shape
    tensors = (one.contiguous() for one in table)
    return (*tensors, conditions, knots_s, knots_t), (power_of_2(knots_s), power_of_2(knots_t))


def level_argument(levels: list[Tensor]) -> tuple:
    """Return the five tensors and the stride that all of them have (0 if all are expanded), for `step_coefficients`."""
    a, b, c, d, e = levels
    stride = a.stride(0)
    if b.stride(0) == stride == c.stride(0) and d.stride(0) == stride == e.stride(0):
        return a, b, c, d, e, stride
    return *(tensor.contiguous() for tensor in levels), 1


def seed_arguments(seed: Seed) -> tuple:
    """Return the four arguments of `keys_of`: seeds (tensor, stride) or None, then low word, high word, first sample.

    All are None without a seed. A kernel lists the last three in `do_not_specialize`."""
    tensor, value, first_sample = seed
    if tensor is None:
        return (None, None, None, None) if value is None else (
            None, _signed(value), _signed(value >> 32), _signed(first_sample)
        )  # fmt: skip
    if tensor.ndim == 0:
        return (tensor, 0), None, None, _signed(first_sample)
    if tensor.stride(0) == 0:  # expanded: one for each sample all the same, which the kernels tell by the stride
        tensor = tensor.contiguous()
    return (tensor, tensor.stride(0)), None, None, 0


def _signed(word: int) -> int:
    """Return the low 32 bits as an int32, so that no seed changes the signature of a kernel."""
    return ((word + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def launch(kernel: Any, grid: tuple[int, ...], outputs: Any, *arguments: Any, like: Tensor, **named: Any) -> None:
    """Launch `kernel(outputs, *arguments, **named)` on the device of `like`.

    `outputs` are the kernel's first argument: a tensor, or a tuple of tensors and None. The interpreter needs to know
    them, because it truncates float32 to bfloat16: there the kernel writes float32, and torch rounds."""
    if memory.on_current_device(like):
        # `run` is what `kernel[grid]` calls. Fusion is set explicitly: its default differs between versions of Triton.
        kernel.run(outputs, *arguments, grid=grid, warmup=False, enable_fp_fusion=True, **named)
    elif like.is_cuda:
        with torch.cuda.device(like.device):
            kernel.run(outputs, *arguments, grid=grid, warmup=False, enable_fp_fusion=True, **named)
    else:
        _interpret(kernel, grid, outputs, arguments, named)


def _interpret(kernel: Any, grid: tuple[int, ...], outputs: Any, arguments: tuple, named: dict[str, Any]) -> None:
    narrow = outputs if isinstance(outputs, tuple) else (outputs,)
    wide = tuple(out.float() if _truncates(out) else out for out in narrow)
    kernel[grid](wide if isinstance(outputs, tuple) else wide[0], *arguments, **named)
    for out, stored in zip(narrow, wide, strict=True):
        if stored is not out:
            out.copy_(stored)


def _truncates(out: Tensor | None) -> bool:
    return out is not None and out.dtype == torch.bfloat16
