"""Rewards of guided predictions: the gradient through R, and the estimate where R has none."""

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import learn
from lgd_kernels.learn import Frozen, black_box_reward_loss, draw, reward_loss, with_reward
from lgd_kernels.runtime.levels import PREDICTIONS, per_sample

SCHEDULE = lgd.VPCosine()


def denoiser(x, t, c):
    return torch.tanh(x + 0.3 * c[:, None]) * (1 - 0.5 * t[:, None])


def reward(x0, c):
    """A parabola in x0, so in omega too, around a point of the condition's own."""
    return -(x0 - 3 * c[:, None]).square().sum(1)


def drawn(prediction="x0", batch=5, m=3, seed=4, same=False, frozen_first=0):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
    c, s, t = (torch.arange(batch) % 3 + 1, torch.rand(batch, generator=generator).double() / 2, None)
    if same:  # one item, many times over
        x0, c, s = (one[:1].expand(batch, *one.shape[1:]) for one in (x0, c, s))
    t = s + 0.3
    part = slice(frozen_first, None)
    frozen = Frozen(denoiser, SCHEDULE, prediction, null=0)
    return draw(frozen, x0[part], c[part], s[part], t[part], m, seed=seed, first_sample=frozen_first)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_reward_sees_the_guided_prediction_in_x0_space(prediction):
    p = drawn(prediction)
    found = []
    for direct in (False, True):
        omega = torch.linspace(0, 2, 5, dtype=torch.float64, requires_grad=True)
        if direct:
            g = p.cond + omega[:, None, None] * (p.cond - p.uncond)
            signal, noise = (per_sample(level, g) for level in (p.levels.signal_t, p.levels.noise_t))
            x0 = {
                "x0": g, "eps": (p.x_t - noise * g) / signal, "v": signal * p.x_t - noise * g,
                "flow": (p.x_t - noise * g) / (signal + noise),
            }[prediction]  # fmt: skip
            loss = -reward(x0.flatten(0, 1), p.c.repeat_interleave(3)).view(5, 3).mean(1)
        else:
            loss = reward_loss(p, omega, reward)
        found.append((loss, *torch.autograd.grad(loss.sum(), omega)))
    torch.testing.assert_close(*found)


def test_omega_in_any_form():
    p = drawn()
    one = reward_loss(p, torch.full((5,), 0.5), reward)
    torch.testing.assert_close(reward_loss(p, 0.5, reward), one)
    knots = torch.tensor([0.0, 1.0], dtype=torch.float64)
    table = lgd.OmegaTable(torch.full((4, 2, 2), 0.5, requires_grad=True), knots, knots)
    looked_up = reward_loss(p, table.at(p.c, p.s, p.t), reward)
    torch.testing.assert_close(looked_up.detach(), one)
    assert torch.autograd.grad(looked_up.sum(), table.values)[0].abs().sum() > 0


def slopes(m, sigma, batch=100_000):
    """Estimates of the slope, all of one item at omega = 0.7 but with noise of their own, and the true slopes."""
    p = drawn(batch=batch, m=m, same=True)
    omega = torch.full((batch,), 0.7, dtype=torch.float64, requires_grad=True)
    estimates = torch.autograd.grad(black_box_reward_loss(p, omega, reward, sigma=sigma).sum(), omega)[0]
    exact = torch.autograd.grad(reward_loss(p, omega, reward).sum(), omega)[0]
    return estimates, exact


@pytest.mark.parametrize("m, sigma", [(2, 0.3), (4, 0.3), (4, 2.0)])
def test_the_black_box_estimate_is_unbiased(m, sigma):
    """For a parabola smoothing changes no slope. The mean is within 4 standard errors, less than 5 % of it: a wrong
    factor or baseline would show."""
    estimates, exact = slopes(m, sigma)
    error = (estimates - exact).std() / len(exact) ** 0.5
    assert abs((estimates - exact).mean()) < 4 * error < 0.05 * abs(exact.mean())


def test_the_baseline_lowers_the_variance():
    """Without it, the estimate is E [R e / sigma]: here on the same draws, with R moved by a constant."""
    p = drawn(batch=2000, m=4, same=True)
    omega = torch.full((2000,), 0.7, dtype=torch.float64, requires_grad=True)

    def estimates(shift):
        loss = black_box_reward_loss(p, omega, lambda x0, c: reward(x0, c) + shift, sigma=0.3)
        return torch.autograd.grad(loss.sum(), omega)[0]

    torch.testing.assert_close(estimates(0.0), estimates(1000.0), rtol=0, atol=1e-9)
    e = lgd.philox_normal((8000,), p.seed, stream=4).view(2000, 4).double()
    with torch.no_grad():
        x0 = p.cond + (0.7 + 0.3 * e)[..., None] * (p.cond - p.uncond)
    plain = -(reward(x0.flatten(0, 1), p.c.repeat_interleave(4)).view(2000, 4) * e).mean(1) / 0.3
    torch.testing.assert_close(plain.mean(), estimates(0.0).mean(), rtol=0, atol=4 * float(plain.std()) / 2000**0.5)
    assert estimates(0.0).var() < 0.7 * plain.var()


def test_the_black_box_is_never_differentiated_and_split_batches_agree():
    whole, part = drawn(), drawn(frozen_first=3)
    omega = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)

    def rounded(x0, c):
        assert not torch.is_grad_enabled()
        return x0.round().sum(1)

    found = black_box_reward_loss(whole, omega, rounded)
    torch.testing.assert_close(black_box_reward_loss(part, omega[3:], rounded), found[3:])
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), omega)[0][3:] for loss in (
        black_box_reward_loss(whole, omega, rounded), black_box_reward_loss(part, omega[3:], rounded))))  # fmt: skip


def test_total_is_loss_and_reward():
    p, omega = drawn(), torch.linspace(0, 1, 5)
    total = with_reward(reward, 0.3, learn.l2_loss)(p, omega)
    torch.testing.assert_close(total, learn.l2_loss(p, omega) + 0.3 * reward_loss(p, omega, reward))
    assert with_reward(reward, 0.0) is learn.self_consistency_loss
    black_box = with_reward(reward, 0.3, learn.l2_loss, estimate=black_box_reward_loss)(p, omega)
    torch.testing.assert_close(black_box, learn.l2_loss(p, omega) + 0.3 * black_box_reward_loss(p, omega, reward))


def test_refusals():
    p = drawn()
    with pytest.raises(ValueError, match=r"reward returned \[15, 6\] for x0 \[15, 6\], expected a tensor \[15\]"):
        reward_loss(p, 0.5, lambda x0, c: x0)
    with pytest.raises(ValueError, match="`sigma` is 0.0, expected a finite spread above 0"):
        black_box_reward_loss(p, torch.ones(5), reward, sigma=0.0)
    with pytest.raises(ValueError, match="one particle has no baseline"):
        black_box_reward_loss(drawn(m=1), torch.ones(5), reward)
