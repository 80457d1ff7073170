"""Compare a step and its log density with torch.distributions."""

import math

import pytest
import torch
from conftest import dtypes_of

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.levels import coefficients_of_h, step_coefficients
from lgd_kernels.sampling.log_prob import step_with_log_prob

OMEGA = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def problem(generator, dtype=torch.float64, shape=(3, 4, 25)):
    x, c, u = (testing.sample(shape, dtype, generator) for _ in range(3))
    t = torch.tensor([0.9, 0.7, 0.5], dtype=torch.float64)
    return x, c, u, lgd.RectifiedFlow().levels(t, t - 0.2)


def density(x_s, x, c, u, omega, levels, prediction, churn):
    a, b, v = (one.view(-1, 1, 1) for one in step_coefficients(levels, prediction, churn))
    mean = a * x + b * (c + omega.view(-1, 1, 1) * (c - u))
    return torch.distributions.Normal(mean, v.expand_as(mean)).log_prob(x_s).flatten(1).sum(1)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("churn", [0.4, 1.0])
def test_is_the_density(prediction, churn, generator):
    x, c, u, levels = problem(generator)
    options = dict(prediction=prediction, churn=churn)
    x_s, found = step_with_log_prob(x, c, u, OMEGA, levels, seed=3, **options)
    step = lgd.guided_step(x, c, u, OMEGA, levels, seed=3, **options)
    torch.testing.assert_close(x_s, step, rtol=1e-13, atol=1e-13)
    expected = density(x_s, x, c, u, OMEGA, levels, prediction, churn)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-9)
    _, mean = step_with_log_prob(x, c, u, OMEGA, levels, x_s=x_s, reduction="mean", **options)
    torch.testing.assert_close(mean, expected / 100, rtol=1e-11, atol=1e-11)


def test_by_every_implementation(target, generator):
    """Check the density of the stored x_s, in float64 for every dtype of x_s."""
    for dtype in dtypes_of(target):
        x, c, u, levels = problem(generator, dtype)
        there = [testing.moved(one, target.device) for one in (x, c, u, OMEGA, levels)]
        x_s, found = step_with_log_prob(*there, seed=3, impl=target.impl)
        assert x_s.dtype == dtype and found.dtype == torch.float64
        wide = [one.double().cpu() for one in (x_s, x, c, u)]
        expected = density(*wide, OMEGA, levels, "x0", 1.0)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("given", [True, False], ids=["noise", "seed"])
def test_a_score_of_ones_own_step(target, given, generator):
    """Check that a step and a score of its x_s return the same bits, so that a ratio is 1; in other batches too."""
    for dtype in dtypes_of(target):
        x, c, u, levels = problem(generator, dtype)
        there = [testing.moved(one, target.device) for one in (x, c, u, OMEGA, levels)]
        noise = testing.sample(x.shape, dtype, generator).to(target.device)
        drawn = {"noise": noise} if given else {"seed": 4}
        x_s, said = step_with_log_prob(*there, churn=0.8, **drawn, impl=target.impl)
        _, scored = step_with_log_prob(*there, churn=0.8, x_s=x_s, impl=target.impl)
        assert torch.equal(said, scored)
        for rows in ([2], [1, 0]):
            few = [one[rows] for one in there[:4]]
            levels = lgd.Levels(*(one[rows] for one in there[4]))
            part = step_with_log_prob(*few, levels, churn=0.8, x_s=x_s[rows], impl=target.impl)[1]
            assert torch.equal(part, said[rows])


@pytest.mark.parametrize(("t", "s"), [(0.6, 0.55), (0.1, 0.05)])
def test_differences_of_ten_million_elements(t, s, generator):
    """Check the difference of two scores near -10^7, where neighbouring float32 numbers are 1 apart; float32 residuals
    would give an error of 4e-3."""
    x, c, u = (torch.randn(1, 10**7, generator=generator) for _ in range(3))
    at = [torch.tensor([time], dtype=torch.float64) for time in (t, s)]
    levels, weights = lgd.RectifiedFlow().levels(*at), (1.5, 1.5 + 2e-5)
    with torch.no_grad():
        x_s, said = step_with_log_prob(x, c, u, weights[0], levels, prediction="flow", seed=5)
        old, new = (step_with_log_prob(x, c, u, w, levels, x_s=x_s, prediction="flow")[1] for w in weights)
    a, b, v = step_coefficients(levels, "flow", 1.0)
    expected = 0.0
    for parts in zip(*(one[0].split(10**6) for one in (x_s, x, c, u)), strict=True):
        at_s, at_t, c, u = (one.double() for one in parts)
        first, second = (at_s - a * at_t - b * (c + w * (c - u)) for w in weights)
        expected += float(((first - second) * (first + second)).sum() / (2 * v * v))
    assert torch.equal(said, old)
    assert abs(expected) > 1e-3
    torch.testing.assert_close(float(new - old), expected, rtol=0, atol=1e-6)


def test_omega_as_a_number_keeps_its_digits(generator):
    """Check that a number for omega is not rounded to float32, although x is float32."""
    x, c, u, levels = problem(generator, torch.float32)
    by_number = step_with_log_prob(x, c, u, 0.1, levels, x_s=x)[1]
    by_tensor = step_with_log_prob(x, c, u, torch.full((3,), 0.1, dtype=torch.float64), levels, x_s=x)[1]
    assert torch.equal(by_number, by_tensor)


def test_gradients_keep_their_dtypes(target, generator):
    """Check gradients within the rounding of each tensor's dtype."""
    for dtype in dtypes_of(target):
        x, c, u, levels = problem(generator, dtype)
        x_s = testing.sample(x.shape, dtype, generator)
        there = [testing.moved(one, target.device) for one in (x_s, x, c, u, OMEGA)]
        leaves = [one.detach().clone().requires_grad_() for one in there]
        at, *rest = leaves
        score = step_with_log_prob(*rest, testing.moved(levels, target.device), x_s=at, impl=target.impl)[1]
        found = torch.autograd.grad(score.sum(), leaves)
        wide = [one.detach().double().requires_grad_() for one in (x_s, x, c, u, OMEGA)]
        expected = torch.autograd.grad(density(*wide, levels, "x0", 1.0).sum(), wide)
        for f, e, leaf in zip(found, expected, leaves, strict=True):
            assert f.dtype == leaf.dtype
            rounding = torch.finfo(dtype).eps if f.ndim > 1 else min(1e-5, torch.finfo(dtype).eps * 100)
            torch.testing.assert_close(f.cpu().double(), e.to(torch.float64), rtol=2 * rounding, atol=1e-5)


def test_passes(generator, monkeypatch):
    """Count the passes: one to score, and two to draw (the step, and the score of the stored x_s)."""
    passes = []

    def counted(*arguments, **options):
        passes.append(options.get("written", 1))
        return lgd.combine(*arguments, **options)

    monkeypatch.setattr("lgd_kernels.sampling.density.combine", counted)
    x, c, u, levels = problem(generator, torch.float32)
    omega = OMEGA.clone().requires_grad_()
    for call, expected in (
        (lambda: step_with_log_prob(x, c, u, OMEGA, levels, seed=1), [1, 0]),
        (lambda: step_with_log_prob(x, c, u, OMEGA, levels, noise=x), [1, 0]),
        (lambda: step_with_log_prob(x, c, u, omega, levels, x_s=x), [0]),
        (lambda: step_with_log_prob(x, c, u, omega, levels, seed=1), [1, 0]),
        (lambda: step_with_log_prob(x.bfloat16(), c, u, OMEGA, levels, seed=1), [1, 0]),
    ):
        passes.clear()
        call()
        assert passes == expected


def test_gradcheck_twice(generator):
    x, c, u, levels = problem(generator, shape=(3, 4))
    inputs = [one.clone().requires_grad_() for one in (x + 0.1, x, c, u, OMEGA)]
    call = lambda x_s, x, c, u, w: step_with_log_prob(x, c, u, w, levels, x_s=x_s)[1]  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


def test_gradients_go_through_the_mean(generator):
    x, c, u, levels = problem(generator)
    inputs = [one.clone().requires_grad_() for one in (x, c, u, OMEGA)]
    x_s, found = step_with_log_prob(*inputs, levels, seed=5)
    assert not x_s.requires_grad
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = density(x_s, *inputs, levels, "x0", 1.0)
    grads = [torch.autograd.grad(one, inputs, upstream) for one in (found, expected)]
    for f, e in zip(*grads, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


def test_a_given_point_may_require_grad(generator):
    x, c, u, levels = problem(generator)
    at = x.clone().requires_grad_()
    scores = [step_with_log_prob(x, c, u, OMEGA, levels, x_s=at)[1], density(at, x, c, u, OMEGA, levels, "x0", 1.0)]
    torch.testing.assert_close(*(torch.autograd.grad(score.sum(), at)[0] for score in scores), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradients_of_a_tiny_step(impl, generator):
    """Check the gradient of a residual that is a millionth of the sample; in float32 its error would be 1e-4."""
    x, c, u, _ = problem(generator, torch.float32)
    levels = lgd.RectifiedFlow().levels(torch.full((3,), 0.7), torch.full((3,), 0.6999999))
    x_s = step_with_log_prob(x, c, u, OMEGA, levels, seed=1)[0]
    leaves = [one.clone().requires_grad_() for one in (x, c, OMEGA)]
    found = torch.autograd.grad(
        step_with_log_prob(leaves[0], leaves[1], u, leaves[2], levels, x_s=x_s, impl=impl)[1].sum(), leaves
    )
    wide = [one.detach().double().requires_grad_() for one in leaves]
    score = density(x_s.double(), wide[0], wide[1], u.double(), wide[2], levels.to(torch.float64), "x0", 1.0)
    for one, expected in zip(found, torch.autograd.grad(score.sum(), wide), strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-6 * largest)


def test_without_variance_there_is_no_density(generator):
    """Check log p where V = 0: 0 and no gradient where x_s was drawn, NaN where it was given."""
    x, c, u, _ = problem(generator)
    levels = lgd.RectifiedFlow().levels(torch.full((3,), 0.5), torch.tensor([0.0, 0.2, 0.0]))
    leaf = c.clone().requires_grad_()
    x_s, found = step_with_log_prob(x, leaf, u, OMEGA, levels, seed=1)
    grad = torch.autograd.grad(found.sum(), leaf)[0]
    assert found[0] == found[2] == 0 and found[1] != 0
    assert not grad[0].any() and not grad[2].any() and grad[1].all()
    assert step_with_log_prob(x, c, u, OMEGA, levels, x_s=x_s)[1].isnan().tolist() == [True, False, True]


def test_refuses(generator):
    x, c, u, levels = problem(generator)
    with pytest.raises(ValueError, match="`churn` is 0, where the step has no density"):
        step_with_log_prob(x, c, u, OMEGA, levels, churn=0.0, seed=1)
    with pytest.raises(ValueError, match="`reduction` is 'max'"):
        step_with_log_prob(x, c, u, OMEGA, levels, reduction="max", seed=1)
    with pytest.raises(ValueError, match="there is no noise; pass seed"):
        step_with_log_prob(x, c, u, OMEGA, levels)
    with pytest.raises(ValueError, match=r"`x_s` has shape \[2, 4, 25\]"):
        step_with_log_prob(x, c, u, OMEGA, levels, x_s=x[:2])


def test_h_and_coefficients_by_hand():
    """Rectified flow from 1/2 to 1/4 with h = 0.6: A = 0.3 + 0 of x0, B = 3/4 - 0.3 / 2, V = 0.8 / 4."""
    levels = lgd.RectifiedFlow().levels(torch.tensor([0.5]), torch.tensor([0.25]))
    x, c, x_s = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.full((1, 1), 1.7)
    expected = torch.distributions.Normal(0.3 + 2 * 0.6, 0.2).log_prob(torch.tensor([1.7]))
    for source in ({"levels": levels, "h": 0.6}, {"coefficients": (0.3, torch.tensor([0.6]), 0.2)}):
        torch.testing.assert_close(step_with_log_prob(x, c, x_s=x_s, **source)[1].float(), expected)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_h_is_churn_where_both_are(prediction, generator):
    """Check h = 1 - churn^2 q, and that h = 0 forgets x beyond its x0, which no churn here does."""
    x, c, u, levels = problem(generator)
    q = levels.gap / (levels.signal_s * levels.noise_t)
    scores = [
        step_with_log_prob(x, c, u, OMEGA, levels, x_s=x, prediction=prediction, **one)[1]
        for one in ({"churn": 0.6}, {"h": 1 - 0.36 * q})
    ]
    torch.testing.assert_close(*scores, rtol=1e-12, atol=1e-9)
    x_s = step_with_log_prob(x, c, u, OMEGA, levels, h=0.0, noise=torch.zeros_like(x))[0]
    torch.testing.assert_close(x_s, levels.signal_s.view(-1, 1, 1) * (c + OMEGA.view(-1, 1, 1) * (c - u)))
    assert (1 - q).min() > 0.2


def test_h_keeps_the_distribution(generator):
    """Check signal and variance at s, also where s = t and where s = 0, for h beyond any churn; h = 1 at s = t is
    the identity."""
    t, s = torch.tensor([[0.8, 0.6, 0.5], [0.2, 0.6, 0.0]], dtype=torch.float64)
    levels = lgd.RectifiedFlow().levels(t, s)
    for h in (0.0, 0.3, 1.0):
        a, b, v = coefficients_of_h(levels, "x0", h)
        torch.testing.assert_close(a * levels.signal_t + b, levels.signal_s)
        torch.testing.assert_close((a * levels.noise_t) ** 2 + v**2, levels.noise_s**2)
    assert (a[1], b[1], v[1]) == (1, 0, 0)


def test_h_may_be_rounded(generator):
    """Check cos(pi / 2), which is -4e-8 in float32, and an h above 1 by as much."""
    x, c, u, levels = problem(generator)
    h = torch.tensor([-4e-8, 0.5, 1 + 1e-7])
    found = step_with_log_prob(x, c, u, OMEGA, levels, h=h, seed=1)[1]
    exact = step_with_log_prob(x, c, u, OMEGA, levels, h=h.clamp(0, 1), seed=1)[1]
    assert torch.equal(found, exact) and found[:2].all() and found[2] == 0
    assert torch.equal(
        *(step_with_log_prob(x, c, u, OMEGA, levels, h=one, seed=1)[1] for one in (0.0, math.cos(math.pi / 2) - 1e-16))
    )


def test_a_prediction_that_is_guided_already(generator):
    x, c, u, levels = problem(generator)
    guided = c + OMEGA.view(-1, 1, 1) * (c - u)
    x_s, found = step_with_log_prob(x, guided, levels=levels, seed=2)
    both = step_with_log_prob(x, c, u, OMEGA, levels, seed=2)
    torch.testing.assert_close((x_s, found), both, rtol=1e-12, atol=1e-9)


def test_gradients_to_coefficients(generator):
    x, c, u, _ = problem(generator, shape=(3, 4))
    inputs = [torch.rand(3, dtype=torch.float64, generator=generator).add(0.5).requires_grad_() for _ in range(3)]
    call = lambda *abv: step_with_log_prob(x, c, u, OMEGA, x_s=x, coefficients=abv)[1]  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


def test_sources_are_refused_by_name(generator):
    x, c, u, levels = problem(generator)
    step = lambda **given: step_with_log_prob(x, c, u, OMEGA, seed=1, **given)  # noqa: E731
    for message, call in {
        r"`levels` is None, expected .* or coefficients=\(A, B, V\)": lambda: step(),
        "`levels` and `coefficients` were both given": lambda: step(levels=levels, coefficients=(1, 1, 1)),
        "`prediction` and `coefficients` were both": lambda: step(prediction="x0", coefficients=(1, 1, 1)),
        "`churn` and `coefficients` were both given": lambda: step(churn=0.5, coefficients=(1, 1, 1)),
        "`h` and `coefficients` were both given": lambda: step(h=0.5, coefficients=(1, 1, 1)),
        "`churn` and `h` were both given": lambda: step(levels=levels, churn=0.5, h=0.5),
        "`h` is 1, where the step has no density; h=0.9": lambda: step(levels=levels, h=1),
        r"`h` is 1.1, expected values in \[0, 1\]": lambda: step(levels=levels, h=1.1),
        r"`h` is \[-0.1, .*\], expected values in \[0, 1\]": lambda: step(levels=levels, h=OMEGA - 0.6),
        "`h` requires grad": lambda: step(levels=levels, h=OMEGA.clone().requires_grad_()),
        "`coefficients` is 2 values, expected": lambda: step(coefficients=(1, 1)),
        "`coefficients` is Tensor, expected": lambda: step(coefficients=OMEGA),
        r"`coefficients\[1\]` has shape \[2\]": lambda: step(coefficients=(1, OMEGA[:2], 1)),
        r"`coefficients\[2\]` is \[-0.5, .*\], expected 0 or more": lambda: step(coefficients=(1, 1, -OMEGA)),
        "`omega` is missing": lambda: step_with_log_prob(x, c, u, levels=levels, seed=1),
        "`omega` was given without `uncond`": lambda: step_with_log_prob(x, c, None, 1.0, levels, seed=1),
        r"`coefficients\[2\]` is 1 but there is no noise; pass seed": lambda: step_with_log_prob(
            x, c, coefficients=(1, 1, 1)
        ),
        "`h` is 0 but there is no noise; pass seed": lambda: step_with_log_prob(x, c, levels=levels, h=0),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    x_s, log_p = step_with_log_prob(x, c, coefficients=(1, 2, 0))  # no noise is needed
    assert torch.equal(x_s, x + 2 * c) and not log_p.any()


@pytest.mark.parametrize("drawn", ["noise", "seed"])
def test_forward_mode_takes_x_s_as_it_was_drawn(drawn, generator):
    """Check that forward mode differentiates in omega at a fixed x_s, as backward does."""
    x, c, u, levels = problem(generator)
    options = {"noise": testing.sample(x.shape, torch.float64, generator)} if drawn == "noise" else {"seed": 4}
    call = lambda w: step_with_log_prob(x, c, u, w, levels, impl="reference", **options)  # noqa: E731
    (_, score), (moved, slope) = torch.func.jvp(call, (OMEGA,), (torch.ones_like(OMEGA),))
    assert not moved.any()
    torch.testing.assert_close(score, call(OMEGA)[1], rtol=1e-12, atol=1e-12)
    x_s, leaf = call(OMEGA)[0], OMEGA.clone().requires_grad_()
    expected = torch.autograd.grad(density(x_s, x, c, u, leaf, levels, "x0", 1.0).sum(), leaf)[0]
    assert expected.abs().min() > 0.1
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.func.jacrev(lambda w: call(w)[1])(OMEGA).diagonal(), expected)
