"""The study in the plane: closed forms against what they stand for, statistics, and a short run from end to end."""

import pytest
import torch

from lgd_kernels.demo.plane import CLASSES, NULL, Mixture, mislabelled_shares, pinwheel, undoing
from lgd_kernels.schedules import RectifiedFlow

FALLS = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(truth: Mixture, u: float, count: int = 200):
    """x_t of every condition at a unit time, float64: x, signal, noise, c."""
    c = torch.arange(CLASSES + 1).repeat_interleave(count)
    t = torch.full((len(c),), u, dtype=torch.float64)
    signal, noise = RectifiedFlow().signal_noise(t)
    x0 = truth.sample(c, seeded(1))
    z = torch.randn(x0.shape, generator=seeded(2), dtype=torch.float64)
    return signal[:, None] * x0 + noise[:, None] * z, signal, noise, c


@pytest.mark.parametrize("u", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("wrong", [False, True])
def test_denoiser_is_the_slope_of_the_log_density(u, wrong):
    """signal E[x0 | x_t] = x_t + noise^2 grad log p(x_t): Tweedie's formula, with autograd for the gradient."""
    truth = pinwheel(torch.float64)
    truth = truth.mislabelled(0.4, FALLS) if wrong else truth
    x, signal, noise, c = points(truth, u)
    x.requires_grad_()
    (score,) = torch.autograd.grad(truth.log_density(x, signal, noise, c).sum(), x)
    expected = (x + noise[:, None].square() * score) / signal[:, None]
    torch.testing.assert_close(truth.denoise(x, signal, noise, c), expected, rtol=0, atol=1e-11 / float(signal[0]))


def test_denoiser_is_the_mean_of_the_data_behind_x_t():
    """E[x0 | x_t] by weighing many data with p(x_t | x0): Monte Carlo, within five of its standard errors."""
    truth = pinwheel(torch.float64)
    x, signal, noise, c = points(truth, 0.5, count=5)
    for i in range(len(c)):
        x0 = truth.sample(c[i].expand(200_000), seeded(3 + i))
        weight = (-(x[i] - signal[i] * x0).square().sum(1) / (2 * noise[i] ** 2)).softmax(0)
        found = weight @ x0
        error = (weight.square() @ (x0 - found).square()).sqrt()
        exact = truth.denoise(*(part[i : i + 1] for part in (x, signal, noise, c)))[0]
        assert bool(((found - exact).abs() < 5 * error).all()) and bool((error < 0.01).all())


def test_density_sums_to_one_and_the_null_is_the_mean_of_the_classes():
    truth = pinwheel(torch.float64)
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    signal, noise = torch.full((2, len(x)), 0.6, dtype=torch.float64)
    density = [truth.log_density(x, signal, noise, torch.full((len(x),), c)).exp() for c in range(CLASSES + 1)]
    for one in density:
        assert float(one.sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(density[NULL], sum(density[:NULL]) / CLASSES)


def test_a_turn_carries_the_classes_into_each_other():
    truth = pinwheel(torch.float64)
    x, signal, noise, _ = points(truth, 0.4)
    angle = torch.tensor(2 * torch.pi / 3, dtype=torch.float64)
    turn = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    zero = torch.zeros(len(x), dtype=torch.int64)
    first = truth.denoise(x, signal, noise, zero)
    torch.testing.assert_close(truth.denoise(x @ turn.T, signal, noise, zero + 1), first @ turn.T)


def test_wrong_labels_are_what_drawing_them_gives():
    """Throw labels away and draw them anew: which class carries which label."""
    share, count = 0.4, 300_000
    true = torch.randint(0, CLASSES, (count,), generator=seeded())
    thrown = torch.rand(count, generator=seeded(1)) < share
    drawn = torch.multinomial(FALLS, count, replacement=True, generator=seeded(2))
    label = torch.where(thrown, drawn, true)
    carries = torch.stack([true[label == k].bincount(minlength=CLASSES) / (label == k).sum() for k in range(CLASSES)])
    chance = mislabelled_shares(share, FALLS)[:, None]
    expected = (1 - chance) * torch.eye(CLASSES) + chance / CLASSES
    assert float((carries - expected).abs().max()) < 0.005
    truth = pinwheel(torch.float64)
    weights = truth.mislabelled(share, FALLS).weights
    torch.testing.assert_close(weights[:NULL], expected @ truth.weights[:NULL])
    assert torch.equal(weights[NULL], truth.weights[NULL]) and torch.equal(weights[0], truth.weights[0])


def test_guidance_undoes_wrong_labels():
    """At pure noise by one omega for each class; elsewhere by one that depends on x_t, through Bayes' rule."""
    truth = pinwheel(torch.float64)
    wrong = truth.mislabelled(0.4, FALLS)
    chance = mislabelled_shares(0.4, FALLS)
    for u in (1.0, 0.9, 0.4):
        x, signal, noise, c = points(truth, u)
        x, signal, noise, c = (part[c != NULL] for part in (x, signal, noise, c))
        cond, uncond = (wrong.denoise(x, signal, noise, one) for one in (c, torch.full_like(c, NULL)))
        right = (1 - chance[c]) * (
            truth.log_density(x, signal, noise, c) - wrong.log_density(x, signal, noise, c)
        ).exp()  # the probability that x_t carries its label by right
        omega = (1 / right - 1)[:, None]
        clean = truth.denoise(x, signal, noise, c)
        torch.testing.assert_close(cond + omega * (cond - uncond), clean, rtol=0, atol=1e-8)
        if u == 1.0:
            torch.testing.assert_close(omega[:, 0], undoing(0.4, FALLS)[c])


def test_samples_follow_the_density():
    truth = pinwheel(torch.float64)
    x = truth.per_class(100_000, seeded())
    one, none = torch.ones(len(x[0]), dtype=torch.float64), torch.zeros(len(x[0]), dtype=torch.float64)
    for c in range(CLASSES):
        mean = truth.weights[c] @ truth.means
        torch.testing.assert_close(x[c].mean(0), mean, rtol=0, atol=0.01)
        spread = truth.weights[c] @ (truth.means.square().sum(1) + 2 * truth.deviations.square()) - mean.square().sum()
        assert float(x[c].var(0).sum()) == pytest.approx(float(spread), rel=0.01)
        assert torch.isfinite(truth.log_density(x[c], one, none, torch.full((len(x[c]),), c))).all()
