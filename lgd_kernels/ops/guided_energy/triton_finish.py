"""The last kernel: from the sums of chunks to an item's statistics, loss and slope."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from lgd_kernels.ops.guided_energy.structs import EnergyCall
from lgd_kernels.runtime.triton_common import power_of
from lgd_kernels.runtime.triton_launch import launch, level_argument, power_of_2


@triton.jit
def _fold(sums, first, columns, mask, COUNT: tl.constexpr, CHUNKS: tl.constexpr):
    """Return statistics of an item from all its chunks, float64, and store them. `sums` is (parts, statistics,
    chunks)."""
    parts, statistics, chunks = sums
    rows = tl.arange(0, CHUNKS)
    at = parts + rows[:, None] * COUNT + first + columns[None, :]
    total = tl.sum(tl.load(at, mask=(rows < chunks)[:, None] & mask[None, :], other=0.0).to(tl.float64), 0)
    tl.store(statistics + first + columns, total, mask=mask)
    return total


@triton.jit
def _mean_power(
    sums, squares, along, beta, PAIRS: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the means of P0^(beta/2) and of its slope beta P0^(beta/2 - 1) P1. A pair that coincides adds nothing."""
    loss, slope = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for at in range(0, PAIRS, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        mask = columns < PAIRS
        square = _fold(sums, squares, columns, mask, COUNT, CHUNKS)
        other = _fold(sums, along, columns, mask, COUNT, CHUNKS)
        apart = square != 0
        power = tl.where(square < float("inf"), power_of(square, beta * 0.5 - 1), square)  # NaN stays NaN
        loss += tl.where(apart, power * square, 0.0)
        slope += tl.where(apart, beta * power * other, 0.0)
    return tl.sum(loss, 0) * (1.0 / PAIRS), tl.sum(slope, 0) * (1.0 / PAIRS)


@triton.jit(do_not_specialize=["chunks"])
def guided_energy_finish_kernel(
    outputs,
    parts,
    chunks,
    row,
    noise_s,
    levels_stride,
    beta,
    beta_rest,
    share,
    M: tl.constexpr,
    K: tl.constexpr,
    EXPECTED: tl.constexpr,
    REPELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`share` is the weight of the repulsion."""
    loss, slope, statistics = outputs
    PAIRS: tl.constexpr = M * (M - 1) // 2
    OWN: tl.constexpr = 2 * M * K  # where P2 begins
    COUNT: tl.constexpr = OWN + M + 3 * PAIRS
    item = tl.program_id(0).to(tl.int64)
    sums = parts + item * chunks * COUNT, statistics + item * COUNT, chunks
    beta = tl.cast(beta, tl.float64) + beta_rest
    energy, tilt = _mean_power(sums, 0, M * K, beta, M * K, COUNT, CHUNKS, BLOCK)
    if EXPECTED:
        spread = tl.load(noise_s + item * levels_stride).to(tl.float64)
        energy += spread * spread * row
    for at in range(0, M, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        _fold(sums, OWN, columns, columns < M, COUNT, CHUNKS)
    if PAIRS > 0:
        apart, turn = _mean_power(sums, OWN + M, OWN + M + PAIRS, beta, PAIRS, COUNT, CHUNKS, BLOCK)
        if REPELS:
            energy -= share * apart
            tilt -= share * turn
        for at in range(0, PAIRS, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            _fold(sums, OWN + M + 2 * PAIRS, columns, columns < PAIRS, COUNT, CHUNKS)
    tl.store(loss + item, energy.to(tl.float32))
    tl.store(slope + item, tilt.to(tl.float32))


def finish(outputs: tuple[Tensor, Tensor, Tensor], parts: Tensor, row: int, a: EnergyCall) -> None:
    """Launch the kernel for parts `[B, chunks, count]` float32 of rows of `row` elements."""
    batch, chunks, _ = parts.shape
    m, (_, kind, k, _), (beta, lam, unbiased) = a.forward.x.shape[1], a.forward.target, a.options
    *_, noise_s, _, levels_stride = level_argument(a.forward.scalars.levels)
    share = lam / 2 * (1.0 if unbiased else (m - 1) / m) if m > 1 else 0.0
    near = float(np.float32(beta))  # numbers reach a kernel as float32: this one in two pieces
    depth = power_of_2(chunks)
    launch(
        guided_energy_finish_kernel,
        (batch,),
        outputs,
        parts,
        chunks,
        row,
        noise_s,
        levels_stride,
        near,
        beta - near,
        share,
        m,
        k,
        kind == "expected",
        share != 0,
        depth,
        min(1024 // depth, power_of_2(m * max(m, k))),
        like=parts,
        num_warps=1,  # with four, ptxas spills a register or two to fit more programs on a multiprocessor
    )
