"""LearnedGuidance and FusedScheduler in diffusers' own denoising loops, with real models, tiny and at random."""

import functools
import itertools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import rules

diffusers = pytest.importorskip("diffusers")
guiders = pytest.importorskip("diffusers.guiders")

from lgd_kernels.integrations.diffusers import FusedScheduler, LearnedGuidance  # noqa: E402
from lgd_kernels.integrations.diffusers_plans import times_of  # noqa: E402

BATCH = 3
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM, DDIM, FLOW = "DPMSolverMultistepScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
KARRAS = STABLE | {"use_karras_sigmas": True}
RUNS = {  # scheduler, its settings, arguments of its steps
    "ddim": (DDIM, STABLE | {"clip_sample": False}, {}),
    "ddim v": (DDIM, STABLE | {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
    "ddim eta": (DDIM, STABLE | {"clip_sample": False, "timestep_spacing": "trailing"}, {"eta": 0.6}),
    "ddim to index 0": (DDIM, STABLE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}),
    "flow": (FLOW, {"shift": 3.0}, {}),
    "flow stochastic": (FLOW, {"stochastic_sampling": True}, {}),
    "euler": (EULER, STABLE, {}),
    "euler karras": (EULER, KARRAS | {"prediction_type": "v_prediction"}, {}),
    "ancestral": (ANCESTRAL, STABLE, {}),
    "2m": (DPM, STABLE, {}),
    "2m karras": (DPM, KARRAS, {}),
    "2m ends above the data": (DPM, STABLE | {"final_sigmas_type": "sigma_min"}, {}),
    "2m ends with euler": (DPM, STABLE | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}),
    "2m sde": (DPM, STABLE | {"algorithm_type": "sde-dpmsolver++"}, {}),
    "2m flow": (DPM, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {}),
    "1": (DPM, STABLE | {"solver_order": 1}, {}),
}
each_run = pytest.mark.parametrize("run", RUNS)
STOCHASTIC = {"ddim eta", "flow stochastic", "ancestral", "2m sde"}


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def pair(run, steps=20):
    """diffusers' scheduler and ours, each with its run laid out."""
    kind, settings, options = RUNS[run]
    theirs = getattr(diffusers, kind)(**settings)
    ours = FusedScheduler(getattr(diffusers, kind)(**settings))
    for one in (theirs, ours):
        one.set_timesteps(steps)
    return theirs, ours, options


def noise(seed, shape=(BATCH, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy(x, t):
    """A prediction that depends on the sample gently, and on the time."""
    return 0.5 * torch.tanh(x) + 0.1 * torch.sin(torch.as_tensor(t).float() / 100).view(-1, *(1,) * (x.ndim - 1))


def drawn_from(seed):
    return {"generator": torch.Generator().manual_seed(seed)}


def assert_close(found, expected, limit=1e-5):
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= limit, f"{difference:.3g}"


@functools.cache
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


@functools.cache
def transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def call_unet(x, t, inputs):
    return unet()(x, t, encoder_hidden_states=inputs.prompt_embeds, return_dict=False)[0]


def call_transformer(x, t, inputs):
    return transformer()(
        x, timestep=t.expand(x.shape[0]), encoder_hidden_states=inputs.prompt_embeds,
        pooled_projections=inputs.pooled, return_dict=False,
    )[0]  # fmt: skip


def prompts():
    """Inputs of the network, (with, without) the prompt."""
    return {"prompt_embeds": (noise(1, (BATCH, 5, 8)), noise(2, (BATCH, 5, 8))), "pooled": (noise(3, (BATCH, 8)),) * 2}


@torch.no_grad()
def denoise(network, scheduler, guider, steps=20, seed=0, calls=None, **options):
    """The loop of diffusers' modular pipelines, to the letter of what it calls."""
    scheduler.set_timesteps(steps)
    x = noise(seed) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        batches = guider.prepare_inputs(prompts())
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        for batch in batches:
            guider.prepare_models(None)
            batch.noise_pred = network(scaled, t, batch)
            guider.cleanup_models(None)
        if calls is not None:
            calls.append(len(batches))
        x = scheduler.step(guider(batches)[0], t, x, **options, return_dict=False)[0]
    return x


REAL = {"unet, ddim": (call_unet, "ddim"), "unet, euler": (call_unet, "euler"), "transformer": (call_transformer, "flow")}
each_model = pytest.mark.parametrize("model", REAL)


@each_model
@pytest.mark.parametrize("fused", [False, True])
def test_a_constant_omega_is_classifier_free_guidance(model, fused):
    """20 steps, seed for seed, w = 1 + omega; on diffusers' scheduler and on ours."""
    network, run = REAL[model]
    theirs, ours, _ = pair(run)
    expected = denoise(network, theirs, guiders.ClassifierFreeGuidance(guidance_scale=4.5))
    assert_close(denoise(network, ours if fused else theirs, LearnedGuidance(3.5)), expected)


@each_model
def test_guidance_of_each_sample(model):
    """Each sample as in a run at its own weight; diffusers' guider takes one weight for all."""
    network, run = REAL[model]
    scheduler, fused, _ = pair(run)
    omega = torch.tensor([0.5, 2.0, 4.0])
    found = denoise(network, fused, LearnedGuidance(omega), steps=5)
    for b, w in enumerate(1 + omega):
        expected = denoise(network, scheduler, guiders.ClassifierFreeGuidance(guidance_scale=float(w)), steps=5)
        assert_close(found[b], expected[b])
    with pytest.raises(ValueError):
        denoise(network, scheduler, guiders.ClassifierFreeGuidance(guidance_scale=1 + omega))


@each_run
def test_a_run_of_each_scheduler(run):
    """The same start, network and generator; after every step they differ by at most 1e-5 of the largest value."""
    theirs, ours, options = pair(run)
    draws = [drawn_from(7), drawn_from(7)] if run in STOCHASTIC else [{}, {}]
    samples = [noise(0) * float(getattr(theirs, "init_noise_sigma", 1.0))] * 2
    for t in theirs.timesteps:
        for n, one in enumerate((theirs, ours)):
            scaled = one.scale_model_input(samples[n], t) if hasattr(one, "scale_model_input") else samples[n]
            samples[n] = one.step(toy(scaled, t), t, samples[n], **options, **draws[n]).prev_sample
        assert_close(samples[1], samples[0])


@each_run
def test_guided_on_the_way(run):
    """Both predictions to the step, which guides them in its own pass."""
    _, one, options = pair(run)
    _, two, _ = pair(run)
    x, omega = noise(0), torch.tensor([0.5, 2.0, 4.0])
    draws = [drawn_from(7), drawn_from(7)]
    y = x
    for t in one.timesteps[:4]:
        predictions = toy(x, t), toy(x + 1, t)
        guided = lgd.guided_score(*predictions, omega)
        y = two.step(guided, t, y, **options, **draws[1]).prev_sample
        x = one.step(predictions[0], t, x, uncond=predictions[1], omega=omega, **options, **draws[0]).prev_sample
        assert_close(x, y)


@each_run
def test_timesteps_of_their_own(run):
    """A batch of which each sample is at a step of its own, against three runs of diffusers'; which takes no batch."""
    starts, count = [0, 5, 11], 6
    _, ours, options = pair(run)
    z = [noise(20 + i) for i in range(count)]
    x = noise(0)
    expected = []
    for b, start in enumerate(starts):
        theirs, _, _ = pair(run)
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(start)
        one = x[b : b + 1]
        for i in range(count):
            t = theirs.timesteps[start + i]
            scaled = theirs.scale_model_input(one, t) if hasattr(theirs, "scale_model_input") else one
            with fixed_noise(z[i][b : b + 1]):
                one = theirs.step(toy(scaled, t), t, one, **options).prev_sample
        expected.append(one)
    at = torch.tensor(starts)
    for i in range(count):
        t = ours.timesteps[at + i]
        x = ours.step(toy(ours.scale_model_input(x, t), t), t, x, **options, variance_noise=z[i]).prev_sample
    assert_close(x, torch.cat(expected))
    theirs, _, _ = pair(run)
    with pytest.raises(RuntimeError):
        theirs.step(x, theirs.timesteps[at], x, **options)


class fixed_noise:
    """diffusers' schedulers draw this, whatever they ask for."""

    def __init__(self, z):
        self.z = z

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for kind in (DDIM, FLOW, EULER, ANCESTRAL, DPM):
            module = __import__(getattr(diffusers, kind).__module__, fromlist=["randn_tensor"])
            self.patch.setattr(module, "randn_tensor", lambda *_, **__: self.z)

    def __exit__(self, *_):
        self.patch.undo()
