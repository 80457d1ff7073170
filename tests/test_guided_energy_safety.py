"""guided_energy with particles that nearly coincide, over many draws, on threads, in memory, and what it refuses."""

import math
import warnings

import pytest
import torch
from conftest import address
from energy import dtypes, guided_energy, interpreted, loss_and_slope, problem, truth

import lgd_kernels as lgd
from benchmarks import timing
from lgd_kernels import testing
from lgd_kernels.ops.guided_energy import op
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import step_coefficients


def close(generator, spread, renoise, m=4, k=4, row=3072, batch=2):
    """Points around one centre of norm sqrt(D), all about spread * sqrt(D) apart. EDM levels, where x_s = x0 + ..."""
    levels = lgd.EDM().levels(torch.full((batch,), 2 * spread), torch.full((batch,), spread))
    x0 = testing.sample((batch, row), torch.float32, generator)

    def near(count):
        return x0[:, None] + spread * testing.sample((batch, count, row), torch.float32, generator)

    y = lgd.Renoise(x0, k, 7) if renoise else near(k)
    return near(m), near(m), near(m), torch.full((batch,), 0.5), levels, y


@pytest.mark.parametrize("renoise", [False, True], ids=["tensor", "renoise"])
@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_close_particles(target, spread, renoise, generator):
    """Distances are of differences, so what is left is the rounding of x_s itself, which grows with norm / spread. Seen
    from x0, where that is given, it does not."""
    args = close(generator, spread, renoise, *((2, 2, 3072, 1) if interpreted(target) else ()))
    for beta in (1.75,) if interpreted(target) else (1.0, 1.75):
        found = loss_and_slope(target, *args, beta=beta)
        *expected, terms, slopes = truth(*args, beta=beta)
        errors = [((k - t).abs() / of).max().item() for k, t, of in zip(found, expected, (terms, slopes), strict=True)]
        assert errors[0] <= 1e-6 + 1e-8 / spread and errors[1] <= 1e-6 + 1e-9 / spread, errors
        if renoise:
            assert errors[0] <= 1e-5, errors


def power_of_distance(dimension, apart, variance, beta):
    """E ||X||^beta for X ~ N(apart, variance I): a moment of the noncentral chi distribution.

        (2 variance)^(beta/2) Gamma((d + beta)/2) / Gamma(d/2) 1F1(-beta/2; d/2; -|apart|^2 / (2 variance))

    Source: Johnson, Kotz, Balakrishnan, "Continuous Univariate Distributions" 2, chapter 29. By Kummer,
    1F1(a; b; -z) = exp(-z) 1F1(b - a; b; z), whose terms are positive.
    """
    z, a, b = apart**2 / (2 * variance), (dimension + beta) / 2, dimension / 2
    term = series = 1.0
    for i in range(200):
        term *= (a + i) / (b + i) * z / (i + 1)
        series += term
    scale = math.exp(math.lgamma(a) - math.lgamma(b) - z)
    return (2 * variance) ** (beta / 2) * scale * series


def test_the_moment_is_right():
    """|X|^2 and, in one dimension without shift, E |X| = sqrt(2 / pi)."""
    assert math.isclose(power_of_distance(3, 2.0, 0.5, 2.0), 3 * 0.5 + 4)
    assert math.isclose(power_of_distance(1, 0.0, 1.0, 1.0), math.sqrt(2 / math.pi))


@pytest.mark.parametrize(
    ("beta", "lam", "unbiased"), [(1.0, 1.0, True), (1.75, 1.0, True), (0.5, 0.5, False), (2.0, 1.0, True)]
)
def test_is_unbiased_over_many_draws(target, beta, lam, unbiased):
    """Gaussians whose energy is known: x_s ~ N(mean, V^2), y ~ N(signal_s x0, noise_s^2), drawn from seeds alone."""
    n, row, m, k = 6 if interpreted(target) else 10_000, 3, 3, 2
    levels = lgd.RectifiedFlow().levels(torch.full((n,), 0.8), torch.full((n,), 0.4))
    x, cond, x0 = torch.full((n, m, row), 0.3), torch.full((n, m, row), 1.1), torch.full((n, row), -0.5)
    a, b, v = (one[0].item() for one in step_coefficients(testing.promoted(levels), "x0", 1.0))
    apart = (0.3 * a + b * (1.1 + 0.5 * 0.2) - 0.6 * -0.5) * math.sqrt(row)
    share = 1 if unbiased else (m - 1) / m
    known = power_of_distance(row, apart, v**2 + 0.4**2, beta)
    known -= lam / 2 * share * power_of_distance(row, 0.0, 2 * v**2, beta)
    options = {"beta": beta, "lam": lam, "unbiased": unbiased, "churn": 1.0, "seed": 1}
    found = guided_energy(target, x, cond, cond - 0.2, 0.5, levels, lgd.Renoise(x0, k, 1), **options).cpu().double()
    assert abs(found.mean() - known) < 4 * found.std() / math.sqrt(n)


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    batch, row = (1, 1101) if interpreted(target) else (5, 40_001)
    for kind, m in (("tensor", 4), ("renoise", 3)):
        args, _ = problem(generator, m, 3, row, batch=batch, kind=kind)
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(torch.cat(loss_and_slope(target, *args, churn=0.5, seed=1)))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gradients_to_the_data_have_the_same_bits(target, generator):
    args, _ = problem(generator, 4, 3, 101 if interpreted(target) else 3001)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        x, y = (args[i].detach().to(target.device).requires_grad_() for i in (0, 5))
        loss = guided_energy(target, x, *args[1:5], y, churn=0.5, seed=1)
        found.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss.sum(), (x, y))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_changes_no_input_and_reads_no_stale_memory(target, generator, poisoned):
    """Fresh allocations are poisoned; inputs lie between sentinels."""
    held = torch.full((4, 2, 2, 3000), torch.nan)
    held[..., 500:2500] = torch.randn(4, 2, 2, 2000, generator=generator)
    held = held.to(target.device)
    before, levels = held.clone(), testing.moved(testing.step_levels(2), target.device)
    x, cond, uncond, y = held[..., 500:2500].unbind(0)
    for kind in (y, lgd.Renoise(y[:, 0], 3, 2)):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, cond, uncond)]
        omega = torch.ones(2, device=target.device, requires_grad=True)
        loss = guided_energy(target, *leaves, omega, levels, kind, churn=1.0, seed=9)
        grads = torch.autograd.grad(loss.sum(), (*leaves, omega))
        assert loss.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        assert {address(one) for one in (loss, *grads[:3])} <= poisoned.keys()
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("where", ["x", "target", "omega", "noise"])
def test_nan_stays_in_its_item(target, where, generator):
    for dtype in dtypes(target):
        args, options = problem(generator, 3, 2, 300, dtype, noise=True)
        {"x": args[0], "target": args[5], "omega": args[3], "noise": options["noise"]}[where][1] = torch.nan
        loss, slope = loss_and_slope(target, *args, **options)
        assert loss.isnan().tolist() == slope.isnan().tolist() == [False, True, False]


@pytest.mark.extension
@pytest.mark.parametrize("kind", ["tensor", "renoise"])
def test_memory_does_not_grow_with_the_elements(kind, generator):
    """Nothing but [B, count] float64 and a few [B]; training keeps the same."""
    held = []
    for row in (100, 20_000):
        args, _ = problem(generator, 4, 4, row, kind=kind)
        omega = args[3].requires_grad_()

        def train(args=args, omega=omega):
            return torch.autograd.grad(lgd.guided_energy(*args, churn=1.0, seed=1).sum(), omega)

        args = list(args)
        held.append((timing.peak_memory(lambda args=args: lgd.guided_energy(*args, churn=1.0, seed=1), "cpu"),
                     timing.peak_memory(train, "cpu")))  # fmt: skip
    count = 2 * 16 + 4 + 3 * 6
    assert held[0] == held[1] and max(held[0]) < 3 * count * 8 + 500


def bad(**change):
    x = torch.ones(2, 3, 4)
    arguments = dict(x=x, cond=x, uncond=x, omega=0.5, levels=testing.step_levels(2), target=torch.ones(2, 2, 4))
    return arguments | change


X0, ONE, NONE = torch.ones(2, 4), torch.ones(2, 1, 4), torch.ones(2, 0, 4)
CASES = {
    "x is flat": (
        dict(x=torch.ones(2), cond=torch.ones(2), uncond=torch.ones(2)),
        ValueError,
        r"`x` has shape \[2\], expected \[B, m, \.\.\.\]",
    ),
    "no particles": (dict(x=NONE, cond=NONE, uncond=NONE), ValueError, r"`x` has shape \[2, 0, 4\]"),
    "cond shape": (dict(cond=torch.ones(2, 2, 4)), ValueError, r"`cond` has shape \[2, 2, 4\], expected \[2, 3, 4\]"),
    "uncond dtype": (dict(uncond=torch.ones(2, 3, 4).long()), TypeError, "`uncond` has dtype torch.int64"),
    "noise shape": (dict(churn=1.0, noise=ONE), ValueError, r"`noise` has shape \[2, 1, 4\]"),
    "omega of particles": (
        dict(omega=torch.ones(2, 3)),
        ValueError,
        r"`omega` has shape \[2, 3\], expected \[B\] = \[2\]",
    ),
    "levels of particles": (dict(levels=testing.step_levels(6)), ValueError, r"`levels.signal_t` has shape \[6\]"),
    "prediction": (dict(prediction="score"), ValueError, "`prediction` is 'score'"),
    "churn": (dict(churn=2.0, seed=1), ValueError, "`churn` is 2.0"),
    "no noise": (dict(churn=0.5), ValueError, "`churn` is 0.5 but there is no noise"),
    "seed of particles": (
        dict(churn=0.5, seed=torch.arange(6)),
        ValueError,
        r"`seed` has shape \[6\], .* \[B\] = \[2\]",
    ),
    "impl": (dict(impl="fast"), ValueError, "`impl` is 'fast'"),
    "target kind": (
        dict(target=None),
        TypeError,
        "`target` is a NoneType, expected a tensor .* or Renoise or Expected",
    ),
    "target shape": (
        dict(target=torch.ones(2, 2, 5)),
        ValueError,
        r"`target` has shape \[2, 2, 5\], expected \[2, 2, 4\]",
    ),
    "target batch": (
        dict(target=torch.ones(3, 2, 4)),
        ValueError,
        r"`target` has shape \[3, 2, 4\], expected \[2, 2, 4\]",
    ),
    "target flat": (dict(target=torch.ones(2, 4)), ValueError, r"`target` has shape \[2, 4\], expected \[2, 4, 4\]"),
    "no targets": (
        dict(target=torch.ones(2, 0, 4)),
        ValueError,
        r"`target` has shape \[2, 0, 4\], .* one particle or more",
    ),
    "target dtype": (dict(target=torch.ones(2, 2, 4).int()), TypeError, "`target` has dtype torch.int32"),
    "target device": (dict(target=torch.ones(2, 2, 4, device="meta")), ValueError, "`target` is on meta, expected cpu"),
    "x0 shape": (
        dict(target=lgd.Renoise(ONE, 2, 0)),
        ValueError,
        r"`target.x0` has shape \[2, 1, 4\], expected \[2, 4\]",
    ),
    "x0 kind": (dict(target=lgd.Expected(1.0), beta=2, lam=0), TypeError, "`target.x0` is a float"),
    "x0 device": (dict(target=lgd.Renoise(X0.to("meta"), 2, 0)), ValueError, "`target.x0` is on meta"),
    "particles 0": (dict(target=lgd.Renoise(X0, 0, 0)), ValueError, "`target.particles` is 0, expected 1 or more"),
    "particles float": (dict(target=lgd.Renoise(X0, 2.0, 0)), TypeError, "`target.particles` is a float"),
    "target seed": (dict(target=lgd.Renoise(X0, 2, 0.5)), TypeError, "`target.seed` is a float"),
    "target seeds": (dict(target=lgd.Renoise(X0, 2, torch.arange(3))), ValueError, r"`target.seed` has shape \[3\]"),
    "target without seed": (dict(target=lgd.Renoise(X0, 2, None)), TypeError, "`target.seed` is a NoneType"),
    "first_sample": (dict(target=lgd.Renoise(X0, 2, 1), first_sample=-1), ValueError, "`first_sample` is -1"),
    "expected beta": (
        dict(target=lgd.Expected(X0), lam=0.0),
        ValueError,
        "`target` is Expected with beta=1.75 and lam=0",
    ),
    "expected lam": (
        dict(target=lgd.Expected(X0), beta=2.0),
        ValueError,
        "`target` is Expected with beta=2.0 and lam=1",
    ),
    "beta 0": (dict(beta=0.0), ValueError, r"`beta` is 0.0, expected a power in \(0, 2\]"),
    "beta above 2": (dict(beta=2.1), ValueError, r"`beta` is 2.1, expected"),
    "beta NaN": (dict(beta=math.nan), ValueError, "`beta` is nan, expected"),
    "beta tensor": (dict(beta=torch.tensor(1.0)), TypeError, "`beta` is a Tensor, expected a float"),
    "lam below 0": (dict(lam=-0.1), ValueError, r"`lam` is -0.1, expected a weight in \[0, 1\]"),
    "lam above 1": (dict(lam=1.1), ValueError, "`lam` is 1.1, expected"),
    "lam NaN": (dict(lam=math.nan), ValueError, "`lam` is nan, expected"),
    "lonely": (dict(x=ONE, cond=ONE, uncond=ONE), ValueError, "`lam` is 1.0 but one particle has no partner"),
    "levels NaN": (
        dict(levels=testing.step_levels(2)._replace(gap=torch.tensor([0.1, math.nan]))),
        ValueError,
        "`levels.gap` is nan",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case, monkeypatch):
    """Before any kernel is launched."""
    monkeypatch.setattr(impls, "launcher", lambda op, impl: pytest.fail("something was launched"))
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        lgd.guided_energy(**bad(**change))


def test_takes_what_is_just_inside():
    for options in (dict(beta=2), dict(lam=0, beta=1), dict(lam=1)):
        assert lgd.guided_energy(**bad(**options)).isfinite().all()
    assert lgd.guided_energy(**bad(x=ONE, cond=ONE, uncond=ONE, unbiased=False)).isfinite().all()
    assert lgd.guided_energy(**bad(x=ONE, cond=ONE, uncond=ONE, lam=0.0)).isfinite().all()


def test_more_particles_than_cuda_takes(generator, monkeypatch):
    """By itself it then runs the reference; asked for, it is refused."""
    x, levels = torch.randn(1, 176, 2, generator=generator), lgd.RectifiedFlow().levels(torch.ones(1), torch.zeros(1))
    call = lambda x, impl=None: lgd.guided_energy(x, x, x / 2, 0.5, levels, x[:, :1], impl=impl)  # noqa: E731
    expected = call(x, "reference")
    (reason,) = (
        one for one in lgd.why_not("guided_energy", "cuda", x, x, x, x[:, :1], device="cuda") if "particles" in one
    )
    assert reason == "cuda takes m particles and k targets with 2 m + k <= 352, these are m = 176, k = 1"
    few = lgd.why_not("guided_energy", "cuda", x[:, 1:], x[:, 1:], x[:, 1:], x[:, :1], device="cuda")
    assert not any("particles" in one for one in few)
    monkeypatch.setattr(op.impls, "choose", lambda name, impl, *_: impl or "cuda")
    torch.testing.assert_close(call(x), expected)
    with pytest.raises(ValueError, match="impl='cuda' cannot run here: cuda takes m particles .* impl=None chooses"):
        call(x, "cuda")


def test_says_so_where_the_axis_of_particles_may_be_missing(generator):
    """An image [B, C, H, W], or very many particles; and nothing where it is there."""
    levels = lgd.RectifiedFlow().levels(torch.ones(1), torch.zeros(1))
    curve = lambda x: lgd.guided_energy_curve(x, x, x / 2, levels, x)  # noqa: E731
    energy = lambda x: lgd.guided_energy(x, x, x / 2, 0.5, levels, x)  # noqa: E731
    for call in (curve, energy):
        for shape in ((1, 4, 32, 32), (1, 3, 16, 16), (1, 353, 2)):
            with pytest.warns(
                UserWarning, match=rf"`x` has shape .* m = {shape[1]} particles .* x.unsqueeze\(1\)"
            ) as said:
                call(torch.randn(shape, generator=generator))
            assert said[0].filename == __file__
        for shape in ((1, 2, 4, 32, 32), (1, 4, 1, 32, 32), (1, 4, 8, 8), (1, 4, 1024), (1, 352, 2)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call(torch.randn(shape, generator=generator))
