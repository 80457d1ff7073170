"""Compare the steps of policy-gradient trainers with their formulas, written out in float64, and check that a score of
a drawn step gives the same bits."""

import math
from types import SimpleNamespace

import pytest
import torch
from policy import SHAPE, ddim_scheduler, ddpo, flow_grpo, flow_scheduler, normal, over, tensors

from lgd_kernels import testing
from lgd_kernels.integrations import rl
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.sampling.log_prob import step_with_log_prob
from lgd_kernels.sampling.schedules import RectifiedFlow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_by_hand():
    """t = 1/2, s = 1/4, noise level 1, x = 1, v = 2: s_t = 1, and mean = 1 + (2 + 1 (1 + 1)) (-1/4) = 0."""
    scheduler = flow_scheduler()
    scheduler.sigmas, scheduler.index_for_timestep = torch.tensor([0.5, 0.25]), lambda t: 0
    x, v = torch.ones(1, 1), torch.full((1, 1), 2.0)
    given = dict(noise_level=1.0, prev_sample=torch.ones(1, 1), return_sqrt_dt=True)
    _, log_p, mean, spread, sqrt_dt = rl.sde_step_with_logprob(scheduler, v, 500, x, **given)
    assert (mean.item(), spread.item(), sqrt_dt.item()) == (0, 1, 0.5)
    assert log_p.item() == pytest.approx(-2 + math.log(2) - 0.5 * math.log(2 * math.pi))  # 1 at a normal of 0, 1/2
    given["sde_type"] = "cps"  # all noise is new: mean = (1 - s) (x - t v) = 0
    _, log_p, mean, std, _ = rl.sde_step_with_logprob(scheduler, v, 500, x, **given)
    assert std.item() == 0.25 and mean.item() == pytest.approx(0, abs=1e-7) and log_p.item() == pytest.approx(-1)


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("step", [0, 4, 9, [0, 5, 9]])
def test_flow_grpo(kind, step, generator):
    """Compare with Flow-GRPO's formulas at its defaults, drawn from the same generator, at the first and last
    step too."""
    x, v, _ = tensors(generator)
    scheduler, step = flow_scheduler(), torch.tensor(step).reshape(-1)
    options = dict(sde_type=kind, return_sqrt_dt=True)
    found = rl.sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[step], x, generator=torch.Generator().manual_seed(1), **options
    )
    mean, std, spread = flow_grpo(v, x, scheduler.sigmas, step, 0.7, kind)
    x_s = mean + std * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    dt = over(scheduler.sigmas[step] - scheduler.sigmas[step + 1], x)
    log_p = normal(x_s, mean, std) if kind == "sde" else -((x_s - mean) ** 2).flatten(1).mean(1)
    for one, expected in zip(found, (x_s, log_p, mean, spread, torch.sqrt(dt)), strict=True):
        torch.testing.assert_close(one.double(), expected.expand_as(one), rtol=1e-6, atol=1e-6)
    again = rl.sde_step_with_logprob(scheduler, v, scheduler.timesteps[step], x, prev_sample=x_s.float(), **options)
    torch.testing.assert_close(again[1], log_p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("step", [951, 401, 1, [951, 401, 1]])
def test_ddpo(prediction, step, generator):
    """Compare with DDPO's formulas at eta 1, which its trainer uses; the step from 1 ends at 0."""
    x, p, _ = tensors(generator)
    scheduler, step = ddim_scheduler(prediction), torch.tensor(step)
    drawn = torch.Generator().manual_seed(1)
    x_s, log_p = rl.ddim_step_with_logprob(scheduler, p, step, x, eta=1.0, generator=drawn)
    mean, std = ddpo(p, x, scheduler, step.reshape(-1), 1.0)
    expected = mean + std * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x_s.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_p, normal(x_s.double(), mean, std), rtol=1e-6, atol=1e-6)
    _, given = rl.ddim_step_with_logprob(scheduler, p, step, x, eta=1.0, prev_sample=mean.float())
    torch.testing.assert_close(given, normal(mean.float().double(), mean, std), rtol=1e-6, atol=1e-6)


def flow(kind):
    scheduler = flow_scheduler()

    def step(x, v, u, w, at, **given):
        times = scheduler.timesteps[at]
        return rl.sde_step_with_logprob(scheduler, v, times, x, sde_type=kind, uncond=u, omega=w, **given)[:2]

    return step


def ddim(x, v, u, w, at, **given):
    return rl.ddim_step_with_logprob(ddim_scheduler(), v, 951 - 100 * at, x, eta=0.8, uncond=u, omega=w, **given)


def own(**chosen):
    def step(x, v, u, w, at, prev_sample=None, **given):
        options = {name: one[at] if isinstance(one, torch.Tensor) else one for name, one in chosen.items()}
        if "coefficients" in options:
            options["coefficients"] = tuple(one[at] for one in options["coefficients"])
        else:
            t = 0.95 - 0.1 * at.double()
            options |= {"levels": RectifiedFlow().levels(t, t - 0.04), "prediction": "flow"}
        return step_with_log_prob(x, v, u, w, x_s=prev_sample, **options, **given)

    return step


FAMILIES = {
    "sde": flow("sde"),
    "cps": flow("cps"),
    "ddpo": ddim,
    "churn": own(churn=0.8),
    "h": own(h=torch.linspace(0, 0.9, 9)),
    "coefficients": own(coefficients=[torch.linspace(0.5, 1.5, 9)] * 3),
}


@pytest.mark.parametrize("guided", [True, False], ids=["uncond", "guided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_has_the_bits_of_the_draw(family, dtype, guided, generator):
    """Check log p of a drawn step, scored again: with and without gradient, alone, in another batch, after a copy to
    float32."""
    x, v, u = tensors(generator, dtype, (5, 4, 33, 9))
    w, at, step = torch.rand(5, generator=generator), torch.tensor([0, 3, 7, 8, 5]), FAMILIES[family]

    def called(rows, **given):
        pick = lambda one: one[rows]  # noqa: E731
        return step(*map(pick, (x, v)), *((pick(u), pick(w)) if guided else (None, None)), pick(at), **given)

    every = slice(None)
    x_s, said = called(every, seed=3)
    assert x_s.dtype == dtype and said.isfinite().all()
    assert torch.equal(called(every, prev_sample=x_s)[1], said)
    assert torch.equal(called(every, prev_sample=x_s.float())[1], said)
    v = v.clone().requires_grad_()
    scored = called(every, prev_sample=x_s)[1]
    assert scored.requires_grad and torch.equal(scored, said)
    for rows in ([0], [4], [3, 1], [2, 4, 0]):
        assert torch.equal(called(rows, prev_sample=x_s[rows])[1], said[rows])
    alone, log_p = called([2], seed=3, first_sample=2)
    assert torch.equal(alone, x_s[2:3]) and torch.equal(log_p, said[2:3])


@pytest.mark.parametrize("family", ["sde", "cps", "ddpo"])
def test_gradients(family, generator):
    """Compare gradients to prediction, uncond and omega with autograd through the formulas in float64."""
    x, v, u = tensors(generator)
    w, at = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 4, 8])
    leaves = [one.clone().requires_grad_() for one in (v, u, w)]
    x_s, _ = FAMILIES[family](x, v, u, w, at, seed=1)
    found = torch.autograd.grad(FAMILIES[family](x, *leaves, at, prev_sample=x_s)[1].sum(), leaves)
    wide = [one.double().requires_grad_() for one in (v, u, w)]
    guided = wide[0] + over(wide[2], x) * (wide[0] - wide[1])
    if family == "ddpo":
        mean, std = ddpo(guided, x, ddim_scheduler(), 951 - 100 * at, 0.8)
    else:
        mean, std, _ = flow_grpo(guided, x, flow_scheduler().sigmas, at, 0.7, family)
    residual = x_s.double() - mean
    log_p = -(residual**2).flatten(1).mean(1) if family == "cps" else normal(x_s.double(), mean, std)
    for one, expected in zip(found, torch.autograd.grad(log_p.sum(), wide), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_the_mean_takes_a_penalty(generator):
    """Check the gradient of Flow-GRPO's KL penalty, which reads the mean only; and that the mean of half is float32."""
    x, v, u = tensors(generator, torch.bfloat16)
    scheduler, leaf = flow_scheduler(), v.float().requires_grad_()
    _, _, mean, spread = rl.sde_step_with_logprob(scheduler, leaf, scheduler.timesteps[4], x, prev_sample=x)
    _, _, fixed, _ = rl.sde_step_with_logprob(scheduler, u, scheduler.timesteps[4], x, prev_sample=x)
    assert mean.dtype == fixed.dtype == torch.float32
    penalty = ((mean - fixed) ** 2 / (2 * spread**2)).mean()
    wide = v.double().requires_grad_()
    both = [flow_grpo(one, x, scheduler.sigmas, torch.tensor([4]), 0.7, "sde") for one in (wide, u)]
    expected = ((both[0][0] - both[1][0]) ** 2 / (2 * both[0][2] ** 2)).mean()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=0)
    found, there = torch.autograd.grad(penalty, leaf)[0], torch.autograd.grad(expected, wide)[0]
    torch.testing.assert_close(found.double(), there, rtol=1e-4, atol=1e-9)
    quick = rl.sde_step_with_logprob(scheduler, leaf, scheduler.timesteps[4], x, prev_sample=x, with_mean=False)
    assert quick[2] is None


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_rounding_costs_without_this(dtype, generator):
    """Measure the first ratio of an update where log p was that of x_s before it was rounded, as in the public codes:
    off by more than the clip range of Flow-GRPO, 1e-5 to 1e-4. Here it is 1, with `dtype` set too."""
    shape, scheduler = (8, 16, 32, 32), flow_scheduler()
    x, v = (testing.sample(shape, dtype, generator) for _ in range(2))
    off = []
    for step in (0, 3, 6, 8):
        at = torch.tensor([step])
        mean, std, _ = flow_grpo(v, x, scheduler.sigmas, at, 0.7, "sde")
        mean, std = mean.float(), std.float()
        x_s = mean + std * torch.randn(shape, generator=generator)
        off.append((normal(x_s.to(dtype).float(), mean, std) - normal(x_s, mean, std)).exp().sub(1).abs().max().item())
        times = scheduler.timesteps[at]
        stored, said, _, _ = rl.sde_step_with_logprob(scheduler, v.float(), times, x.float(), dtype=dtype)
        scored = rl.sde_step_with_logprob(scheduler, v, times, x, prev_sample=stored)[1]
        assert stored.dtype == dtype and (scored - said).exp().eq(1).all()
    least = {torch.bfloat16: 4e-5, torch.float16: 5e-6}[dtype]
    assert least < max(off) < 2e-3, off


def test_steps_without_noise(generator):
    """Check V = 0: the last step of Flow-CPS, eta 0 of DDPO, noise level 0; log p is 0 for a draw, NaN for a score."""
    x, v, _ = tensors(generator)
    scheduler = flow_scheduler()
    options = dict(sde_type="cps", normalized=True, noise_level=0.7)
    x_s, log_p, mean, _ = rl.sde_step_with_logprob(scheduler, v, scheduler.timesteps[9], x, **options)
    assert not log_p.any() and torch.allclose(x_s, mean, atol=1e-6)
    again = rl.sde_step_with_logprob(scheduler, v, scheduler.timesteps[9], x, prev_sample=x_s, **options)
    assert again[1].isnan().all()
    plain = rl.sde_step_with_logprob(scheduler, v, scheduler.timesteps[2], x, noise_level=0.0)
    euler = x + v * (scheduler.sigmas[3] - scheduler.sigmas[2])
    assert not plain[1].any() and torch.allclose(plain[0], euler, atol=1e-6)
    x_s, log_p = rl.ddim_step_with_logprob(ddim_scheduler(), v, 501, x)
    expected = ddpo(v, x, ddim_scheduler(), torch.tensor([501]), 0.0)[0]
    assert not log_p.any() and torch.allclose(x_s.double(), expected, atol=1e-6)


class Rollout:
    """Stand for SGLang's SchedulerRLMixin: what `flow_sde_sampling` calls there."""

    flow_sde_sampling = rl.flow_sde_sampling

    def __init__(self):
        self.log_probs, self.debugged = [], []

    def _get_rollout_session_data(self, batch):
        return batch._rollout_session_data

    def _rollout_variance_noise(self, batch, model_output, generator):
        return torch.cat([torch.randn(1, *SHAPE[1:], generator=one, dtype=model_output.dtype) for one in generator])

    def append_local_rollout_log_probs(self, batch, log_prob):
        self.log_probs.append(log_prob)

    def append_local_rollout_debug_tensors(self, batch, **kept):
        self.debugged.append(kept)


class Summed(Rollout):
    def append_local_rollout_log_probs(self, batch, log_prob_sum, log_prob_count):
        self.log_probs.append(log_prob_sum / log_prob_count)


def rollout(kind, sigmas, **options):
    session = SimpleNamespace(sigma_max=sigmas[1].item(), latents_shape=SHAPE)
    options = {"rollout_log_prob_no_const": kind == "ode", "rollout_noise_level": 0.7} | options
    return SimpleNamespace(rollout_sde_type=kind, _rollout_session_data=session, rollout_debug_mode=True, **options)


@pytest.mark.parametrize("made", [Rollout, Summed])
@pytest.mark.parametrize("kind", ["sde", "cps", "ode"])
def test_sglang(made, kind, generator):
    """Run a rollout with SGLang's calls, and score it as a trainer does."""
    x, v, _ = tensors(generator)
    scheduler, mixin = flow_scheduler(), made()
    batch = rollout(kind, scheduler.sigmas)
    for step in range(10):
        if step == 9 and kind == "cps":
            break  # no noise
        drawn = [torch.Generator().manual_seed(n) for n in range(3)]
        sigmas = scheduler.sigmas[step], scheduler.sigmas[step + 1]
        x_s = mixin.flow_sde_sampling(batch, v, x, *sigmas, drawn)
        log_p, kept = mixin.log_probs[-1], mixin.debugged[-1]
        if kind == "ode":
            assert torch.equal(x_s, x + (sigmas[1] - sigmas[0]) * v) and not log_p.any()
            continue
        mean, std, _ = flow_grpo(v, x, scheduler.sigmas, torch.tensor([step]), 0.7, kind)
        noise = torch.cat([torch.randn(1, *SHAPE[1:], generator=one.manual_seed(n)) for n, one in enumerate(drawn)])
        torch.testing.assert_close(x_s.double(), mean + std * noise, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_p, normal(x_s.double(), mean, std), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept["prev_sample_mean"].double(), mean, rtol=1e-6, atol=1e-6)
        score = rl.sde_step_with_logprob(
            scheduler, v, scheduler.timesteps[step], x, prev_sample=x_s, sde_type=kind, normalized=True
        )
        assert torch.allclose(score[1], log_p, rtol=0, atol=0 if made is Rollout else 1e-15)
        x = x_s
    left_out = rollout(kind, scheduler.sigmas, rollout_sde_step_indices=[1], _rollout_loop_step_index=0)
    mixin.flow_sde_sampling(left_out, v, x, *scheduler.sigmas[:2], None)
    assert not mixin.log_probs[-1].any()


def test_with_diffusers(generator):
    """Check that diffusers' schedulers have what the functions read, and whole runs of both."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x = testing.sample(SHAPE, torch.float32, generator)
    for step, t in enumerate(scheduler.timesteps):
        x_s, log_p, mean, _ = rl.sde_step_with_logprob(scheduler, -x, t.unsqueeze(0), x, seed=step)
        expected, std, _ = flow_grpo(-x, x, scheduler.sigmas, torch.tensor([step]), 0.7, "sde")
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_p, normal(x_s.double(), expected, std), rtol=1e-6, atol=1e-6)
        x = x_s
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x_s, _ = rl.ddim_step_with_logprob(scheduler, x, t, x, eta=0.0)
        assert torch.allclose(x_s, scheduler.step(x, t, x, eta=0.0).prev_sample, rtol=1e-5, atol=1e-5)
        x = x_s
    with pytest.raises(ValueError, match=r"`self.config.clip_sample` is True.*from_config") as refused:
        rl.ddim_step_with_logprob(diffusers.DDIMScheduler(), x, 1, x)
    assert "clip_sample=False" in str(refused.value)
    mended = diffusers.DDIMScheduler.from_config(diffusers.DDIMScheduler().config, clip_sample=False)
    mended.set_timesteps(4)
    assert rl.ddim_step_with_logprob(mended, x, 1, x)[0].isfinite().all()


def test_refuses(generator):
    x, v, _ = tensors(generator)
    scheduler, t = flow_scheduler(), flow_scheduler().timesteps[1]
    step = lambda **given: rl.sde_step_with_logprob(scheduler, v, t, x, **given)  # noqa: E731
    made = torch.Generator()
    for message, call in {
        "`sde_type` is 'ode', expected sde or cps": lambda: step(sde_type="ode"),
        "`noise_level` is 1.5": lambda: step(sde_type="cps", noise_level=1.5),
        "`noise_level` is a str": lambda: step(noise_level="1"),
        "`generator` and `seed` were both given": lambda: step(generator=made, seed=1),
        "`prev_sample` and `generator` were both given": lambda: step(prev_sample=x, generator=made),
        "`omega` is missing": lambda: step(uncond=v),
        "`omega` was given without `uncond`": lambda: step(omega=1.0),
        r"`prev_sample` has shape \[2, 4, 6, 5\]": lambda: step(prev_sample=x[:2]),
        "`timestep` is 7": lambda: rl.sde_step_with_logprob(scheduler, v, 7, x),
        "`model_output` is a NoneType": lambda: rl.sde_step_with_logprob(scheduler, None, t, x),
        "`seed` has dtype": lambda: step(seed=torch.ones(3)),
        "`eta` is 1.5": lambda: rl.ddim_step_with_logprob(ddim_scheduler(), v, 1, x, eta=1.5),
        "`self.num_inference_steps` is None": lambda: rl.ddim_step_with_logprob(ddim_scheduler(steps=None), v, 1, x),
        "`self.config.prediction_type` is 'flow'": lambda: rl.ddim_step_with_logprob(ddim_scheduler("flow"), v, 1, x),
        "`self.config.thresholding` is True": lambda: rl.ddim_step_with_logprob(
            ddim_scheduler(thresholding=True), v, 1, x
        ),
        "`batch.rollout_sde_type` is 'dance'": lambda: Rollout().flow_sde_sampling(
            rollout("dance", scheduler.sigmas), v, x, t, t, None
        ),
        "without sequence parallelism": lambda: Rollout().flow_sde_sampling(
            rollout("sde", scheduler.sigmas), v[:, :2], x[:, :2], t, t, None
        ),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_levels_of_flow_cps(generator):
    """Check that "cps" is the step with h = cos(eta pi / 2), from eta .7 on beyond churn 1."""
    x, v, _ = tensors(generator, torch.float64)
    t, s = torch.tensor([1.0, 0.7, 0.3]).double(), torch.tensor([0.9, 0.5, 0.2]).double()
    for eta in (0.2, 0.7, 1.0):
        a, b, std = rl.cps_coefficients(t, s, eta)
        at = dict(levels=Levels(*RectifiedFlow().levels(t, s)), prediction="flow", h=math.cos(eta * math.pi / 2))
        _, one = step_with_log_prob(x, v, **at, x_s=x + 1)
        _, other = step_with_log_prob(x, v, coefficients=(a, b, std), x_s=x + 1)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
