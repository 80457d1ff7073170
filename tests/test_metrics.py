"""lgd_kernels.metrics, against the formulas in float64 and against SciPy; what is counted over pairs block by block."""

import math
from functools import partial

import pytest
import torch
from mmd import each_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lgd_kernels as lgd
from lgd_kernels import metrics
from lgd_kernels.metrics import frechet, permutation
from lgd_kernels.runtime import blocks


def draws(generator, *counts, D=3, dtype=torch.float64):
    return [torch.randn(n, D, generator=generator, dtype=dtype) for n in counts]


def whole(function, points):
    """The matrix that is never stored."""
    points = points.double()
    if function.of_product:
        return function._replace(scale=1 / points.shape[1]).value(points @ points.t())
    return function.value((points[:, None] - points).square().sum(-1))


def test_energy_distance_is_scipys_squared(generator):
    stats = pytest.importorskip("scipy.stats")
    x, y, p, q = (torch.rand(n, generator=generator, dtype=torch.float64) * n for n in (60, 75, 60, 75))
    found = metrics.energy_distance(x, y, x_weights=p, y_weights=q, unbiased=False)
    assert found.item() == pytest.approx(stats.energy_distance(*(one.numpy() for one in (x, y, p, q))) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    "call, steps",
    [
        (partial(metrics.mmd_test, permutations=20), 1 + 21),
        (partial(metrics.kernel_inception_distance, subsets=7, subset_size=20), 1 + 7),
        (lgd.median_bandwidth, 2 * (1 + 21)),
        (metrics.energy_distance, 1 + 3),
    ],
)
def test_progress_moves_and_changes_no_result(call, steps, generator, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    both, heard = draws(generator, 50, 43), []
    found, expected = tensors(call(*both, progress=lambda *at: heard.append(at))), tensors(call(*both))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if call is metrics.energy_distance else 0)
    done, totals = zip(*heard, strict=True)
    assert len(heard) == steps and list(done) == sorted(done) and done[0] == 0 and {done[-1]} == set(totals)


def tensors(found):
    return [torch.as_tensor(one) for one in (found if isinstance(found, tuple) else (found,))]


def test_energy_distance_by_hand_and_its_gradient():
    x = torch.tensor([[0.0], [2.0]], requires_grad=True)
    found = metrics.energy_distance(x, torch.tensor([[3.0], [5.0]]), beta=2.0)  # 2 (9 + 25 + 1 + 9) / 4 - 4 - 4
    found.backward()
    assert found.item() == 14
    torch.testing.assert_close(x.grad, torch.tensor([[-4.0], [-8.0]]))  # d 2 (gap of means)^2 and of the spread


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("D", [3, 20])  # from differences, and from products
@each_kernel
def test_each_permutation_is_the_mmd_of_its_split(kernel, D, unbiased, generator, monkeypatch):
    """Several blocks, sets of different sizes; in float64 against the formula, in float32 within its rounding."""
    monkeypatch.setattr(blocks, "BLOCK", 16)
    x, y = draws(generator, 21, 34, D=D)
    y = y * 1.5 + 0.3
    matrix = whole(kernel, torch.cat((x, y))) * (-1 if isinstance(kernel, lgd.Energy) else 1)
    called_x = permutation._splits(21, 55, 30, 7)
    assert called_x.sum(0).eq(21).all() and called_x[:21, 0].all() and len({*map(tuple, called_x.t().tolist())}) == 31
    expected = []
    for w in called_x.t():
        within = [matrix[one][:, one] for one in (w, ~w)]
        if unbiased:
            means = [(one.sum() - one.trace()) / (len(one) * (len(one) - 1)) for one in within]
        else:
            means = [one.mean() for one in within]
        expected.append(sum(means) - 2 * matrix[w][:, ~w].mean())
    expected, scale = torch.stack(expected), matrix.abs().mean().item()
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        found = metrics.mmd_test(x.to(dtype), y.to(dtype), kernel=kernel, permutations=30, seed=7, unbiased=unbiased)
        both = torch.cat((found.value[None], found.permuted))
        torch.testing.assert_close(both, expected, rtol=0, atol=limit * scale)
        assert found.p_value == (1 + (expected[1:] >= expected[0]).sum().item()) / 31
        call = lgd.energy_mmd(x.to(dtype), y.to(dtype), kernel=kernel, unbiased=unbiased).item()
        call *= 2 if isinstance(kernel, lgd.Energy) else 1
        assert found.value.item() == pytest.approx(call, abs=limit * scale)


def test_p_values_by_counting():
    """Two and two: 2 of the 6 splits are as far apart; samples that are all alike: every split is."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.5]])
    assert metrics.mmd_test(x, y, permutations=3000).p_value == pytest.approx(1 / 3, abs=0.04)
    assert metrics.mmd_test(torch.full((3, 2), 0.1), torch.full((5, 2), 0.1)).p_value == 1.0
    far = metrics.mmd_test(torch.randn(30, 2), torch.randn(40, 2) + 9, kernel=lgd.Gaussian(2.0), permutations=99)
    assert far.p_value == 0.01


def test_p_values_of_one_law_are_uniform(generator):
    found = []
    for seed in range(150):
        x, y = draws(generator, 12, 9, dtype=torch.float32)
        found.append(metrics.mmd_test(x, y, permutations=99, seed=seed).p_value)
    found = torch.tensor(found)
    assert abs(found.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / 150)
    for level in (0.1, 0.3, 0.7):
        assert abs((found <= level).double().mean().item() - level) < 4 * math.sqrt(level * (1 - level) / 150)


def test_a_seed_is_a_test(generator):
    x, y = draws(generator, 40, 30)
    first, again, other = (metrics.mmd_test(x, y, permutations=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.permuted, again.permuted) and not torch.equal(first.permuted, other.permuted)
    assert torch.equal(first.value, other.value)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.untyped_storage().nbytes() >= found.nbytes:
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("D", [2, 40])
def test_the_matrix_is_not_stored(D, generator, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    x, y = draws(generator, 300, 340, D=D, dtype=torch.float32)
    with Largest() as largest:
        metrics.mmd_test(x, y, permutations=30)
        lgd.median_bandwidth(x, y)
    assert largest.numel <= 2**16 < 640**2 / 6  # the counts of the median


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
def test_close_pairs_get_differences(spread, generator, monkeypatch):
    """Clusters, which no centring removes: few close pairs, and, in one cluster, nearly all."""
    monkeypatch.setattr(blocks, "BLOCK", 16)
    for clusters in (1, 10):
        centres = 10 * torch.randn(clusters, 300, generator=generator)
        points = centres.repeat(40 // clusters, 1) + spread * torch.randn(40, 300, generator=generator)
        truth = (points.double()[:, None] - points.double()).square().sum(-1)
        for rows, columns, block in blocks.upper_blocks(points):
            torch.testing.assert_close(block.double(), truth[rows, columns], rtol=1e-4, atol=0)


def test_kid_is_the_mean_over_subsets(generator):
    """(<x, y> / D + 1)^3, unbiased, in float64, over the subsets that the seed gives."""
    x, y = (one.float() for one in draws(generator, 90, 70, D=16))
    y = y + 0.5
    found = metrics.kernel_inception_distance(x, y, subsets=7, subset_size=20, seed=3)
    source, expected = torch.Generator().manual_seed(3), []
    for _ in range(7):
        a, b = (one[torch.randperm(len(one), generator=source)[:20]].double() for one in (x, y))
        aa, bb, ab = ((left @ right.t() / 16 + 1) ** 3 for left, right in ((a, a), (b, b), (a, b)))
        expected.append(sum(one.fill_diagonal_(0).sum() / (20 * 19) for one in (aa, bb)) - 2 * ab.mean())
    expected = torch.stack(expected)
    torch.testing.assert_close(found.value, expected.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.std, expected.std(), rtol=1e-5, atol=0)
    assert found.standard_error.item() == pytest.approx(found.std.item() * math.sqrt(1 / 7 + 20 / 50), rel=1e-12)


def test_kids_standard_error_is_that_over_fresh_samples(generator):
    found = []
    for seed in range(60):
        x, y = (one.float() for one in draws(generator, 200, 200, D=4))
        found.append(metrics.kernel_inception_distance(x, y + 1, subsets=20, subset_size=50, seed=seed))
    apart = torch.stack([one.value for one in found]).std().item()
    told = torch.stack([one.standard_error for one in found]).square().mean().sqrt().item()
    assert told == pytest.approx(apart, rel=0.35)  # 4 standard errors of the standard deviation of 60
    assert torch.stack([one.std / math.sqrt(20) for one in found]).mean().item() < apart / 1.5


def test_frechet_distance_in_closed_form():
    """Diagonal covariances: ||m - m'||^2 + sum (s - s')^2. A rotation changes nothing."""
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    means, scales = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    one, other = (
        metrics.FeatureStatistics(turn @ m, turn @ (s**2).diag() @ turn.t()) for m, s in zip(means, scales, strict=True)
    )
    expected = (means[0] - means[1]).square().sum() + (scales[0] - scales[1]).square().sum()
    torch.testing.assert_close(metrics.frechet_distance(one, other), expected)
    assert metrics.frechet_distance(one, one).item() < 1e-13


@pytest.mark.parametrize("n", [300, 12])  # of 20 dimensions: fewer samples have covariances without full rank
def test_frechet_distance_is_the_formula(n, generator):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = draws(generator, n, n + 5, D=20, dtype=torch.float32)
    y = y * 1.3 + 0.2
    a, b = (one.double().numpy() for one in (x, y))
    c_a, c_b = (((one - one.mean(0)).T @ (one - one.mean(0))) / (len(one) - 1) for one in (a, b))
    root = abs(linalg.eigvals(c_a @ c_b)) ** 0.5
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (c_a.trace() + c_b.trace() - 2 * root.sum())
    found = metrics.frechet_distance(x, y)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-10 if n == 300 else 1e-5)  # eigenvalues of 1e-16, and roots
    kept = metrics.feature_statistics(y)
    assert metrics.frechet_distance(x, kept) == found == metrics.frechet_distance(metrics.feature_statistics(x), y)
    assert metrics.frechet_distance(x, x).item() < 1e-12 * c_a.trace()


def test_statistics_in_blocks_of_rows(generator, monkeypatch):
    monkeypatch.setattr(frechet, "ROWS", 7)
    (x,) = draws(generator, 40)
    found = metrics.feature_statistics(x.bfloat16().view(40, 3, 1) + 100)
    x = (x.bfloat16() + 100).double()
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.covariance, x.t().cov())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 3, 40])
def test_median_bandwidth_is_the_median(D, dtype, generator, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 32)
    x, y = (one.to(dtype) for one in draws(generator, 70, 33, D=D))
    for given in ((x, y), (x,), (x[:2],), (x[:1], y[:3]), (x.repeat(2, 1), y)):
        points = torch.cat(given).double()
        expected = torch.cdist(points, points)[torch.ones(len(points), len(points)).triu(1) > 0].median().item()
        assert lgd.median_bandwidth(*given) == pytest.approx(expected, rel=3e-7 if D == 40 else 1.2e-7)
    assert lgd.median_bandwidth(x[:1].expand(5, D)) == 0


METRICS = {
    "energy_distance": metrics.energy_distance,
    "energy_distance, reference": partial(metrics.energy_distance, impl="reference"),
    "mmd_test": partial(metrics.mmd_test, permutations=20),
    "mmd_test, products": partial(metrics.mmd_test, permutations=20, kernel=lgd.Polynomial()),
    "mmd_test, gaussian": partial(metrics.mmd_test, permutations=20, kernel=lgd.Gaussian(4.0)),
    "kernel_inception_distance": partial(metrics.kernel_inception_distance, subsets=2, subset_size=20),
    "frechet_distance": metrics.frechet_distance,
    "median_bandwidth": lgd.median_bandwidth,
}
each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["x", "y"])
@each_metric
def test_what_is_not_finite_is_refused_or_gives_nan(metric, of, value, generator):
    """With the name of the argument; and no p-value."""
    samples = dict(zip("xy", draws(generator, 40, 50, dtype=torch.float32), strict=True))
    samples[of][7, 1] = value
    if metric.startswith("energy_distance"):
        assert METRICS[metric](*samples.values()).isnan()
        return
    name = metric.split(",")[0]
    with pytest.raises(ValueError, match=f"{name}: `{of}` holds NaN or infinity, expected numbers"):
        METRICS[metric](*samples.values())


@pytest.mark.parametrize("D", [3, 20])
@pytest.mark.parametrize("kernel", [lgd.Energy(), lgd.Energy(2.0), lgd.Polynomial()], ids=str)
def test_no_p_value_where_kernel_values_overflow(kernel, D, generator):
    """Squares of 1e20 are infinite in float32; in float64 the same features have a p."""
    x, y = (1e20 * one for one in draws(generator, 40, 50, D=D, dtype=torch.float32))
    found = metrics.mmd_test(x, y, kernel=kernel, permutations=50)
    assert math.isnan(found.p_value) and found.value.isnan()
    assert metrics.mmd_test(x.double(), y.double(), kernel=kernel, permutations=50).p_value > 0.02


def test_statistics_that_are_not_finite_are_named(generator):
    x, y = draws(generator, 40, 50)
    good = metrics.feature_statistics(x)
    with pytest.raises(ValueError, match="the covariance of `y` holds NaN or infinity"):
        metrics.frechet_distance(x, good._replace(covariance=good.covariance * math.nan))
    with pytest.raises(ValueError, match="the mean of `x` holds NaN or infinity"):
        metrics.frechet_distance(good._replace(mean=good.mean + math.inf), y)
    with pytest.raises(ValueError, match="the covariance of `y` holds .* squares overflow float64"):
        metrics.frechet_distance(x, y * 1e200)
    with pytest.raises(ValueError, match="feature_statistics: `x` holds NaN or infinity"):
        metrics.feature_statistics(x * math.nan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [2, 80])
@each_metric
def test_autocast_changes_no_bit(metric, D, dtype, generator):
    x, y = draws(generator, 90, 80, D=D, dtype=torch.float32)
    expected = tensors(METRICS[metric](x, y + 0.03))
    with torch.autocast("cpu", dtype=dtype):
        found = tensors(METRICS[metric](x, y + 0.03))
    assert all(map(torch.equal, found, expected))


class Products(TorchFunctionMode):
    """The settings that products of float32 meet."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__ or "matmul" in function.__name__:
            if any(isinstance(one, torch.Tensor) and one.dtype == torch.float32 for one in args):
                self.met.append((torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision))
        return function(*args, **(kwargs or {}))


@pytest.mark.extension
def test_products_of_float32_are_whole(generator):
    """Whatever is set around the call (as TF32 on a GPU, so bfloat16 on a CPU that has it), and left as it was."""
    x, y = draws(generator, 90, 80, D=80, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    for metric in (
        "energy_distance",
        "mmd_test",
        "mmd_test, products",
        "kernel_inception_distance",
        "median_bandwidth",
    ):
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu"), Products() as products:
                METRICS[metric](x, y)
                assert torch.is_autocast_enabled("cpu") and torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        # 20 x 20 pairs of the subsets are few enough for differences
        assert set(products.met) == ({(False, "ieee")} if metric != "kernel_inception_distance" else set()), metric


CASES = {
    "samples": (lambda x: metrics.mmd_test(x, x[:, :2]), ValueError, "`y` has shape"),
    "kernel": (lambda x: metrics.mmd_test(x, x, kernel="energy"), TypeError, "`kernel` is a str"),
    "permutations": (lambda x: metrics.mmd_test(x, x, permutations=0), ValueError, "`permutations` is 0, expected 1"),
    "without values": (
        lambda x: lgd.median_bandwidth(x.to("meta")),
        ValueError,
        "median_bandwidth: `x` is on meta, where tensors have no values",
    ),
    "on two devices": (
        lambda x: metrics.frechet_distance(x, x.to("meta")),
        ValueError,
        "frechet_distance: the mean of `y` is on meta, expected the device of `x`",
    ),
    "float8": (
        lambda x: metrics.frechet_distance(x.to(torch.float8_e4m3fn), x),
        TypeError,
        "`x` has dtype torch.float8_e4m3fn, expected float32",
    ),
    "too many": (lambda x: metrics.mmd_test(x, x, permutations=2**63), ValueError, "expected at most 1000000"),
    "endless": (
        lambda x: metrics.kernel_inception_distance(x, x, subsets=2**63, subset_size=2),
        ValueError,
        "`subsets` is 9223372036854775808, expected at most 1000000",
    ),
    "one sample": (lambda x: metrics.mmd_test(x, x[:1]), ValueError, "`y` holds one sample"),
    "subset": (lambda x: metrics.kernel_inception_distance(x, x), ValueError, "`subset_size` is 1000, expected 2 to 4"),
    "features": (
        lambda x: metrics.frechet_distance(x, x[:1]),
        ValueError,
        r"frechet_distance: `y` has shape \[1, 3\], expected features",
    ),
    "dimensions": (lambda x: metrics.frechet_distance(x, x[:, :2]), ValueError, r"`y` has a mean \[2\]"),
    "one in all": (lambda x: lgd.median_bandwidth(x[:1]), ValueError, "expected two or more in all"),
    "infinity": (lambda x: lgd.median_bandwidth(x / 0), ValueError, "median_bandwidth: `x` holds NaN or infinity"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call(torch.ones(4, 3))


def test_a_median_that_overflows_is_no_bandwidth():
    for x in (torch.arange(5.0)[:, None] * 1e20, torch.arange(5.0, dtype=torch.float64)[:, None] * 1e20):
        with pytest.raises(ValueError, match="median_bandwidth: the median of the squares overflows float32; scale"):
            lgd.median_bandwidth(x)
        assert lgd.median_bandwidth(x * 1e-20) == 2.0


def test_half_samples_under_autocast_of_another_half(generator):
    """torch.cat of float16 raises there."""
    x = torch.randn(30, 4, generator=generator).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lgd.median_bandwidth(x, x + 1)
    assert found == lgd.median_bandwidth(x, x + 1)
