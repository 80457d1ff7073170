"""Frozen denoisers, particles drawn for them, and the losses of omega on these."""

import pytest
import torch
from torch import nn

import lgd_kernels as lgd
from lgd_kernels import learn
from lgd_kernels.learn import Frozen, Particles, draw, particle_energy, sample_times
from lgd_kernels.runtime.levels import PREDICTIONS, per_sample

SCHEDULE = lgd.VPCosine()


def denoiser(x, t, c):
    """Made up, and different for every time and condition; a Lipschitz function of x."""
    return torch.tanh(x + 0.3 * c.view(-1, *(1,) * (x.ndim - 1))) * (1 - 0.5 * per_sample(t, x))


FROZEN = Frozen(denoiser, SCHEDULE, "v", null=0)


def drawn(batch=6, m=3, shape=(5, 2), seed=11, dtype=torch.float64, frozen=FROZEN, first=0, whole=None) -> Particles:
    """Items first .. first + batch of a set of `whole`."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(whole or batch, *shape, generator=generator, dtype=dtype)
    s, t = (time.to(dtype) for time in sample_times(whole or batch, generator=generator))
    c = 1 + torch.arange(whole or batch) % 3
    part = slice(first, first + batch)
    return draw(frozen, x0[part], c[part], s[part], t[part], m, seed=seed, first_sample=first)


def noises(particles: Particles) -> list[torch.Tensor]:
    """Of the step, of the targets, and of x_t: streams 1, 2 and 3 of one seed."""
    shape = particles.x_t.shape
    return [
        lgd.philox_normal((shape[0] * shape[1], *shape[2:]), particles.seed, stream=stream).view(shape)
        for stream in (1, 2, 3)
    ]


def test_draw_is_the_forward_process_and_one_prediction_of_each_particle():
    calls = []

    def spy(x, t, c):
        calls.append((x, t, c, torch.is_grad_enabled()))
        return denoiser(x, t, c)

    p = drawn(frozen=Frozen(spy, SCHEDULE, "v", null=0))
    signal, noise = (per_sample(level, p.x_t) for level in SCHEDULE.signal_noise(p.t))
    torch.testing.assert_close(p.x_t, signal * p.x0[:, None] + noise * noises(p)[2].double(), rtol=0, atol=0)
    assert len(calls) == 1 and not calls[0][3]
    for j in range(3):
        torch.testing.assert_close(p.cond[:, j], denoiser(p.x_t[:, j], p.t, p.c))
        torch.testing.assert_close(p.uncond[:, j], denoiser(p.x_t[:, j], p.t, torch.zeros_like(p.c)))


def test_noise_of_particles_step_and_targets_is_independent():
    p = drawn(batch=256, m=4, shape=(16,))
    correlations = torch.stack([noise.flatten() for noise in noises(p)]).corrcoef()
    assert bool((correlations - torch.eye(3)).abs().max() < 0.04)  # 16384 values: about five standard errors


def test_a_part_of_a_batch_is_drawn_and_measured_as_in_the_whole():
    whole, part = drawn(batch=6, whole=6), drawn(batch=2, first=3, whole=6)
    assert torch.equal(part.x_t, whole.x_t[3:5]) and torch.equal(part.cond, whole.cond[3:5])
    for loss in (learn.self_consistency_loss, learn.l2_loss, learn.guided_score_matching_loss):
        assert torch.equal(loss(part, 0.5), loss(whole, 0.5)[3:5])
    assert torch.equal(learn.curve(part).loss(0.5), learn.curve(whole).loss(0.5)[3:5])


def test_take_gathers_items_and_draws_fresh_noise():
    p = drawn()
    taken = p.take(torch.tensor([4, 1]), seed=99, first_sample=7)
    assert (taken.seed, taken.first_sample, taken.prediction) == (99, 7, "v")
    for name in ("c", "s", "t", "x0", "x_t", "cond", "uncond"):
        assert torch.equal(getattr(taken, name), getattr(p, name)[[4, 1]]), name
    assert all(torch.equal(a, b[[4, 1]]) for a, b in zip(taken.levels, p.levels, strict=True))
    same = p.take(torch.arange(6), seed=p.seed)
    assert torch.equal(learn.self_consistency_loss(same, 1.0), learn.self_consistency_loss(p, 1.0))
    assert not torch.equal(learn.self_consistency_loss(same._replace(seed=5), 1.0), learn.self_consistency_loss(p, 1.0))
    assert p.to("cpu").levels == p.levels


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta, lam, churn", [(1.75, 1.0, 1.0), (1.0, 0.5, 0.3)])
def test_self_consistency_is_the_formula(prediction, beta, lam, churn):
    """With tensors for the targets and guided particles, and the gradient to omega through both."""
    p = drawn(frozen=Frozen(denoiser, SCHEDULE, prediction, null=0))
    z, z_targets, _ = (noise.double() for noise in noises(p))
    found = []
    for fused in (True, False):
        omega = torch.linspace(-0.5, 3, 6, dtype=torch.float64, requires_grad=True)
        if fused:
            loss = learn.self_consistency_loss(p, omega, beta=beta, lam=lam, churn=churn)
        else:
            targets = per_sample(p.levels.signal_s, z) * p.x0[:, None] + per_sample(p.levels.noise_s, z) * z_targets
            x_s = torch.stack(
                [
                    lgd.guided_step(p.x_t[:, j], p.cond[:, j], p.uncond[:, j], omega, p.levels, prediction=prediction,
                                    churn=churn, noise=z[:, j]) for j in range(3)
                ], 1,
            )  # fmt: skip
            loss = particle_energy(x_s, targets, beta, lam)
        found.append((loss, *torch.autograd.grad(loss.sum(), omega)))
        if fused:
            at = learn.curve(p, churn=churn)
            torch.testing.assert_close(at.loss(omega, beta, lam), loss)
            torch.testing.assert_close(at.grad(omega, beta, lam), found[0][1])
    torch.testing.assert_close(*found)


def test_defaults_are_the_papers():
    p = drawn()
    torch.testing.assert_close(
        learn.self_consistency_loss(p, 0.7),
        learn.self_consistency_loss(p, 0.7, beta=1.75, lam=1.0, churn=1.0, targets=3),
    )
    assert draw(FROZEN, p.x0, p.c, p.s, p.t, seed=0).x_t.shape[1] == 4


def test_l2_is_the_expectation_over_targets():
    p = drawn(batch=2, m=3, shape=(4,))
    many = learn.self_consistency_loss(p, 0.8, beta=2.0, lam=0.0, targets=200_000)
    torch.testing.assert_close(learn.l2_loss(p, 0.8), many, rtol=5e-3, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guided_score_matching_compares_the_guided_prediction_with_the_data(prediction):
    p = drawn(frozen=Frozen(denoiser, SCHEDULE, prediction, null=0))
    omega = torch.linspace(0, 2, 6, dtype=torch.float64)
    g = lgd.guided_score(p.cond, p.uncond, omega)
    signal, noise = (per_sample(level, g) for level in (p.levels.signal_t, p.levels.noise_t))
    x0 = {
        "x0": g, "eps": (p.x_t - noise * g) / signal, "v": signal * p.x_t - noise * g,
        "flow": (p.x_t - noise * g) / (signal + noise),
    }[prediction]  # fmt: skip
    expected = (x0 - p.x0[:, None]).square().flatten(2).sum(2).mean(1)
    torch.testing.assert_close(learn.guided_score_matching_loss(p, omega), expected)


def test_embeddings_and_null_conditions():
    seen = []

    def spy(x, t, c):
        seen.append(c)
        return x

    x, t, embeddings = torch.zeros(2, 3), torch.ones(2), torch.randn(2, 4)
    null = torch.arange(4.0)
    for given in (null, null[None].double(), lambda c: null.expand_as(c)):
        Frozen(spy, SCHEDULE, null=given).predict(x, t, embeddings)
        assert torch.equal(seen[-1], torch.cat((embeddings, null.expand(2, -1))))
    p = draw(Frozen(spy, SCHEDULE, null=null), x, embeddings, t / 4, t / 2, 2, seed=0)
    assert p.c is embeddings and torch.equal(seen[-1][:4], embeddings.repeat_interleave(2, 0))


def test_frozen_refuses():
    with pytest.raises(TypeError, match="`denoiser` is a int"):
        Frozen(3, SCHEDULE, null=0)
    with pytest.raises(ValueError, match=r"training mode, expected evaluation mode; denoiser.eval\(\)"):
        Frozen(nn.Sequential(nn.Dropout()).train(), SCHEDULE, null=0)
    with pytest.raises(TypeError, match="`schedule` is a str"):
        Frozen(denoiser, "cosine", null=0)
    with pytest.raises(ValueError, match="`prediction` is 'score', expected one of x0, eps, v, flow"):
        Frozen(denoiser, SCHEDULE, "score", null=0)
    with pytest.raises(TypeError, match="`null` is None, expected the condition that means none"):
        Frozen(denoiser, SCHEDULE)
    x, t, c = torch.zeros(2, 3), torch.ones(2), torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="x holds 2 samples, t 1 and c 2"):
        FROZEN.predict(x, t[:1], c)
    with pytest.raises(ValueError, match=r"the denoiser returned \[4, 1\] for x of shape \[4, 3\]"):
        Frozen(lambda x, t, c: x[:, :1], SCHEDULE, null=0).predict(x, t, c)
    with pytest.raises(TypeError, match="pass the null embedding"):
        FROZEN.predict(x, t, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"`null` has shape \[3\], expected \[4\]"):
        Frozen(denoiser, SCHEDULE, null=torch.ones(3)).predict(x, t, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"`null` returned \[1, 4\] for c of shape \[2, 4\]"):
        Frozen(denoiser, SCHEDULE, null=lambda c: c[:1]).predict(x, t, torch.ones(2, 4))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"particles": 0}, ValueError, "`particles` is 0, expected 1 or more"),
        ({"seed": 0.5}, TypeError, "`seed` is a float"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "expected one seed for the batch"),
        ({"c": torch.ones(3)}, ValueError, r"`c` is \[3\], expected a tensor with one entry for each of 2 items"),
        ({"s": 0.1}, ValueError, "`s` is float"),
        ({"s": torch.ones(2), "t": torch.ones(2) / 2}, ValueError, "nearer the data than `t`"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "`x0` has dtype torch.int64"),
    ],
)
def test_draw_refuses(change, error, message):
    arguments = {"x0": torch.zeros(2, 3), "c": torch.ones(2).long(), "s": torch.ones(2) / 4, "t": torch.ones(2) / 2}
    with pytest.raises(error, match=message):
        draw(FROZEN, **{**arguments, "seed": 0, **change})
