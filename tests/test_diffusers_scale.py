"""Test LearnedScale in the classic pipelines of diffusers, on tiny random networks."""

import gc
import re
import warnings
from pathlib import Path

import pytest
import torch

import lgd_kernels as lgd

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import pipelines  # noqa: E402
from pipelines import STABLE  # noqa: E402
from tiny import below  # noqa: E402

from lgd_kernels.integrations.diffusers import FusedScheduler, LearnedGuidance, LearnedScale  # noqa: E402
from lgd_kernels.integrations.diffusers_plans import times_of  # noqa: E402
from lgd_kernels.integrations.diffusers_scale import APART, FROM_COND  # noqa: E402

STEPS, PROMPTS = 4, ["a cat", "dog"]
SMALL = {"height": 8, "width": 8}
CALLS = {  # pipeline, arguments of its call, the argument that guides
    "sd 1.5": (pipelines.sd15, {"prompt": PROMPTS, **SMALL}, "guidance_scale"),
    "sdxl": (pipelines.sdxl, {"prompt": PROMPTS, **SMALL}, "guidance_scale"),
    "sd3": (pipelines.sd3, {"prompt": PROMPTS, "height": 16, "width": 16}, "guidance_scale"),
    "flux": (
        pipelines.flux, {"prompt": PROMPTS, "negative_prompt": ["", ""], "height": 16, "width": 16}, "true_cfg_scale",
    ),
    "pixart": (
        pipelines.pixart,
        {"prompt": PROMPTS, **SMALL, "use_resolution_binning": False, "clean_caption": False},
        "guidance_scale",
    ),
    "dit": (pipelines.dit, {"class_labels": [1, 5]}, "guidance_scale"),
    "wan": (pipelines.wan, {"prompt": PROMPTS, "height": 16, "width": 16, "num_frames": 1}, "guidance_scale"),
}  # fmt: skip
EULER = diffusers.EulerDiscreteScheduler(**STABLE)
DDIM = diffusers.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


@torch.no_grad()
def sampled(pipe, call, argument, scale, **options):
    kind = "np" if isinstance(pipe, diffusers.DiTPipeline) else "latent"
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": STEPS, "output_type": kind, **call, argument: scale, **options}
    return torch.as_tensor(pipe(generator=generator, return_dict=False, **options)[0])


def distance(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def weight(c, s, t):
    """Depend on every argument, at times up to 1 and up to 1000."""
    return c * (0.5 + t / (t + 1)) + (t - s) / (t + 2)


def recorded(monkeypatch):
    """Record the weights of every product with a scale."""
    seen, weigh = [], LearnedScale._weight

    def recording(scale, x):
        found = weigh(scale, x)
        seen.append(found.flatten().clone())
        return found

    monkeypatch.setattr(LearnedScale, "_weight", recording)
    return seen


def expected_of(scheduler, condition, first=0):
    times = times_of(scheduler)[first:]
    return torch.stack([1 + weight(condition, s, t) for t, s in zip(times, below(times), strict=False)])


# By hand.


def flow(steps=4):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler


def test_a_scale_is_1_plus_omega_of_the_next_step_and_affine():
    scheduler = flow(50)
    scale = LearnedScale(lambda c, s, t: c * (t + s), scheduler, torch.tensor([1.0, 10.0]))
    x = torch.ones(2, 3)
    t, s = 1.0, scheduler.timesteps[1].item() / 1000
    w = torch.tensor([1 + (t + s), 1 + 10 * (t + s)])
    for found, expected in (
        (scale * x, w), (x * scale, w), (torch.mul(x, scale), w), (torch.mul(scale, x), w), (2 * x * scale, 2 * w),
        ((scale - 1) * x, w - 1), ((1 - scale) * x, 1 - w), ((1.0 + scale) * x, 1 + w), (x * (-scale / 2), -w / 2),
        ((1 + scale * 3) * x, 1 + 3 * w), (torch.lerp(x, 3 * x, scale), 1 + 2 * w),
        (x.lerp(3 * x, weight=scale), 1 + 2 * w),
    ):  # fmt: skip
        assert torch.allclose(found, expected[:, None].expand(2, 3), rtol=1e-6)
    scheduler.step(x, scheduler.timesteps[0], x)
    t, s = s, scheduler.timesteps[2].item() / 1000
    assert torch.allclose((scale * x)[:, 0], torch.tensor([1 + (t + s), 1 + 10 * (t + s)]))
    y = x.clone()
    y *= scale
    assert torch.equal(y, scale * x)


def test_comparisons_are_those_of_a_number_above_1():
    scale = LearnedScale(0.0, flow())
    assert scale > 1 and scale >= 1.0 and scale != 1.0 and not scale < 1 and not scale <= 1 and scale > 0
    assert max(scale, 1.0) is scale and scale - 1 > 0 and 0.1 * scale > 1 and 1 < scale and bool(scale)
    with pytest.warns(UserWarning, match=r"float\(scale\) is 2, which stands for every weight in comparisons"):
        assert float(scale) > 1
    assert "LearnedScale" in f"guidance_scale is {scale}" and repr(1 - scale).startswith("LearnedScale(0 + -1 omega")
    assert scale == scale and len({scale, scale}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_product_is_rounded_once(dtype):
    omega = torch.tensor([0.3, 1.7])
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = LearnedScale(omega, flow()) * x
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack([x[0] * (1 + omega[0].item()), x[1] * (1 + omega[1].item())]))


def test_omega_has_a_gradient_and_may_be_replaced():
    omega = torch.tensor([0.5, 2.0], requires_grad=True)
    scale = LearnedScale(omega, flow())
    (scale * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert torch.equal(omega.grad, torch.tensor([3.0, 7.0]))
    scale.omega = 4.0
    assert torch.equal(scale * torch.ones(1, 1), torch.tensor([[5.0]]))
    scale.omega, scale.condition = (lambda c, s, t: c), torch.tensor([7.0])
    assert torch.equal(scale * torch.ones(3, 1), torch.full((3, 1), 8.0))


# In pipelines.


@pytest.mark.parametrize("name", CALLS)
def test_a_constant_equals_guidance_scale_and_samples_have_their_own(name):
    make, call, argument = CALLS[name]
    pipe = make()
    plain = {omega: sampled(pipe, call, argument, 1.0 + omega) for omega in (1e-6, 1.5, 3.0)}
    assert distance(plain[1e-6], plain[3.0]) > 5e-3  # else agreement means nothing
    assert distance(sampled(pipe, call, argument, LearnedScale(1.5, pipe)), plain[1.5]) <= 1e-6
    mixed = sampled(pipe, call, argument, LearnedScale(torch.tensor([1e-6, 3.0]), pipe))
    assert distance(mixed[0], plain[1e-6][0]) <= 1e-6 and distance(mixed[1], plain[3.0][1]) <= 1e-6


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_omega_is_looked_up_at_the_times_of_every_step(name, fuse, monkeypatch):
    make, call, argument = CALLS[name]
    pipe = make()
    if fuse:
        pipe.scheduler = FusedScheduler(pipe.scheduler)
    condition, seen = torch.tensor([0.25, 1.0]), recorded(monkeypatch)
    scale = LearnedScale(weight, pipe, condition)
    for _ in range(2):  # a scale serves several runs
        seen.clear()
        sampled(pipe, call, argument, scale)
        assert torch.allclose(torch.stack(seen), expected_of(pipe.scheduler, condition), rtol=1e-5)


def scale_by_step(pipe, omega, condition, first=0):
    """Return a first guidance_scale, and a callback that sets the guidance_scale of each later step: one sample."""
    pipe.scheduler.set_timesteps(8)
    times = times_of(pipe.scheduler)[first:]
    ends = below(times)

    def at(step):
        return 1 + float(omega(condition, ends[step], times[step]))

    def callback(pipe, step, t, kwargs):
        if step + 2 < len(times):
            pipe._guidance_scale = at(step + 1)
        return kwargs

    return at(0), {"callback_on_step_end": callback}


SCHEDULERS = {
    "ddim": DDIM,
    "ddpm": diffusers.DDPMScheduler(**STABLE, clip_sample=False),
    "pndm": diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1),
    "euler": EULER,
    "heun": diffusers.HeunDiscreteScheduler(**STABLE),
    "unipc": diffusers.UniPCMultistepScheduler(**STABLE),
    "fused": FusedScheduler(DDIM),
}
PARTS = {  # pipeline, arguments, the first step of 8
    "all": (diffusers.StableDiffusionPipeline, SMALL, 0),
    "img2img": (diffusers.StableDiffusionImg2ImgPipeline, {"strength": 0.5}, 4),
    "inpaint": (diffusers.StableDiffusionInpaintPipeline, {**SMALL, "strength": 0.75}, 2),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("part", PARTS)
def test_schedulers_with_and_without_a_count_of_steps_and_runs_that_begin_in_the_middle(part, scheduler):
    kind, call, first = PARTS[part]
    pipe = pipelines.sd15(kind)
    pipe.scheduler = SCHEDULERS[scheduler]
    call = dict(call, prompt="a cat")
    if part != "all":
        call["image"] = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    if part == "inpaint":
        call["mask_image"] = torch.ones(1, 1, 8, 8)
    condition = torch.tensor([1.5])
    found = sampled(pipe, call, "guidance_scale", LearnedScale(weight, pipe, condition), num_inference_steps=8)
    first *= getattr(pipe.scheduler, "order", 1)
    start, options = scale_by_step(pipe, weight, condition, first)
    expected = sampled(pipe, call, "guidance_scale", start, num_inference_steps=8, **options)
    assert distance(found, expected) <= 1e-5
    assert distance(sampled(pipe, call, "guidance_scale", 1.1, num_inference_steps=8), expected) > 1e-3


@pytest.mark.parametrize("name", ["sd 1.5", "sdxl", "sd3"])
def test_images_of_a_prompt_share_its_condition(name):
    make, call, argument = CALLS[name]
    pipe = make()
    condition = torch.tensor([0.1, 1.5])
    found = sampled(pipe, call, argument, LearnedScale(weight, pipe, condition), num_images_per_prompt=2)
    each = LearnedScale(weight, pipe, condition.repeat_interleave(2))
    assert torch.equal(found, sampled(pipe, call, argument, each, num_images_per_prompt=2))
    labels = torch.tensor([2, 0])
    knots = torch.linspace(-1, 1000, 3)
    table = lgd.OmegaTable(torch.tensor([0.1, 9.0, 1.5])[:, None, None].expand(3, 3, 3).contiguous(), knots, knots)
    constants = torch.tensor([1.5, 0.1])
    found = sampled(pipe, call, argument, LearnedScale(table, pipe, labels))
    assert distance(found, sampled(pipe, call, argument, LearnedScale(constants, pipe))) <= 1e-5


def test_half_precision_stays_half():
    pipe = pipelines.sdxl().to(torch.bfloat16)
    call, argument = CALLS["sdxl"][1:]
    found = sampled(pipe, call, argument, LearnedScale(1.5, pipe))
    assert found.dtype == torch.bfloat16 and distance(found.float(), sampled(pipe, call, argument, 2.5).float()) <= 1e-6


# Pipelines that compute something else.


def test_the_pipelines_that_count_from_the_conditional_prediction_are_those_of_diffusers():
    """Read diffusers' sources, so that a new pipeline with the other formula is found."""
    names = r"(?:self\.)?\w*guidance_scale"
    formula = re.compile(rf"=\s*(\w+)\s*\+\s*{names}\s*\*\s*\(\s*(\w+)\s*-\s*\w+")
    other = re.compile(rf"\({names} \+ 1\.?0?\)\s*\*")
    found = set()
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        source = path.read_text()
        if other.search(source) or any(start == end for start, end in formula.findall(source)):
            found |= set(re.findall(r"^class (\w+Pipeline)\b", source, re.M))
    assert len(found) > 10
    assert all(name.startswith(FROM_COND + APART) for name in found), found
    known = [name for name in dir(diffusers) if name.endswith("Pipeline") and name.startswith(FROM_COND + APART)]
    assert set(known) <= found | {name for name in known if "Modular" in name or "AutoBlocks" in name}


def test_a_pipeline_that_counts_from_the_conditional_prediction():
    class Cosmos2TextToImagePipeline:
        scheduler = flow()

    scale = LearnedScale(1.5, Cosmos2TextToImagePipeline())
    assert torch.equal(scale * torch.ones(1, 1), torch.tensor([[1.5]])) and scale > 1
    assert torch.equal(LearnedScale(1.5, flow(), base=0) * torch.ones(1, 1), torch.tensor([[1.5]]))


def test_distilled_pipelines_are_refused_by_name():
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes guidance_scale as one number"):
        LearnedScale(1.0, pipelines.sd15(time_cond_proj_dim=8))

    class ZImagePipeline:
        scheduler = flow()

    with pytest.raises(ValueError, match="ZImagePipeline guides the samples of a batch one by one.*modular"):
        LearnedScale(1.0, ZImagePipeline())
    pipe = pipelines.flux(guidance=True)
    call = CALLS["flux"][1]
    scale = LearnedScale(1.5, pipe)
    with pytest.raises(TypeError, match="torch.full takes guidance_scale as one number.*pass LearnedScale there"):
        sampled(pipe, call, "guidance_scale", scale)
    plain = sampled(pipe, call, "true_cfg_scale", 2.5)
    assert distance(sampled(pipe, call, "true_cfg_scale", scale), plain) <= 1e-6  # what the message says
    with pytest.raises(TypeError, match="FluxPipeline takes guidance_scale as one number"):
        torch.tensor([scale], dtype=torch.float32)


def test_a_run_without_a_lookup_warns():
    pipe = pipelines.flux()
    call = {name: value for name, value in CALLS["flux"][1].items() if name != "negative_prompt"}
    with pytest.warns(UserWarning, match="never looked up.*negative prompt.*true_cfg_scale"):
        sampled(pipe, call, "true_cfg_scale", LearnedScale(1.5, pipe))
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unused = LearnedScale(1.5, pipe)
        sampled(pipe, CALLS["flux"][1], "true_cfg_scale", 2.5)  # another one's run
        del unused
        gc.collect()


# Refusals.


def test_refusals():
    scale = LearnedScale(1.5, flow())
    x = torch.ones(2, 3)
    for function in (
        lambda: x + scale, lambda: scale + x, lambda: x - scale, lambda: x / scale, lambda: scale / x,
        lambda: x > scale, lambda: torch.sub(x, x, alpha=scale), lambda: torch.add(x, scale), lambda: scale * "x",
        lambda: scale > None,
    ):  # fmt: skip
        with pytest.raises(TypeError, match="LearnedScale: .* is not defined, expected a product with a tensor"):
            function()
    with pytest.raises(ValueError, match="multiplied by a single number"):
        scale * torch.ones(())
    with pytest.raises(TypeError, match="`omega` is a str, expected a number, a tensor"):
        LearnedScale("2", flow())
    with pytest.raises(TypeError, match="`condition` is a list, expected a tensor"):
        LearnedScale(1.0, flow(), [1, 2])
    with pytest.raises(TypeError, match="`scheduler` is a dict, expected a pipeline"):
        LearnedScale(1.0, {})
    with pytest.raises(ValueError, match="LearnedScale: `condition` has 3 entries for a batch of 2"):
        LearnedScale(lambda c, s, t: t, flow(), torch.ones(3)) * x
    with pytest.raises(ValueError, match=r"LearnedScale: `omega` returned \[1\], expected a tensor \[8\]"):
        LearnedScale(lambda c, s, t: t[:1], flow()) * x


def test_a_scheduler_that_does_not_sample_is_found():
    pipe = pipelines.sdxl()
    call, argument = CALLS["sdxl"][1:]
    stale = LearnedScale(1.5, pipe.scheduler)
    pipe.scheduler = FusedScheduler(pipe.scheduler)  # steps the old one's tables, not its count
    with pytest.raises(ValueError, match="EulerDiscreteScheduler, stands at step 0 after 4 lookups.*pass the pipeline"):
        sampled(pipe, call, argument, stale)
    unset = LearnedScale(1.5, diffusers.EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="set_timesteps was never called"):
        unset * torch.ones(1, 1)


def test_an_omega_of_other_times_is_refused():
    knots = torch.linspace(0, 1, 3)
    table = lgd.OmegaTable(torch.ones(1, 3, 3), knots, knots, schedule=lgd.RectifiedFlow())
    assert torch.equal(LearnedScale(table, flow()) * torch.ones(1, 1), torch.tensor([[2.0]]))
    indices = diffusers.DDIMScheduler()
    indices.set_timesteps(4)
    with pytest.raises(
        ValueError, match="LearnedScale: omega was learned with times of RectifiedFlow, but this DDIM.*indices"
    ):
        LearnedScale(table, indices) * torch.ones(1, 1)
    guider = LearnedGuidance(table, scheduler=indices)
    guider.set_state(0, 4, indices.timesteps[0])
    with pytest.raises(ValueError, match="LearnedGuidance: omega was learned with times of RectifiedFlow"):
        guider.forward(torch.ones(1, 1), torch.zeros(1, 1))
    sigmas = lgd.OmegaTable(torch.ones(1, 3, 3), knots, knots, schedule=lgd.EDM())
    with pytest.raises(ValueError, match=r"times of EDM, but this FlowMatch.* has t in \[0, 1\]"):
        LearnedScale(sigmas, flow()) * torch.ones(1, 1)
