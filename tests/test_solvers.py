"""Compare every solver with diffusers' scheduler: a run of 20 steps with the same network, omega, start and noise.

Each run continues from its own sample, in float32; after every step the two differ by at most 1e-5 of diffusers'
largest value.
"""

import functools
import math

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.sampling import solvers

SHAPE = BATCH, *_ = 3, 4, 8, 8
NAMES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OMEGA = torch.tensor([0.5, 1.5, 3.0])
each_prediction = pytest.mark.parametrize("prediction", NAMES)


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def network(x, signal, noise, condition, prediction):
    """Return a prediction at x, from a smooth guess of x0; for VE levels from the scaled sample."""
    size = 1.0 if prediction == "flow" else (signal * signal + noise * noise) ** 0.5
    signal, noise = signal / size, noise / size
    x0 = torch.tanh(signal * x / (noise**2 + 1) + condition)
    z = (x - signal * x0) / noise
    return {"x0": x0, "eps": z, "v": signal * z - noise * x0, "flow": z - x0}[prediction]


def run(plan, levels, scheduler, prediction, runner=None, scaled=False, order=None, noisy=True, dtype=torch.float32):
    """Compare a run with diffusers'. `levels`: (signal, noise) of every call; `scaled`: the network gets
    scheduler.scale_model_input(x)."""
    generator, noise = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    theirs_noise = torch.Generator().manual_seed(1)
    condition, start = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2))
    device, impl = (runner.device, runner.impl) if runner else ("cpu", None)
    ours = theirs = start * float(scheduler.init_noise_sigma)
    kept, plan = None, plan.to(device)
    options = {} if order is None else {"order": order}
    if noisy:
        options["generator"] = theirs_noise
    for i, t in enumerate(scheduler.timesteps):
        at = [float(level[i]) for level in levels]
        scale = functools.partial(scheduler.scale_model_input, timestep=t) if scaled else lambda x: x
        inputs = scale(ours), (scale(theirs) if scaled else theirs)
        predictions = [network(x, *at, c, prediction) for x in inputs for c in (condition, torch.zeros(()))]
        cond, uncond = predictions[2:]
        guided = uncond + (1 + OMEGA.view(-1, 1, 1, 1)) * (cond - uncond)
        theirs = scheduler.step(guided, t, theirs, **options).prev_sample
        z = torch.randn(SHAPE, generator=noise)
        there = [testing.moved(one, device) for one in (ours, *predictions[:2], OMEGA)]
        ours, kept = plan.step(i, *there, kept, noise=z.to(device) if noisy else None, impl=impl)
        ours = ours.cpu()
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        limit = 1e-5 if dtype == torch.float32 else 2e-13
        assert difference <= limit, f"step {i}: {difference:.3g}"
    return ours


def diffusers():
    return pytest.importorskip("diffusers")


def discrete(scheduler):
    """Return the table of a scheduler, and the times of its run, which ends at the data."""
    schedule = lgd.Discrete(scheduler.alphas_cumprod, dtype=torch.float64)
    times = torch.cat((scheduler.timesteps, torch.tensor([-1])))
    return schedule, times, schedule.signal_noise(times[:-1])


def made(kind, prediction, steps=20, **options):
    scheduler = getattr(diffusers(), kind)(prediction_type=NAMES[prediction], **STABLE | options)
    scheduler.set_timesteps(steps)
    return scheduler


@each_prediction
@pytest.mark.parametrize("stochastic", [False, True])
def test_dpm_solver_2m(target, prediction, stochastic):
    kind = "sde-dpmsolver++" if stochastic else "dpmsolver++"
    scheduler = made("DPMSolverMultistepScheduler", prediction, algorithm_type=kind)
    schedule, times, levels = discrete(scheduler)
    plan = solvers.dpm_solver_2m(schedule, times, prediction=prediction, stochastic=stochastic)
    run(plan, levels, scheduler, prediction, target, noisy=stochastic)


@each_prediction
def test_ddim(target, prediction):
    scheduler = made("DDIMScheduler", prediction, clip_sample=False)
    schedule, times, levels = discrete(scheduler)
    run(solvers.one_step(schedule, times, prediction=prediction), levels, scheduler, prediction, target, noisy=False)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddpm(target, prediction):
    """Compare DDPM, whose fixed_small variance is that of the posterior, churn 1. diffusers steps from t to t - 50."""
    scheduler = made("DDPMScheduler", prediction, clip_sample=False)
    schedule, times, levels = discrete(scheduler)
    plan = solvers.one_step(schedule, times, prediction=prediction, churn=1.0)
    run(plan, levels, scheduler, prediction, target)


@each_prediction
def test_consistency(prediction):
    """Compare LCM; diffusers mixes some x into x0, with factors that vanish as timestep_scaling grows."""
    scheduler = made("LCMScheduler", prediction, clip_sample=False, timestep_scaling=1e8, original_inference_steps=50)
    schedule, times, levels = discrete(scheduler)
    run(solvers.consistency(schedule, times, prediction=prediction), levels, scheduler, prediction)


def sigmas_of(scheduler):
    """Return float64 sigmas of a scheduler's run, and the levels of every call."""
    sigmas = scheduler.sigmas.double()
    return sigmas, (torch.ones_like(sigmas), sigmas)


@each_prediction
@pytest.mark.parametrize("karras", [False, True])
def test_edm_euler(target, prediction, karras):
    scheduler = made("EulerDiscreteScheduler", prediction, use_karras_sigmas=karras)
    sigmas, levels = sigmas_of(scheduler)
    run(solvers.edm_euler(sigmas, prediction=prediction), levels, scheduler, prediction, target, True, noisy=False)


class Churning:
    """Call diffusers' Euler scheduler with its churn."""

    def __init__(self, scheduler, **churning):
        self.scheduler, self.churning = scheduler, churning

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def step(self, guided, t, x, generator):
        return self.scheduler.step(guided, t, x, generator=generator, **self.churning)


def test_edm_euler_churned(target, prediction="eps"):
    """Compare churn as in diffusers, which adds noise after the call of the network. (diffusers draws only where gamma
    is above 0: here everywhere.) With v diffusers mixes x0 at sigma with the slope at sigma_hat, so only eps is
    compared."""
    churning = {"s_churn": 4.0, "s_noise": 1.003}
    scheduler = Churning(made("EulerDiscreteScheduler", prediction), **churning)
    sigmas, levels = sigmas_of(scheduler)
    plan = solvers.edm_euler(sigmas, prediction=prediction, after=False, **churning)
    run(plan, levels, scheduler, prediction, target, True)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ancestral_euler(target, prediction):
    scheduler = made("EulerAncestralDiscreteScheduler", prediction)
    sigmas, levels = sigmas_of(scheduler)
    plan = solvers.one_step(lgd.EDM(), sigmas, prediction=prediction, churn=1.0)
    run(plan, levels, scheduler, prediction, target, True)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_edm_heun(target, prediction):
    scheduler = made("HeunDiscreteScheduler", prediction)
    sigmas = torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1::2])).double()
    plan = solvers.edm_heun(sigmas, prediction=prediction)
    assert len(plan) == len(scheduler.timesteps) == 39
    torch.testing.assert_close(plan.times.float(), scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    run(plan, (torch.ones_like(plan.times), plan.times), scheduler, prediction, target, True, noisy=False)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_adams_bashforth_of_order_4(target, prediction):
    """Compare LMS as it is unless given an order, with its numerical integrals."""
    scheduler = made("LMSDiscreteScheduler", prediction, use_karras_sigmas=True)
    sigmas, levels = sigmas_of(scheduler)
    plan = solvers.adams_bashforth(sigmas, prediction=prediction, order=4)
    run(plan, levels, scheduler, prediction, target, True, noisy=False)


def test_adams_bashforth_with_equal_steps():
    """Check by hand: with an eps prediction, which is the slope, the factors are those of Adams and Bashforth."""
    plan = solvers.adams_bashforth(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), prediction="eps", order=4)
    for call, expected in enumerate(
        ([1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    ):
        found = plan.table[call, 0, [1, 2, 4, 5]]
        torch.testing.assert_close(found, -torch.tensor(expected).float(), rtol=1e-6, atol=1e-6)
    first = solvers.adams_bashforth(plan.times, prediction="v", order=1).table
    torch.testing.assert_close(first, solvers.one_step(lgd.EDM(), plan.times, prediction="v").table)


@each_prediction
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(prediction, order):
    """Compare DEIS in float64: in float32 diffusers' differences of logarithms round to 1e-5. It ends at index 0 of the
    table, above the data."""
    scheduler = made("DEISMultistepScheduler", prediction, solver_order=order)
    schedule, times, levels = discrete(scheduler)
    times = torch.cat((times[:-1], torch.tensor([0])))
    plan = solvers.deis(schedule, times, prediction=prediction, order=order)
    signal, noise = schedule.signal_noise(times)
    scheduler.sigmas = noise / signal
    run(plan, levels, scheduler, prediction, noisy=False, dtype=torch.float64)


def test_deis_by_hand():
    """Check order 2 at sigma 4, 2, 1. The integral from 2 to 1 of ln(rho / 2) / ln 2 is 1 / ln 2 - 1, and that of 1 is
    -1."""
    plan = solvers.deis(lgd.EDM(), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), prediction="eps")
    assert plan.table[0, 0].tolist() == [1, -2, 0, 0]
    earlier = 1 / math.log(2) - 1
    torch.testing.assert_close(
        plan.table[1, 0], torch.tensor([1, -1 - earlier, earlier, 0], dtype=torch.float64), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_adams_bashforth(target, prediction):
    """Compare LMS, whose numerical integrals, with tolerance 1e-4, are replaced by exact coefficients."""
    scheduler = made("LMSDiscreteScheduler", prediction)
    sigmas, levels = sigmas_of(scheduler)

    def exact(order, t, current):
        if order == 1:
            return float(sigmas[t + 1] - sigmas[t])
        here, other = sigmas[t - current], sigmas[t - 1 + current]
        a, b = sigmas[t], sigmas[t + 1]
        return float(((b - other) ** 2 - (a - other) ** 2) / (2 * (here - other)))

    close = [scheduler.get_lms_coefficient(2, 5, current) - exact(2, 5, current) for current in (0, 1)]
    assert max(map(abs, close)) < 1e-3 * abs(exact(2, 5, 0))
    scheduler.get_lms_coefficient = exact
    plan = solvers.adams_bashforth(sigmas, prediction=prediction)
    run(plan, levels, scheduler, prediction, target, True, order=2, noisy=False)


def edm_paper(x, sigmas, slope, noises, correct, s_churn):
    """Run Algorithm 2 as the paper states it."""
    gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
    for t, s, z in zip(sigmas, sigmas[1:], noises, strict=False):
        raised = t * (1 + gamma)
        x = x + (raised**2 - t**2) ** 0.5 * z
        d = slope(x, raised)
        after = x + (s - raised) * d
        if correct and s > 0:
            after = x + (s - raised) * (d + slope(after, s)) / 2
        x = after
    return x


@pytest.mark.parametrize("correct", [False, True])
def test_edm_as_in_the_paper(correct, generator):
    """Compare with the paper, which adds noise before the call, at sigma_hat; in float64."""
    sigmas = lgd.EDM().from_unit(torch.linspace(1, 0, 9, dtype=torch.float64))
    start, condition = (testing.sample(SHAPE, torch.float64, generator) for _ in range(2))
    noises = [testing.sample(SHAPE, torch.float64, generator) for _ in range(8)]
    predict = functools.partial(network, signal=1.0, condition=condition, prediction="x0")

    def slope(x, sigma):
        return (x - predict(x, noise=float(sigma))) / sigma

    expected = edm_paper(80 * start, sigmas, slope, noises, correct, s_churn=3.0)
    plan = (solvers.edm_heun if correct else solvers.edm_euler)(sigmas, s_churn=3.0)
    x, kept, fresh = 80 * start + plan.start * noises[0], None, iter(noises[1:])
    for i, sigma in enumerate(plan.times):
        z = next(fresh, noises[0]) if plan.table[i, 0, 3] else torch.zeros_like(x)
        x, kept = plan.step(i, x, predict(x, noise=float(sigma)), kept=kept, noise=z)
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)


def test_order_of_convergence():
    """Check that half the step divides the error by 2 (Euler), by 4 (second order) or by 8 (UniPC with its
    corrector)."""

    def error(make, steps, order):
        start = 1 if order < 3 else 0.95  # at 1, h is infinite, and the first step first order
        times = torch.linspace(start, 0.2, steps + 1, dtype=torch.float64)
        x = torch.ones(1, 1, dtype=torch.float64)
        plan, kept = make(times), None
        for i, t in enumerate(plan.times):
            x, kept = plan.step(i, x, torch.tanh(2 * x) * (1 - 0.3 * t), kept=kept)
        return x.item()

    flow = lgd.RectifiedFlow()
    for make, order in (
        (functools.partial(solvers.one_step, flow), 1),
        (functools.partial(solvers.dpm_solver_2m, flow), 2),
        (functools.partial(solvers.unipc, flow), 3),
        (functools.partial(solvers.unipc, flow, variant="bh1"), 3),
        (solvers.adams_bashforth, 2),
        (functools.partial(solvers.deis, flow), 2),
    ):
        ends = [error(make, steps, order) for steps in (40, 80, 160, 1280)]
        ratio = (ends[1] - ends[3]) / (ends[2] - ends[3])
        assert 0.8 * 2**order < ratio < 1.35 * 2**order, (make, ratio)
