"""How far samples are from data: energy distance, MMD^2 with a test, kernel inception distance, Frechet distance.

All take features `[n, D]` (or `[n, ...]`) that you bring: pixels, or what a network of your choice makes of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels import pairs
from lgd_kernels import progress as reports
from lgd_kernels.checks import DATA_DTYPES, count, dense, tensor
from lgd_kernels.impls import Impl
from lgd_kernels.levels import arithmetic_dtype
from lgd_kernels.ops.energy_mmd import checks
from lgd_kernels.ops.energy_mmd.api import energy_mmd
from lgd_kernels.ops.energy_mmd.kernels import Energy, Kernel, Polynomial, join_kernel, split_kernel
from lgd_kernels.precision import full_precision

MOST = 10**6  # permutations or subsets: more tell nothing further, and would take days
ROWS = 8192  # samples whose covariance is added up at a time


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 1.0,
    unbiased: bool = True,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    batched: bool = False,
    progress: bool | reports.Report | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """2 E ||x - y||^beta - E ||x - x'||^beta - E ||y - y'||^beta: twice `energy_mmd`, whose arguments these are.

    The statisticians' normalisation: for D = 1, beta = 1 and unbiased=False, `scipy.stats.energy_distance(x, y) ** 2`.
    Unbiased, it is 0 on average for samples of one law, and so may be negative. Differentiable as `energy_mmd` is. NaN
    where a sample holds NaN or infinity.

    Source: Szekely and Rizzo, J. Stat. Plan. Inference 143 (2013).

    >>> import torch
    >>> energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [4.0]]))  # 2 (3 + 4 + 1 + 2) / 4 - 2 - 1
    tensor(2.)
    """
    with checks.said_by("energy_distance"):
        return 2 * energy_mmd(
            x, y, beta=beta, unbiased=unbiased, x_weights=x_weights, y_weights=y_weights, batched=batched,
            progress=progress, impl=impl,
        )  # fmt: skip


class MMDTest(NamedTuple):
    """What `mmd_test` found: `value` and `permuted` [permutations] are float64, `p_value` a float."""

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
    """Do x and y have one law? MMD^2, and how often a random split of the pooled samples gives as much.

        MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)         p = (1 + #{permuted >= MMD^2}) / (1 + permutations)

    If they have, p is uniform (never too small by chance alone: p <= a with probability a at most, for samples that
    are exchangeable). The smallest p is 1 / (1 + permutations).

    Kernel values of the pooled samples are made once, block by block, and meet all permutations in a matrix product.
    Memory grows by 5 (n + k) permutations bytes, never with (n + k)^2.

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
        checks.call(x, y, None, None, 1.0, 1.0, unbiased, kernel, True, None, False)
    checks.finite("mmd_test", waits=True, x=x, y=y)
    count("mmd_test", "permutations", permutations, MOST)
    report = reports.report("mmd_test", progress)
    n, k = len(x), len(y)
    points = torch.cat([one.reshape(len(one), -1).to(arithmetic_dtype(x, y)) for one in (x, y)])
    function = join_kernel(*split_kernel(kernel, points.shape[1]))
    called_x = _splits(n, n + k, permutations, seed).to(points.device)
    signs = points.new_zeros(n + k, -(-called_x.shape[1] // 16) * 16)  # a product of odd width is a third slower
    signs[:, : permutations + 1] = torch.where(called_x, float(k), float(-n))
    form = torch.zeros(signs.shape[1], dtype=torch.float64, device=points.device)
    sums, itself = points.new_zeros((2, n + k), dtype=torch.float64)
    for rows, columns, arguments in pairs.upper_blocks(points, function.of_product, report):
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


def _generator(op: str, seed: int) -> torch.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: `seed` is a {type(seed).__name__}, expected an int")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: `seed` is {seed}, expected a value in [-2^63, 2^63)")
    return torch.Generator(device="cpu").manual_seed(seed)


def _splits(n: int, total: int, permutations: int, seed: int) -> Tensor:
    """[total, 1 + permutations]: who is called x; first as it is, then at random."""
    generator = _generator("mmd_test", seed)
    called_x = torch.zeros(permutations + 1, total, dtype=torch.bool, device="cpu")
    called_x[0, :n] = True
    for row in called_x[1:]:
        row[torch.randperm(total, generator=generator, device="cpu")[:n]] = True
    return called_x.t()


def _from_form(form: Tensor, sums: Tensor, itself: Tensor, called_x: Tensor, n: int, unbiased: bool) -> Tensor:
    """MMD^2 from form = sum_{i != j} a_i a_j k_ij, where a is k or -n, and from sums_i = sum_{j != i} k_ij.

    With S_xx the sum over pairs i != j that are both called x, and so on: form = k^2 S_xx + n^2 S_yy - 2 n k S_xy.
    """
    k = len(sums) - n
    starts = range(0, n + k, pairs.BLOCK)
    of_x, own_x = (
        sum(one[at : at + pairs.BLOCK] @ called_x[at : at + pairs.BLOCK].double() for at in starts)
        for one in (sums, itself)
    )
    if not unbiased:
        return form / (n * k) ** 2 + own_x / n**2 + (itself.sum() - own_x) / k**2
    within_x = (form - n**2 * sums.sum() + 2 * n * (n + k) * of_x) / (n + k) ** 2
    within_y = sums.sum() - 2 * of_x + within_x
    return form / (n * k) ** 2 + within_x / (n**2 * (n - 1)) + within_y / (k**2 * (k - 1))


class KID(NamedTuple):
    """What `kernel_inception_distance` found, float64: the mean over subsets, their standard deviation (what other
    libraries report beside it), and the standard error of the mean."""

    value: Tensor
    std: Tensor
    standard_error: Tensor


@torch.no_grad()
def kernel_inception_distance(
    x: Tensor,
    y: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    kernel: Kernel | None = None,
    progress: bool | reports.Report | None = None,
) -> KID:
    """KID: unbiased MMD^2 of the kernel (<x, y> / D + 1)^3, averaged over random subsets of features.

    Args:
        x, y: features `[n, D]` and `[k, D]`.
        subsets, subset_size: how many, up to 10^6, and of how many samples of x and of y, without replacement.
        seed: of the subsets, which are drawn on the CPU.
        kernel: `Polynomial()` by default.
        progress: True for a bar, or a function of (done, total), numbers of subsets.

    `standard_error` is std sqrt(1 / subsets + m / (min(n, k) - m)), m = subset_size. Subsets overlap, so std /
    sqrt(subsets) says how far the mean is from that over all subsets of these samples only; the second term (ours) is
    how far that is from the truth: a variance v / m over fresh samples shows as std^2 = v / m (1 - m / n) over subsets
    of n, and is v / n for all of them. It is too large where x and y have nearly one law, and infinite or NaN for
    m = min(n, k), where subsets tell nothing.

    Raises ValueError where x or y holds NaN or infinity; on a GPU, where looking would wait, the result is NaN.

    Source: Binkowski et al., arXiv 1801.01401.

    >>> import torch
    >>> x, y = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0))
    >>> found = kernel_inception_distance(x, y + 1, subsets=10, subset_size=100)
    >>> bool((found.value > 5 * found.standard_error) & (found.standard_error > found.std / 10**0.5))
    True
    """
    kernel = Polynomial() if kernel is None else kernel
    with checks.said_by("kernel_inception_distance"):
        checks.samples(x, y, False)
        checks.options(1.0, 1.0, True, kernel, True, None)
    checks.finite("kernel_inception_distance", x=x, y=y)
    count("kernel_inception_distance", "subsets", subsets, MOST)
    count("kernel_inception_distance", "subset_size", subset_size)
    fewest = min(len(x), len(y))
    if not 2 <= subset_size <= fewest:
        raise ValueError(
            f"kernel_inception_distance: `subset_size` is {subset_size}, expected 2 to {fewest}, the number of samples"
        )
    generator, found = _generator("kernel_inception_distance", seed), []
    report = reports.report("kernel_inception_distance", progress)
    for done in range(subsets):
        if report is not None:
            report(done, subsets)
        parts = [
            one[torch.randperm(len(one), generator=generator, device="cpu")[:subset_size].to(one.device)]
            for one in (x, y)
        ]
        found.append(energy_mmd(*parts, kernel=kernel).double())
    if report is not None:
        report(subsets, subsets)
    found = torch.stack(found)
    std = found.std() if subsets > 1 else found[0] * math.nan
    rest = fewest - subset_size
    return KID(found.mean(), std, std * math.sqrt(1 / subsets + (subset_size / rest if rest else math.inf)))


class FeatureStatistics(NamedTuple):
    """Mean `[D]` and covariance `[D, D]` of features, float64; `feature_statistics` makes them."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def feature_statistics(x: Tensor) -> FeatureStatistics:
    """Mean and covariance (over n - 1) of features `[n, ...]`, in float64, in blocks of rows.

    Raises ValueError where x holds NaN or infinity; on a GPU, where looking would wait, the results are NaN.

    >>> import torch
    >>> feature_statistics(torch.tensor([[0.0], [2.0]]))
    FeatureStatistics(mean=tensor([1.], dtype=torch.float64), covariance=tensor([[2.]], dtype=torch.float64))
    """
    return _statistics("feature_statistics", "x", x)


def _statistics(op: str, name: str, x: Tensor) -> FeatureStatistics:
    if not isinstance(x, Tensor) or x.ndim < 1 or len(x) < 2:
        came = f"has shape {list(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ValueError(f"{op}: `{name}` {came}, expected features [n, ...] of two samples or more")
    dense(op, name, x)
    if x.is_complex() or (x.is_floating_point() and x.dtype not in DATA_DTYPES):
        raise TypeError(f"{op}: `{name}` has dtype {x.dtype}, expected float32, bfloat16, float16, float64 or integers")
    checks.finite(op, **{name: x})
    x = x.reshape(len(x), -1)
    mean = x.mean(0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for rows in x.split(ROWS):
        apart = rows.double() - mean
        covariance.addmm_(apart.t(), apart)
    return FeatureStatistics(mean, covariance / (len(x) - 1))


@torch.no_grad()
def frechet_distance(x: Tensor | FeatureStatistics, y: Tensor | FeatureStatistics) -> Tensor:
    """||m_x - m_y||^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), m and C the means and covariances of features.

    Of features of an Inception network that is the FID. x and y are features `[n, ...]`, two or more, or
    `FeatureStatistics(mean, covariance)`, which may be kept (of the data, say). 0-dim, float64; no gradient.

    With C = A^T A, A the root of the eigenvalues times the eigenvectors, tr (C_x C_y)^(1/2) is the sum of the singular
    values of A_x A_y^T: no square root of a matrix that is not symmetric, nothing complex, and no noise from n < D,
    since eigenvalues below D 2^-52 of the largest are taken as 0.

    Raises ValueError where features or statistics hold NaN or infinity.

    Source: Heusel et al., arXiv 1706.08500; Dowson and Landau (1982).

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0]])  # variance 2
    >>> round(frechet_distance(x, 2 * x + 3).item(), 6)  # (1 - 5)^2 + (sqrt(2) - sqrt(8))^2
    18.0
    """
    x, y = (
        one if isinstance(one, FeatureStatistics) else _statistics("frechet_distance", name, one)
        for name, one in (("x", x), ("y", y))
    )
    for name, one in (("x", x), ("y", y)):
        tensor("frechet_distance", f"{name}.mean", one.mean)
        tensor("frechet_distance", f"{name}.covariance", one.covariance)
        size = x.mean.numel()
        if one.mean.shape != (size,) or one.covariance.shape != (size, size):
            raise ValueError(
                f"frechet_distance: `{name}` has a mean {list(one.mean.shape)} and a covariance "
                f"{list(one.covariance.shape)}, expected [{size}] and [{size}, {size}] like the mean of `x`"
            )
        for part, values in one._asdict().items():
            if values.device.type == "meta" or values.device != x.mean.device:
                raise ValueError(
                    f"frechet_distance: the {part} of `{name}` is on {values.device}, expected the device of `x`, and "
                    "not meta, where tensors have no values; .to(...) moves it"
                )
            if not values.isfinite().all():
                raise ValueError(
                    f"frechet_distance: the {part} of `{name}` holds NaN or infinity, expected numbers; scale down "
                    "features whose squares overflow float64"
                )
    roots = [_root(one.covariance.double()) for one in (x, y)]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].t()).sum()
    apart = (x.mean.double() - y.mean.double()).square().sum()
    return (apart + x.covariance.double().trace() + y.covariance.double().trace() - 2 * overlap).clamp(min=0)


def _root(covariance: Tensor) -> Tensor:
    """A [rank, D] with A^T A = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1:].clamp(min=0) * len(values) * 2.0**-52
    return values[kept].sqrt()[:, None] * vectors[:, kept].t()
