"""Test by permutation whether two sets of samples have one law."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.ops.energy_mmd import checks
from lgd_kernels.ops.energy_mmd.kernels import Energy, Kernel, join_kernel, split_kernel
from lgd_kernels.runtime import blocks
from lgd_kernels.runtime import progress as reports
from lgd_kernels.runtime.checks import MOST_REPEATS, count, generator
from lgd_kernels.runtime.levels import arithmetic_dtype
from lgd_kernels.runtime.precision import full_precision


class MMDTest(NamedTuple):
    """The result of `mmd_test`: `value` and `permuted` [permutations] are float64, `p_value` a float."""

    value: Tensor
    p_value: float
    permuted: Tensor


@torch.no_grad()
def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel | None = None,
    permutations: int = 1000,
    seed: int = 0,
    unbiased: bool = True,
    progress: bool | reports.Report | None = None,
) -> MMDTest:
    """Test whether x and y have one law: MMD^2, and how often a random split of the pooled samples gives as much.

        MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)         p = (1 + #{permuted >= MMD^2}) / (1 + permutations)

    For one law, p is uniform: for exchangeable samples, p <= a with probability a at most. The smallest p is
    1 / (1 + permutations).

    Kernel values of the pooled samples are computed once, block by block, and multiplied with all permutations in a
    matrix product. Memory grows by 5 (n + k) permutations bytes, never with (n + k)^2.

    Args:
        x, y: `[n, ...]` and `[k, ...]`, as `energy_mmd` takes them.
        kernel: any that `energy_mmd` takes. `Energy(beta)`, with beta = 1 the default, stands for the kernel
            -||x - y||^beta: MMD^2 is then `energy_distance`, twice what `energy_mmd` returns.
        permutations: how many, 1 to 10^6.
        seed: of the permutations, which are drawn on the CPU: the same on every device.
        unbiased: means over pairs of different samples.
        progress: True for a bar, or a function of (done, total), numbers of pairs.

    Values within 1e-6 E|k| (1/n + 1/k) of each other count as equal. Sums of blocks go on in float64. No gradient.
    Autocast and TF32 have no effect.

    Raises ValueError or TypeError as `energy_mmd` does, and ValueError where x or y holds NaN or infinity. If kernel
    values overflow (features of 1e20 in float32, whose squares overflow), value and p are NaN: scale the features.

    Source: Gretton et al., JMLR 13 (2012); Phipson and Smyth (2010) for p.

    >>> import torch
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> mmd_test(x[:100], x[100:] + 1).p_value < 0.002, mmd_test(x[:100], x[100:]).p_value > 0.05
    (True, True)
    """
    kernel = Energy() if kernel is None else kernel
    with checks.said_by("mmd_test"):
        checks.call(x, y, None, None, checks.Options(unbiased=unbiased, kernel=kernel))
    checks.finite("mmd_test", waits=True, x=x, y=y)
    count("mmd_test", "permutations", permutations, MOST_REPEATS)
    report = reports.report("mmd_test", progress)
    n, k = len(x), len(y)
    points = torch.cat([one.reshape(len(one), -1).to(arithmetic_dtype(x, y)) for one in (x, y)])
    function = join_kernel(*split_kernel(kernel, points.shape[1]))
    called_x = _splits(n, n + k, permutations, seed).to(points.device)
    signs = points.new_zeros(n + k, -(-called_x.shape[1] // 16) * 16)  # a product of odd width is a third slower
    signs[:, : permutations + 1] = torch.where(called_x, float(k), float(-n))
    form = torch.zeros(signs.shape[1], dtype=torch.float64, device=points.device)
    sums, itself = points.new_zeros((2, n + k), dtype=torch.float64)
    for rows, columns, arguments in blocks.upper_blocks(points, function.of_product, report):
        values = function.value(arguments)
        if rows == columns:
            itself[rows] = values.diagonal()
            values.fill_diagonal_(0)
            with full_precision(points.device):
                turned = values @ signs[columns] / 2
        else:
            sums[columns] += values.sum(0)
            with full_precision(points.device):
                turned.addmm_(values, signs[columns])
        sums[rows] += values.sum(1)
        if columns.stop >= n + k:
            form += 2 * turned.mul_(signs[rows]).sum(0, dtype=torch.float64)
    found = _from_form(form[: permutations + 1], sums, itself, called_x, n, unbiased)
    found *= -1 if isinstance(kernel, Energy) else 1
    equal = 1e-6 * float(sums.abs().sum()) / (n + k) ** 2 * (1 / n + 1 / k)
    value, permuted = found[0], found[1:]
    if not found.isfinite().all():  # comparisons of overflowed kernel values mean nothing
        return MMDTest(value * math.nan, math.nan, permuted)
    p_value = (1 + int((permuted >= value - equal).sum())) / (1 + permutations)
    return MMDTest(value, p_value, permuted)


def _splits(n: int, total: int, permutations: int, seed: int) -> Tensor:
    """Return bool [total, 1 + permutations], true for the samples called x: first as given, then at random."""
    randomness = generator("mmd_test", seed)
    called_x = torch.zeros(permutations + 1, total, dtype=torch.bool, device="cpu")
    called_x[0, :n] = True
    for row in called_x[1:]:
        row[torch.randperm(total, generator=randomness, device="cpu")[:n]] = True
    return called_x.t()


def _from_form(form: Tensor, sums: Tensor, itself: Tensor, called_x: Tensor, n: int, unbiased: bool) -> Tensor:
    """Return MMD^2 from form = sum_{i != j} a_i a_j k_ij, where a is k or -n, and from sums_i = sum_{j != i} k_ij.

    With S_xx the sum over pairs i != j that are both called x, and so on: form = k^2 S_xx + n^2 S_yy - 2 n k S_xy.
    """
    k = len(sums) - n
    starts = range(0, n + k, blocks.BLOCK)
    of_x, own_x = (
        sum(one[at : at + blocks.BLOCK] @ called_x[at : at + blocks.BLOCK].double() for at in starts)
        for one in (sums, itself)
    )
    if not unbiased:
        return form / (n * k) ** 2 + own_x / n**2 + (itself.sum() - own_x) / k**2
    within_x = (form - n**2 * sums.sum() + 2 * n * (n + k) * of_x) / (n + k) ** 2
    within_y = sums.sum() - 2 * of_x + within_x
    return form / (n * k) ** 2 + within_x / (n**2 * (n - 1)) + within_y / (k**2 * (k - 1))
