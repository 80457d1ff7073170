"""Test how LearnedScale follows a run: schedulers that do not count their steps, and pipelines that surprise."""

import copy
import gc
import inspect
import weakref

import pytest
import torch

import lgd_kernels as lgd

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import pipelines  # noqa: E402
from pipelines import STABLE  # noqa: E402
from test_diffusers_scale import CALLS, DDIM, distance, sampled, weight  # noqa: E402

from lgd_kernels.integrations.diffusers import FusedScheduler, LearnedScale  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def test_the_steps_are_noted_whatever_the_pipeline_does_between_them():
    ddim = diffusers.DDIMScheduler(**STABLE)
    scale = LearnedScale(lambda c, s, t: t, ddim)
    x = torch.ones(1, 1)
    for _ in range(2):
        ddim.set_timesteps(4)
        for t in ddim.timesteps:
            for _ in range(3):  # several products in a step
                assert (scale * x).item() == 1 + t.item()
            ddim.step(0 * x, t, x)
    for t in ddim.timesteps[2:]:  # again without set_timesteps, from the third step
        ddim.step(0 * x, t, x)
    assert (scale * x).item() == 1 + ddim.timesteps[0].item()
    ddim.set_timesteps(4)
    ddim.step(0 * x, ddim.timesteps[1], x)  # turned on later
    assert (scale * x).item() == 1 + ddim.timesteps[2].item()
    other = copy.deepcopy(ddim)
    other.set_timesteps(4)
    other.step(0 * x, 751, x)
    assert (scale * x).item() == 1 + ddim.timesteps[2].item()  # a copy notes its own
    parameters = inspect.signature(ddim.step).parameters
    assert list(parameters) == list(
        inspect.signature(diffusers.DDIMScheduler().step).parameters
    )  # pipelines look at it


def test_a_run_that_begins_elsewhere_raises_in_its_first_step():
    ddim = diffusers.DDIMScheduler(**STABLE)
    ddim.set_timesteps(4)
    scale, x = LearnedScale(1.5, ddim), torch.ones(1, 1)
    scale * x
    with pytest.raises(ValueError, match="begins at step 2 of 4, and omega was looked up at step 0.*FusedScheduler"):
        ddim.step(x, ddim.timesteps[2], x)
    ddim.step(x, ddim.timesteps[2], x)
    scale * x
    ddim.set_timesteps(4)
    ddim.step(x, ddim.timesteps[1], x)  # a run without the scale


def test_an_img2img_pipeline_that_shares_the_scheduler():
    pipe = pipelines.sd15(diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(DDIM.config)
    call = {"prompt": "a cat", "strength": 0.5, "image": torch.rand(1, 3, 8, 8), "num_inference_steps": 8}
    with pytest.raises(ValueError, match="begins at step 4 of 8"):
        sampled(pipe, call, "guidance_scale", LearnedScale(weight, pipe.scheduler, torch.ones(1)))
    sampled(pipe, call, "guidance_scale", LearnedScale(weight, pipe, torch.ones(1)))
    pipe.scheduler = FusedScheduler(pipe.scheduler)
    sampled(pipe, call, "guidance_scale", LearnedScale(weight, pipe.scheduler, torch.ones(1)))  # as the message says


def test_a_pipeline_with_two_products_in_a_step():
    pipe, call = pipelines.kandinsky3(), {"prompt": "a cat", "height": 16, "width": 16}
    plain = sampled(pipe, call, "guidance_scale", 2.5)
    assert distance(sampled(pipe, call, "guidance_scale", LearnedScale(2.5, pipe)), plain) <= 1e-5
    assert distance(sampled(pipe, call, "guidance_scale", 1.5), plain) > 1e-2


def test_a_scale_keeps_no_pipeline_alive_and_a_copy_serves_the_same_run():
    pipe = pipelines.sdxl()
    call, argument = CALLS["sdxl"][1:]
    scale = LearnedScale(1.5, pipe)
    first = sampled(pipe, call, argument, scale)
    assert torch.equal(sampled(pipe, call, argument, copy.deepcopy(scale)), first)
    network = weakref.ref(pipe.unet)
    del pipe, scale
    gc.collect()
    assert network() is None


@pytest.mark.parametrize(
    "kind, options",
    [
        ("EDMEulerScheduler", {}),
        ("IPNDMScheduler", {}),
        ("EulerDiscreteScheduler", {**STABLE, "timestep_type": "continuous"}),
    ],
)
def test_schedulers_with_timesteps_of_their_own_refuse_an_omega_of_indices(kind, options):
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(4)
    knots = torch.linspace(-1, 1000, 3)
    table = lgd.OmegaTable(torch.ones(1, 3, 3), knots, knots, schedule=lgd.Discrete.stable_diffusion())
    with pytest.raises(ValueError, match="omega was learned with times of Discrete.*has timesteps of its own"):
        LearnedScale(table, scheduler) * torch.ones(1, 1)
