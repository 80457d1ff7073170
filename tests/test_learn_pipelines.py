"""Test the frozen network of a pipeline of diffusers against the pipeline itself, and three ways to sample alike."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lgd_kernels.learn import Settings, Trainer
from lgd_kernels.omega.files import load, save
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.sampling.schedules import Discrete, RectifiedFlow

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import pipelines  # noqa: E402
from pipelines import STABLE  # noqa: E402

from lgd_kernels.integrations.diffusers import FusedScheduler, LearnedGuidance, LearnedScale  # noqa: E402
from lgd_kernels.learn import diffusers as learning  # noqa: E402

STEPS, PROMPTS, TOLERANCE = 5, ["a cat", "dog"], 2e-6
DDIM = diffusers.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
EULER = diffusers.EulerDiscreteScheduler(**STABLE, timestep_spacing="leading", steps_offset=1)  # times are integers
FAMILIES = {  # pipeline, its scheduler, arguments of its call, the argument that guides
    "sd 1.5": (pipelines.sd15, DDIM, {"height": 8, "width": 8}, "guidance_scale"),
    "sdxl": (pipelines.sdxl, EULER, {"height": 8, "width": 8}, "guidance_scale"),
    "sd3": (pipelines.sd3, None, {"height": 8, "width": 8}, "guidance_scale"),
    "flux": (
        pipelines.flux,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"height": 16, "width": 16, "negative_prompt": ["", ""]},
        "true_cfg_scale",
    ),
    "pixart": (
        pipelines.pixart,
        None,
        {"height": 8, "width": 8, "use_resolution_binning": False, "clean_caption": False},
        "guidance_scale",
    ),
}


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def made(name):
    make, scheduler, call, argument = FAMILIES[name]
    pipe = make()
    if scheduler is not None:
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
    return pipe, call, argument


def distance(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def x_of(name, pipe):
    """Return noise as the network takes it, and as the pipeline does."""
    side = 16 if name == "flux" else 8
    x = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
    return x, pipe._pack_latents(x, 2, 4, side, side) if name == "flux" else x


def by_pipeline(name, pipe, call, argument, scale):
    x = x_of(name, pipe)[1]
    with torch.no_grad():
        found = pipe(
            PROMPTS, latents=x, num_inference_steps=STEPS, output_type="latent", return_dict=False,
            **call, **{argument: scale},
        )[0]  # fmt: skip
    return pipe._unpack_latents(found, 16, 16, 1) if name == "flux" else found


@torch.no_grad()
def by_hand(name, pipe, frozen, c, step):
    """Sample with the frozen network alone: `step(scheduler, i, t, x, cond, uncond) -> x`."""
    scheduler = pipe.scheduler
    sigmas = {"sigmas": np.linspace(1.0, 1 / STEPS, STEPS)} if name == "flux" else {"num_inference_steps": STEPS}
    scheduler.set_timesteps(**sigmas)
    x = x_of(name, pipe)[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        time = t.long() if isinstance(frozen.schedule, Discrete) else t / 1000
        x = step(scheduler, i, t, x, *frozen.predict(scaled, time.expand(2), c))
    return x


def network_of(frozen, c, folder):
    """Learn for a few updates, then stretch the network so that omega depends on c, s and t; saved and loaded again."""
    torch.manual_seed(0)
    network = OmegaNetwork(frozen.schedule, embedding=c.shape[1])
    x0 = torch.randn(8, 4, 8, 8)
    trainer = Trainer(network, frozen, (x0, c[torch.arange(8) % 2]), Settings(batch=2, particles=2))
    trainer.train(2)
    network.head[-1].weight.data.mul_(10)
    network.condition[-1].weight.data.mul_(5)
    save(folder / "omega.safetensors", network, frozen.schedule, frozen.prediction)
    return load(folder / "omega.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_learned_saved_and_loaded_omega_gives_the_same_samples_in_three_ways(name, tmp_path):
    pipe, call, argument = made(name)
    frozen = learning.frozen_of(pipe, chunk=3)
    c = frozen.denoiser.condition(PROMPTS)
    assert torch.equal(c, learning.condition_of(pipe, PROMPTS)) and c.dtype == torch.float32
    half = frozen.schedule.from_unit(torch.full((2,), 0.5))
    cond, uncond = frozen.predict(x_of(name, pipe)[0], half, c)
    assert (cond - uncond).norm() >= 0.1 * cond.norm()

    def guided(scale):
        return by_pipeline(name, pipe, call, argument, scale)

    assert distance(guided(LearnedScale(1e-6, pipe)), guided(LearnedScale(3.0, pipe))) >= 100 * TOLERANCE
    omega = network_of(frozen, c, tmp_path)
    first = guided(LearnedScale(omega, pipe, c))
    assert distance(guided(LearnedScale(omega, pipe, c.flip(0))), first) >= 10 * TOLERANCE  # omega depends on c

    guider = LearnedGuidance(omega, scheduler=pipe)
    guider.condition_value = c

    def by_guider(scheduler, i, t, x, cond, uncond):
        guider.set_state(i, STEPS, t)
        return scheduler.step(guider.forward(cond, uncond).pred, t, x, return_dict=False)[0]

    assert distance(by_hand(name, pipe, frozen, c, by_guider), first) <= TOLERANCE
    pipe.scheduler = FusedScheduler(pipe.scheduler)
    assert distance(guided(LearnedScale(omega, pipe, c)), first) <= TOLERANCE
    scale = LearnedScale(omega, pipe, c)

    def fused(scheduler, i, t, x, cond, uncond):
        weights = (scale * torch.ones(2, 1))[:, 0] - 1
        return scheduler.step(cond, t, x, uncond=uncond, omega=weights, return_dict=False)[0]

    assert distance(by_hand(name, pipe, frozen, c, fused), first) <= TOLERANCE


def test_class_labels():
    pipe = pipelines.dit()
    frozen = learning.frozen_of(pipe)
    assert isinstance(frozen.schedule, Discrete) and frozen.prediction == "eps" and frozen.null == 1000
    omega = OmegaNetwork(frozen.schedule, classes=1000)
    labels = torch.tensor([1, 5])
    scale, x = LearnedScale(omega, pipe, labels), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe(labels.tolist(), generator=torch.Generator().manual_seed(0), num_inference_steps=4,
                        guidance_scale=scale, output_type="np", return_dict=False)[0]  # fmt: skip
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            cond, uncond = frozen.predict(x, t.expand(2), labels)
            x = pipe.scheduler.step(uncond + scale * (cond - uncond), t, x, return_dict=False)[0]
        images = (learning.images_of(pipe, x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert distance(images, torch.as_tensor(expected)) <= TOLERANCE
    with pytest.raises(ValueError, match="DiTPipeline takes class labels, not prompts"):
        frozen.denoiser.condition(["a cat"])


# What the network gets.


def test_what_means_none():
    frozen = learning.frozen_of(pipelines.sdxl())
    assert not frozen.null.any()  # the pipeline's configuration: zeros for the empty prompt
    c = frozen.denoiser.condition(["", "a cat"])
    assert c.any() and frozen.denoiser.prompts_of(torch.stack((frozen.null, c[0], c[1]))) == ["", "", "a cat"]
    named = learning.frozen_of(pipelines.sdxl(), negative_prompt="a cat")
    assert torch.equal(named.null, c[1])
    frozen = learning.frozen_of(pipelines.sd15())
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    cond, uncond = frozen.predict(x, t, frozen.denoiser.condition([""]))  # an empty caption
    assert torch.equal(cond, uncond)


def test_prompts_with_the_same_pooled_embedding_stay_apart():
    pipe = pipelines.sd15()
    denoiser = learning.PipelineDenoiser(pipe)
    long = "a b c d e f g h i j k l m n o p q"  # cut to the tokenizer's 16 tokens
    c = denoiser.condition([long, long + " r", long])
    assert torch.equal(c[0], c[2]) and not torch.equal(c[0], c[1]) and torch.allclose(c[0], c[1], rtol=1e-5)
    assert denoiser.prompts_of(c) == [long, long + " r", long]


def test_prompts_are_encoded_again_when_few_are_kept(monkeypatch):
    frozen = learning.frozen_of(pipelines.sd3())
    c = frozen.denoiser.condition(["a", "b", "c", "d"])
    x, t = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    whole = frozen.predict(x, t, c)
    monkeypatch.setattr(learning, "KEPT", 1)
    few = learning.frozen_of(pipelines.sd3(), chunk=1)
    few.denoiser.condition(["a", "b", "c", "d"])
    again = few.predict(x, t, c)
    assert (
        len(few.denoiser._recent) == 1 and distance(again[0], whole[0]) < 1e-5 and distance(again[1], whole[1]) < 1e-5
    )


def test_weights_in_half():
    pipe = pipelines.sdxl().to(torch.bfloat16)
    frozen = learning.frozen_of(pipe)
    cond, _ = frozen.predict(torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), frozen.denoiser.condition(PROMPTS))
    assert cond.dtype == torch.bfloat16 and frozen.denoiser.condition(PROMPTS).dtype == torch.float32


@pytest.mark.parametrize(
    "scheduler, schedule, prediction",
    [
        (diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"), Discrete, "v"),
        (diffusers.DDPMScheduler(prediction_type="sample"), Discrete, "x0"),
        (diffusers.UniPCMultistepScheduler(), Discrete, "eps"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), RectifiedFlow, "flow"),
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            RectifiedFlow,
            "flow",
        ),
    ],
)
def test_schedule_and_prediction_are_those_of_the_configuration(scheduler, schedule, prediction):
    found, predicts = learning.schedule_of(scheduler)
    assert isinstance(found, schedule) and predicts == prediction
    if schedule is Discrete:
        assert torch.equal(found.alphas_cumprod.float(), scheduler.alphas_cumprod)


def test_refused_pipelines():
    with pytest.raises(ValueError, match="guidance-distilled"):
        learning.frozen_of(pipelines.sd15(time_cond_proj_dim=8))
    with pytest.raises(ValueError, match="takes 9 channels and the VAE makes 4.*inpainting"):
        learning.frozen_of(pipelines.sd15(in_channels=9))
    with pytest.raises(ValueError, match="`pipe` is a WanPipeline, whose network is none of UNet2D.*--model"):
        learning.frozen_of(pipelines.wan())
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        learning.schedule_of(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="EulerDiscreteScheduler with .* and continuous timesteps"):
        learning.schedule_of(diffusers.EulerDiscreteScheduler(timestep_type="continuous"))
    with pytest.raises(ValueError, match="`chunk` is 0, expected"):
        learning.frozen_of(pipelines.sd15(), chunk=0)
    pipe = pipelines.sd15()
    pipe.unet.train()
    with pytest.raises(ValueError, match=r"`pipe.unet` is in training mode.*pipe.unet.eval\(\)"):
        learning.frozen_of(pipe)
    frozen = learning.frozen_of(pipelines.sd15())
    with pytest.raises(ValueError, match=r"1 of 1 rows of `c` are of no prompt.*denoiser.condition\(prompts\)"):
        frozen.denoiser(torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 8))
    with pytest.raises(TypeError, match="a prompt is a int, expected a text"):
        frozen.denoiser.condition([3])


# Latents.


def test_latents_are_shifted_and_scaled_and_decoded_again():
    vae = pipelines.vae(scaling_factor=0.5, shift_factor=0.25)
    pipe, images = SimpleNamespace(vae=vae), torch.rand(5, 3, 8, 8) * 2 - 1
    found = learning.latents_of(pipe, images, chunk=2)
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        assert torch.allclose(found, (mode - 0.25) * 0.5, atol=1e-6)
        assert torch.allclose(learning.images_of(pipe, found), vae.decode(mode).sample, atol=1e-5)


def test_a_pipeline_without_a_vae():
    pipe = pipelines.sd15(in_channels=3, out_channels=3)
    pipe.vae = None
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(learning.latents_of(pipe, images), images)  # works on pixels
    pipe = pipelines.sd15()
    pipe.vae = None
    with pytest.raises(ValueError, match="has no VAE, and its network takes 4 channels, not the 3.*with its vae"):
        learning.latents_of(pipe, images)
