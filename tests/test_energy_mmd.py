"""MMD between samples: E k(x, y) - lam/2 (E k(x, x') + E k(y, y'))."""

import math

import pytest
import torch
from mmd import KERNELS, OPTIONS, definition, each_kernel, terms, terms_of_slope

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.energy_mmd import reference
from lgd_kernels.runtime import impls


@pytest.fixture(params=["cpu", "reference"])
def impl(request):
    return request.param


def test_hand_worked(impl):
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [3.0, 0.0], [3.0, 4.0]])
    between = (4 + 3 + 5 + 3 + 4 + 0) / 6
    for options, expected in (
        ({}, between - (5 + (5 + 3 + 4) / 3) / 2),
        ({"unbiased": False}, between - (5 / 2 + (5 + 3 + 4) * 2 / 9) / 2),
        ({"lam": 0.0}, between),
        ({"lam": 0.5, "target_term": False}, between - 5 / 4),
        ({"beta": 2.0, "lam": 0.0}, (16 + 9 + 25 + 9 + 16 + 0) / 6),
        ({"kernel": lgd.Gaussian(5.0), "lam": 0.0}, -sum(math.exp(-s / 50) for s in (16, 9, 25, 9, 16, 0)) / 3),
    ):
        assert lgd.energy_mmd(x, y, impl=impl, **options).item() == pytest.approx(expected, rel=1e-6), options


def test_hand_worked_gradient(impl):
    x, y = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    lgd.energy_mmd(x, y, lam=0.0, impl=impl).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[-0.3, -0.4]]))  # half of a unit vector; the pair at 0 adds none
    torch.testing.assert_close(y.grad, torch.tensor([[0.3, 0.4], [0.0, 0.0]]))


@each_kernel
def test_two_diracs(kernel, impl):
    """Biased, of Diracs a and b: k(a, b) - (k(a, a) + k(b, b)) / 2, times -2 but for the energy."""
    a, b = torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    found = lgd.energy_mmd(a.expand(3, 2), b.expand(5, 2), kernel=kernel, unbiased=False, impl=impl).item()
    if isinstance(kernel, lgd.Polynomial):
        k_ab, k_aa, k_bb = ((dot / 2 + 1) ** 3 for dot in (-1.5, 5.0, 1.25))
    else:
        k_ab, k_aa, k_bb = (kernel.value(torch.tensor(s, dtype=torch.float64)).item() for s in (9.25, 0.0, 0.0))
    factor = 1 if isinstance(kernel, lgd.Energy) else -2
    assert found == pytest.approx(factor * (k_ab - (k_aa + k_bb) / 2), rel=1e-12)


def test_two_gaussians_in_closed_form(generator):
    """N(0, 1) and N(1, 1): Gaussian kernel: 2 (1 - exp(-1/6)) / sqrt(3); energy, beta 2: the gap squared."""
    x = torch.randn(3000, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(3000, 1, generator=generator, dtype=torch.float64) + 1
    expected = 2 * (1 - math.exp(-1 / 6)) / math.sqrt(3)
    assert lgd.energy_mmd(x, y, kernel=lgd.Gaussian(1.0)).item() == pytest.approx(expected, abs=0.05)
    assert lgd.energy_mmd(x, y, beta=2.0).item() == pytest.approx(1.0, abs=0.2)
    # E |N(m, 2)| = 2 / sqrt(pi) exp(-m^2 / 4) + m erf(m / 2)
    energy = 2 / math.sqrt(math.pi) * (math.exp(-0.25) - 1) + math.erf(0.5)
    assert lgd.energy_mmd(x, y).item() == pytest.approx(energy, abs=0.05)


def test_half_of_scipys_energy_distance_squared(generator, impl):
    stats = pytest.importorskip("scipy.stats")
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64) + n / 100 for n in (60, 75))
    p, q = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (60, 75))
    expected = stats.energy_distance(x.numpy(), y.numpy(), p.numpy(), q.numpy()) ** 2 / 2
    found = lgd.energy_mmd(x, y, unbiased=False, x_weights=p, y_weights=q, impl=impl)
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss, kernel, share", [
    ("energy", lgd.Energy(), 1.0), ("gaussian", lgd.Gaussian(0.7), 0.5), ("laplacian", lgd.Laplace(0.7), 0.5),
])  # fmt: skip
def test_agrees_with_geomloss(loss, kernel, share, impl, generator):
    """Biased, with lam 1 and weights; of MMD^2 half. It takes distances of less than 1e-4 for 1e-4."""
    geomloss = pytest.importorskip("geomloss")
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_() for n in (60, 75))
    p, q = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (60, 75))
    p, q = p / p.sum(), q / q.sum()
    expected = geomloss.SamplesLoss(loss, blur=0.7, backend="tensorized")(p, x, q, y)
    found = share * lgd.energy_mmd(x, y, kernel=kernel, unbiased=False, x_weights=p, y_weights=q, impl=impl)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-4 * (p @ p + q @ q).item())
    grads = (torch.autograd.grad(one, (x, y)) for one in (found, expected))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@each_kernel
def test_laws(kernel, impl, generator):
    """MMD(X, X) = 0 biased; symmetry; the order of samples and, radial, a translation change nothing."""
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (70, 131))

    def mmd(x, y, **options):
        return lgd.energy_mmd(x, y, kernel=kernel, impl=impl, **options).item()

    scale = abs(lgd.energy_mmd(x, y, kernel=kernel, lam=0.0).item())
    assert abs(mmd(x, x, unbiased=False)) < 1e-13 * scale
    found = mmd(x, y)
    assert mmd(y, x) == pytest.approx(found, abs=1e-13 * scale)
    assert mmd(x.flip(0), y[torch.randperm(131, generator=generator)]) == pytest.approx(found, abs=1e-13 * scale)
    if not isinstance(kernel, lgd.Polynomial):
        assert mmd(x + 5, y + 5) == pytest.approx(found, abs=1e-12 * scale)


def test_unbiased_over_draws(generator, impl):
    """Of one law the mean is 0, where the biased one is E|x - x'| / n."""
    x, y = (torch.randn(2000, 4, 2, generator=generator) for _ in range(2))
    found = {b: lgd.energy_mmd(x, y, unbiased=b, batched=True, impl=impl) for b in (True, False)}
    error = found[True].std().item() / math.sqrt(2000)
    assert abs(found[True].mean().item()) < 4 * error
    assert found[False].mean().item() == pytest.approx(math.sqrt(math.pi) / 4, abs=4 * error)


def test_weights_count_samples(impl, generator):
    """Biased, 2 is a sample given twice; unbiased, equal weights are none, and 0 leaves a sample out."""
    x, y = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (6, 7))
    w = torch.tensor([1.0, 2, 3, 1, 1, 2])
    repeated = x.repeat_interleave(w.long(), 0)
    torch.testing.assert_close(
        lgd.energy_mmd(x, y, x_weights=w, unbiased=False, impl=impl),
        lgd.energy_mmd(repeated, y, unbiased=False, impl=impl),
    )
    torch.testing.assert_close(
        lgd.energy_mmd(x, y, y_weights=torch.full((7,), 3.0), impl=impl), lgd.energy_mmd(x, y, impl=impl)
    )
    without = torch.tensor([1.0, 0, 1, 1, 0, 1])
    torch.testing.assert_close(
        lgd.energy_mmd(x, y, x_weights=without, impl=impl), lgd.energy_mmd(x[without > 0], y, impl=impl)
    )


SUMS = [  # (dtype of the weights, a factor of all)
    (torch.float16, 1e-6), (torch.float16, 5e4), (torch.bfloat16, 1e-38), (torch.float32, 1e-42),
    (torch.float32, 1e-30), (torch.float32, 1e-22), (torch.float32, 1e19), (torch.float32, 1e38),
    (torch.float64, 1e-310), (torch.float64, 1e-200), (torch.float64, 1e200), (torch.float64, 1e306),
]  # fmt: skip


@pytest.mark.parametrize("weights, factor", SUMS)
@pytest.mark.parametrize("n, D", [(9, 3), (67, 65)])  # from differences, and from products
def test_weights_of_any_positive_sum(n, D, weights, factor, impl, generator):
    """Value and gradients are those of the same weights divided by their sum; also in batches and in pieces."""
    for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        x, y = (torch.randn(2, count, D, generator=generator, dtype=dtype).requires_grad_() for count in (n, 70))
        given = [(factor * (torch.rand(2, count, generator=generator).double() + 0.1)).to(weights) for count in (n, 70)]
        shares = [one.double() / one.double().sum(1, keepdim=True) for one in given]

        def call(p, q, x=x, y=y, **options):
            loss = lgd.energy_mmd(x, y, x_weights=p, y_weights=q, impl=impl, **options)
            return loss, *torch.autograd.grad(loss.sum(), (x, y))

        want, apart = call(*shares, batched=True), call(*shares, batched=True, lam=0.0)
        for found in (call(*given, batched=True), call(*given, batched=True, progress=lambda *at: None)):
            for one, true, size in zip(found, want, apart, strict=True):
                torch.testing.assert_close(one, true, rtol=0, atol=limit * size.abs().max().item())


@pytest.mark.parametrize("D", [3, 80])
def test_a_power_of_two_in_the_weights_changes_no_bit(D, impl, generator):
    x, y = (torch.randn(n, D, generator=generator).requires_grad_() for n in (67, 70))
    p, q = torch.rand(67, generator=generator), torch.rand(70, generator=generator)
    found = []
    for up, down in ((1.0, 1.0), (2.0**90, 2.0**-90)):
        loss = lgd.energy_mmd(x, y, x_weights=p * up, y_weights=q * down, impl=impl)
        found.append([loss, *torch.autograd.grad(loss, (x, y))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("wrong", [[1.0, math.inf, 1.0], [1.0, math.nan, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_wrong_weights_that_cannot_be_read_give_nan(wrong, lam, impl):
    """As on a GPU: the operator itself reads no values."""
    x, y = torch.arange(6.0).view(1, 3, 2), torch.ones(1, 4, 2)
    definition = x, y, torch.tensor([wrong]), None, "energy", [1.0], lam, True, True, True, None, [True, True], impl
    loss, d_x, d_y = torch.ops.lgd.energy_mmd(*definition)
    assert loss.isnan() and d_y.isnan().all()


def compare(impl, x, y, kernel, limit, **options):
    """Value and gradients against float64, as part of the sum of the terms' sizes."""
    leaves = [one.detach().requires_grad_() for one in (x, y)]
    precision = options.pop("precision", None)
    loss = lgd.energy_mmd(*leaves, kernel=kernel, impl=impl, precision=precision, **options)
    wide = [testing.promoted(one).requires_grad_() for one in (x, y)]
    truth = reference.energy_mmd(definition(*wide, kernel, **options))[0]
    assert loss.dtype == (torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32)
    with torch.no_grad():  # other loops, without slopes
        alone = lgd.energy_mmd(*leaves, kernel=kernel, impl=impl, precision=precision, **options)
    for value in (loss, alone):
        assert abs(value.item() - truth.item()) <= limit * terms(x, y, kernel).item() + 1e-300
    sizes = iter((terms_of_slope(*wide, kernel), terms_of_slope(*wide[::-1], kernel)))
    for found, true, leaf in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), leaves, strict=True
    ):
        assert found.dtype == leaf.dtype and found.shape == leaf.shape
        stored = torch.finfo(leaf.dtype)
        rounding = stored.eps if leaf.dtype != loss.dtype else 0.0
        error = (found.double() - true).abs().max().item()
        assert error <= limit * next(sizes) + rounding * (true.abs().max().item() + stored.tiny)  # or subnormal


LIMIT = {torch.float64: 64 * 2.0**-53}


@each_kernel
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_float64(kernel, options, impl, generator):
    for n, k, shape in ((2, 3, (1,)), (5, 6, (3,)), (64, 65, (2,)), (131, 70, (2, 3)), (70, 67, (65,))):
        for dtype in testing.DTYPES:
            x, y = testing.sample((n, *shape), dtype, generator), testing.sample((k, *shape), dtype, generator)
            limit = LIMIT.get(dtype, 8 * 2.0**-24)
            compare(impl, x, y, kernel, 2 * limit if kernel == KERNELS["polynomial"] else limit, **options)


@pytest.mark.extension
@pytest.mark.parametrize("kernel, options", [
    (lgd.Energy(), {}), (lgd.Gaussian(1.5), {"unbiased": False}), (lgd.Polynomial(), {"unbiased": False}),
    (lgd.Energy(1.75), {"lam": 0.0}),
])  # fmt: skip
def test_few_long_samples_agree_with_float64(kernel, options, generator):
    """Of so many dimensions that the tiles are packed some coordinates at a time."""
    D = 16384 + 1024 + 3
    x, y = (torch.randn(n, D, generator=generator) / D**0.5 for n in (2, 18))
    limit = (32 if isinstance(kernel, lgd.Polynomial) else 16) * 2.0**-24
    compare("cpu", x, y, kernel, limit, **options)
    compare("cpu", x, y, kernel, limit, y_weights=1e-30 * (torch.rand(18, generator=generator) + 0.5), **options)


@pytest.mark.extension
@pytest.mark.parametrize("kernel", [lgd.Energy(), lgd.Energy(1.75), lgd.Gaussian(8.0), lgd.Polynomial()], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_products_agree_with_float64(kernel, options, generator, monkeypatch):
    """More than a block of them, weights, with and without an offset that centring takes away."""
    monkeypatch.setattr(impls.launcher("energy_mmd", "cpu"), "BLOCK", 64)
    x, y = (torch.randn(n, 80, generator=generator) for n in (150, 133))
    p, q = torch.rand(150, generator=generator), torch.rand(133, generator=generator)
    for precision in (None, "product"):
        for offset in (0, 3) if not isinstance(kernel, lgd.Polynomial) else (0,):
            compare("cpu", x + offset, y + offset, kernel, 1e-6, precision=precision, x_weights=p, y_weights=q,
                    **options)  # fmt: skip


@pytest.mark.extension
@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("clusters", [1, 3])
def test_close_particles(spread, clusters, generator):
    """Samples that are `spread` of their norm apart, of one cluster or of several, whose centres no shift removes."""
    centres = torch.randn(clusters, 3072, generator=generator)
    x, y = (
        centres.repeat_interleave(12, 0) + spread * torch.randn(12 * clusters, 3072, generator=generator)
        for _ in range(2)
    )
    x, y = x.repeat(6, 1)[:70], y.repeat(6, 1)[:70]  # enough of them, some twice
    near = spread * math.sqrt(2 * 3072)  # the distance within a cluster, on which the slope's error is seen

    def call(precision, dtype=torch.float32, impl="cpu"):
        leaves = [one.to(dtype).requires_grad_() for one in (x, y)]
        loss = lgd.energy_mmd(*leaves, precision=precision, impl=impl)
        return loss.detach().double(), *(grad.double() for grad in torch.autograd.grad(loss, leaves))

    truth = call(None, torch.float64, "reference")
    scale = lgd.energy_mmd(x.double(), y.double(), lam=0.0).item()
    assert scale > near / 2
    for precision, impl, value_limit, slope_limit in (
        ("direct", "cpu", 1e-6, 2e-6), (None, "cpu", 1e-5, 1e-4), (None, "reference", 1e-6, 2e-6),
    ):  # fmt: skip
        found = call(precision, impl=impl)
        assert abs(found[0] - truth[0]) <= value_limit * scale
        for one, true in zip(found[1:], truth[1:], strict=True):
            assert (one - true).norm(dim=1).max() <= slope_limit / len(x), (precision, impl)  # of unit vectors / n


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "strided", "expanded", "permuted", "offset"])
def test_takes_any_layout(layout, impl, generator):
    for x_dtype in testing.DTYPES:
        for y_dtype in testing.DTYPES:
            x, y = testing.sample((9, 2, 5), x_dtype, generator, layout), testing.sample((7, 2, 5), y_dtype, generator)
            limit = LIMIT[torch.float64] if torch.float64 in (x_dtype, y_dtype) else 8 * 2.0**-24
            compare(impl, x, y, lgd.Energy(), 2 * limit)


def test_batches_are_problems_of_their_own(impl, generator):
    x, y = torch.randn(3, 70, 2, 4, generator=generator), torch.randn(3, 5, 2, 4, generator=generator)
    w = torch.rand(3, 70, generator=generator)
    found = lgd.energy_mmd(x, y, x_weights=w, batched=True, impl=impl)
    assert found.shape == (3,)
    for b in range(3):
        assert torch.equal(found[b], lgd.energy_mmd(x[b], y[b], x_weights=w[b], impl=impl))
    assert lgd.energy_mmd(x[:0], y[:0], batched=True, impl=impl).shape == (0,)


def test_coincident_points_have_slope_0(impl):
    for kernel in KERNELS.values():
        if isinstance(kernel, lgd.Polynomial):
            continue
        x = torch.ones(3, 2, requires_grad=True)
        loss = lgd.energy_mmd(x, torch.ones(4, 2), kernel=kernel, impl=impl)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6) and torch.equal(x.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_show(value, impl):
    for kernel in KERNELS.values():
        x = torch.randn(5, 3)
        x[2, 1] = value
        found = lgd.energy_mmd(x, torch.randn(4, 3), kernel=kernel, impl=impl).item()
        vanishes = value == math.inf and isinstance(kernel, (lgd.Gaussian, lgd.Laplace, lgd.RationalQuadratic))
        assert not math.isfinite(found) or vanishes, kernel
