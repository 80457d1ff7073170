"""Compare full runs of diffusers' schedulers and of guided_step, with the same start, network, omega and noise.

Each run continues from its own sample, and after every step the two differ by at most 1e-5 of the largest value of
diffusers' sample. Levels come from the scheduler's own tables, which are float32.
"""

import functools
import itertools

import pytest
import torch
from conftest import TARGETS, Target

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.levels import step_coefficients

diffusers = pytest.importorskip("diffusers")

SHAPE = BATCH, *_ = 3, 4, 8, 8
NAMES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}  # diffusers' names
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
RUNNERS = [one for one in TARGETS if one.values[0].impl != "cuda" and one.id != "triton-interpreted"]
RUNNERS.append(pytest.param(Target("reference", "cpu"), id="reference"))
each_runner = pytest.mark.parametrize("runner", RUNNERS)
each_prediction = pytest.mark.parametrize("prediction", NAMES)
each_betas = pytest.mark.parametrize("betas", [STABLE, DDPM], ids=["stable diffusion", "ddpm"])


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    """Use one thread: the samples are small, and on a busy machine threads that wait for each other take six times as
    long."""
    torch.set_num_threads(1)


def network(x, levels, condition, prediction):
    """Return a prediction at x, with a tanh as guess of x0. VE samples are scaled to variance preserving ones.

    The slope is at most 1, since a steep network tests itself: at 4, guided, a change of the start of diffusers' own
    run by one ulp changes its end by up to 5e-5.
    """
    signal, noise = (level.view(-1, 1, 1, 1) for level in levels[:2])
    size = 1 if prediction == "flow" else torch.hypot(signal, noise)
    signal, noise = signal / size, noise / size
    x0 = torch.tanh(signal * x / (noise**2 + 1) + condition)
    z = (x - signal * x0) / noise
    return {"x0": x0, "eps": z, "v": signal * z - noise * x0, "flow": z - x0}[prediction]


def omega_of(step):
    """Return another omega at every call; by turns a number, and one for each sample."""
    return 0.5 + step % 4 if step % 2 else torch.linspace(0, 3, BATCH).roll(step // 2)


def noise_generator():
    """Return a generator. Two of them draw the same noise: one for us, one for diffusers."""
    return torch.Generator().manual_seed(1)


def assert_same_run(runner, prediction, levels, their_step, churn=lambda levels: 0.0, scaled=lambda step, x: x):
    """Compare two runs: `levels` of each step and `churn(levels)` are ours; `their_step(step, guided, x, z)` is
    diffusers'."""
    generator, noise = torch.Generator().manual_seed(0), noise_generator()
    there = functools.partial(testing.moved, device=runner.device)
    condition, start = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    size = torch.hypot(*levels[0][:2]).view(-1, 1, 1, 1)  # 1, but for the sigmas of a VE schedule
    ours = theirs = start * size
    for step, at in enumerate(levels):
        z, omega = torch.randn(SHAPE, generator=noise), omega_of(step)
        predictions = [
            network(scaled(step, x), at, c, prediction) for x in (ours, theirs) for c in (condition, torch.zeros(()))
        ]
        cond, uncond = predictions[2:]
        guided = uncond + (1 + torch.as_tensor(omega).view(-1, 1, 1, 1)) * (cond - uncond)
        theirs = their_step(step, guided, theirs, z)
        options = {"prediction": prediction, "churn": there(churn(at)), "noise": there(z), "impl": runner.impl}
        ours = lgd.guided_step(*map(there, (ours, *predictions[:2], omega, at)), **options).cpu()
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert difference <= 1e-5, f"step {step}: {difference:.3g}"


def follow(scheduler, **options):
    """Return the `their_step` of a scheduler that goes through its timesteps."""
    return lambda step, guided, x, z: scheduler.step(guided, scheduler.timesteps[step], x, **options).prev_sample


def scaled_by(scheduler):
    """Scale a VE sample to the input of a network for variance preserving samples."""
    return lambda step, x: scheduler.scale_model_input(x, scheduler.timesteps[step])


def along(schedule, sigmas):
    """Return the levels of each step, with the same sigmas for every sample."""
    return [schedule.levels(t.expand(BATCH), s.expand(BATCH)) for t, s in itertools.pairwise(sigmas)]


def ddim(prediction, betas, steps=20, **options):
    scheduler = diffusers.DDIMScheduler(prediction_type=NAMES[prediction], clip_sample=False, **betas, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def ddim_levels(scheduler, t):
    """Return DDIM's levels, from t to t - 1000 / steps. Below index 0 DDIM takes the data, or with
    set_alpha_to_one=False index 0."""
    s = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = -1 if scheduler.config.set_alpha_to_one else 0
    return lgd.Discrete(scheduler.alphas_cumprod).levels(t, s.clamp(min=last))


def assert_same_ddim(runner, prediction, scheduler, eta):
    assert_same_run(
        runner,
        prediction,
        [ddim_levels(scheduler, t.expand(BATCH)) for t in scheduler.timesteps],
        follow(scheduler, eta=eta, generator=noise_generator()),
        churn=lambda levels: lgd.churn_from_eta(eta, levels),
    )


@each_runner
@each_betas
@each_prediction
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_ddim(runner, betas, prediction, eta):
    assert_same_ddim(runner, prediction, ddim(prediction, betas), eta)


@each_runner
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_that_ends_before_the_data(runner, eta):
    """Compare Stable Diffusion's own settings: the last step goes from index 1 to index 0."""
    scheduler = ddim("eps", STABLE, steps=50, set_alpha_to_one=False, steps_offset=1)
    assert_same_ddim(runner, "eps", scheduler, eta)


@each_runner
@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_from_pure_noise(runner, prediction, eta):
    """Compare from signal 0. With eta 1 the first step has h = r = 0, where diffusers has an error of 3e-4 (ours 2e-7,
    against float64): it takes the root of 1 - alpha - sigma^2, of which rounding leaves 6e-8."""
    scheduler = ddim(prediction, STABLE, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    assert_same_ddim(runner, prediction, scheduler, eta)


@each_betas
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_of_the_named_tables(betas, eta):
    """Compare with diffusers on our table. Its own is float32: 1 - alphas_cumprod has an error of 2e-4 at index 0
    (Stable Diffusion: 3e-5), which shows in the last step of an eps run as 5e-5 (9e-6); our error is 5e-7 against
    float64."""
    scheduler = ddim("eps", betas)
    table = lgd.Discrete.ddpm() if betas == DDPM else lgd.Discrete.stable_diffusion()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table.alphas_cumprod, rtol=1e-6, atol=0)
    scheduler.alphas_cumprod = table.alphas_cumprod
    assert_same_ddim(Target("reference", "cpu"), "eps", scheduler, eta)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_times_of_their_own(target, prediction):
    """Compare one batch of samples whose steps are 50, 40 and 25 indices, from 951, 760 and 475, with an eta each;
    diffusers takes three runs."""
    schedulers, etas, count = [ddim(prediction, STABLE, steps) for steps in (20, 25, 40)], [0.0, 0.6, 1.0], 20
    times = [scheduler.timesteps[-count:] for scheduler in schedulers]

    def their_step(step, guided, x, z):
        samples = zip(schedulers, times, etas, guided.split(1), x.split(1), z.split(1), strict=True)
        return torch.cat(
            [one.step(g, t[step], x, eta, variance_noise=z).prev_sample for one, t, eta, g, x, z in samples]
        )

    def levels_of(step):
        samples = [ddim_levels(one, t[step, None]) for one, t in zip(schedulers, times, strict=True)]
        return lgd.Levels(*map(torch.cat, zip(*samples, strict=True)))

    assert_same_run(
        target,
        prediction,
        [levels_of(step) for step in range(count)],
        their_step,
        churn=lambda levels: lgd.churn_from_eta(torch.tensor(etas), levels),
    )


@each_runner
@each_prediction
@pytest.mark.parametrize(
    "options",
    [{}, {"use_karras_sigmas": True}, {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 80.0}],
    ids=["stable diffusion", "karras", "edm"],
)
def test_euler(runner, prediction, options):
    """Compare Euler. Its v belongs to the scaled sample x / sqrt(1 + sigma^2), and equals ours at signal 1, noise
    sigma."""
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=NAMES[prediction], **STABLE, **options)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(0)  # sigmas above the table's last have its index: the first step is ambiguous
    assert_same_run(
        runner, prediction, along(lgd.EDM(), scheduler.sigmas), follow(scheduler), scaled=scaled_by(scheduler)
    )


@each_runner
@each_betas
@pytest.mark.parametrize("prediction", ["eps", "v"])  # diffusers refuses x0
def test_euler_ancestral(runner, betas, prediction):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(prediction_type=NAMES[prediction], **betas)
    scheduler.set_timesteps(20)
    assert_same_run(
        runner,
        prediction,
        along(lgd.EDM(), scheduler.sigmas),
        follow(scheduler, generator=noise_generator()),
        churn=lambda levels: 1.0,
        scaled=scaled_by(scheduler),
    )


def test_ancestral_is_churn_one():
    """Compare ancestral Euler with churn 1. sigma_up^2 = s^2 (t^2 - s^2) / t^2 and sigma_down^2 = s^2 - sigma_up^2 =
    (s^2 / t)^2, for any two sigmas: with q = 1 - s/t, V = s sqrt(q (2 - q)) = s sqrt(1 - (s/t)^2), and the factor of x
    is A = (s/t)^2 = sigma_down / t."""
    t, s = torch.tensor([[14.6, 80.0, 2.0, 0.03], [9.0, 0.1, 1.99, 0.0]], dtype=torch.float64)
    levels = lgd.EDM().levels(t, s)
    a, b, v = step_coefficients(levels, "x0", 1.0)
    up = s * torch.sqrt((t - s) * (t + s)) / t
    for found, expected in ((v, up), (a, (s / t) ** 2), (b, 1 - (s / t) ** 2)):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)
    assert torch.equal(lgd.churn_from_eta(1.0, levels), torch.ones_like(t))


@each_runner
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(runner, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(20)
    assert_same_run(runner, "flow", along(lgd.RectifiedFlow(), scheduler.sigmas), follow(scheduler))
