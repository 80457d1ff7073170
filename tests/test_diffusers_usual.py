"""Compare FusedScheduler with diffusers in the usual configurations: whole runs, runs that begin later, pipelines."""

import functools

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from tiny import RUNS, STABLE, USUAL, assert_close, draws, noise, pair  # noqa: E402

from lgd_kernels.integrations.diffusers import FusedScheduler  # noqa: E402

each_run = pytest.mark.parametrize("run", RUNS)


WIDE = (tiny.SINGLE, tiny.UNIPC, tiny.DEIS, "HeunDiscreteScheduler")  # with steps in the dtype of the sample


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def compare(run, pair, begin=0, named=True, steps=None, limit=1e-5, dtype=torch.float32):
    """Compare every step of a run, and the state of its generator after it."""
    limit = tiny.ROUGH.get(run, limit) if dtype == torch.float32 else limit
    theirs, ours, options = pair
    assert ours.order == theirs.order and torch.equal(ours.timesteps, theirs.timesteps)
    assert getattr(ours, "init_noise_sigma", None) == getattr(theirs, "init_noise_sigma", None)
    begin *= ours.order
    samples = [noise(0).to(dtype) * float(getattr(theirs, "init_noise_sigma", 1.0))] * 2
    drawn = [draws(run), draws(run)]
    if begin and named:
        for one in (theirs, ours):
            if hasattr(one, "set_begin_index"):
                one.set_begin_index(begin)
    for t in theirs.timesteps[begin:steps]:
        for n, one in enumerate((theirs, ours)):
            scaled = one.scale_model_input(samples[n], t) if hasattr(one, "scale_model_input") else samples[n]
            samples[n] = one.step(tiny.toy(scaled, t), t, samples[n], **options, **drawn[n]).prev_sample
        assert_close(samples[1], samples[0], limit)
    states = [one["generator"].get_state() for one in drawn if one]
    assert all(torch.equal(one, states[0]) for one in states)
    assert ours.step_index == len(theirs.timesteps[:steps])


@each_run
def test_a_whole_run(run):
    """Compare with the same start, network and generator; after every step at most 1e-5 of the largest value."""
    compare(run, pair(run))


@pytest.mark.parametrize("run", [run for run, (kind, *_) in RUNS.items() if kind in WIDE])
@pytest.mark.parametrize("begin", [0, 2])
def test_a_run_in_float64(run, begin):
    """Compare to the last digits, with the same sigmas in float64, where diffusers does not round them to float32."""
    theirs, ours, options = pair(run)
    theirs.sigmas = theirs.sigmas.double()
    compare(run, (theirs, ours, options), begin, limit=1e-12, dtype=torch.float64)


@each_run
@pytest.mark.parametrize("begin", [1, 2, 9])
def test_a_run_that_begins_later(run, begin):
    """Begin as image-to-image does: solvers have no history there."""
    compare(run, pair(run), begin, steps=-6)


@pytest.mark.parametrize("run", USUAL)
def test_a_run_that_begins_at_a_timestep(run):
    """Begin at a timestep in the middle, without `set_begin_index`."""
    compare(run, pair(run), 7, named=False, steps=-8)


@pytest.mark.parametrize("run", [run for run in RUNS if "tcd" not in run and "lcm" not in run])
def test_runs_of_other_lengths(run):
    """Compare short runs, whose last steps may be of lower order, and a longer one. In few steps diffusers divides
    differences by a small sigma in float32."""
    for steps in (1, 2, 3, 4, 9, 40):
        if steps > 1 or "singlestep" not in run:
            compare(run, pair(run, steps), limit=1e-4)
    if "singlestep" in run:
        compare(run, pair(run, 7))


@pytest.mark.parametrize("run", ["lcm", "tcd", "tcd gamma"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 1},
        {"num_inference_steps": 4},
        {"num_inference_steps": 4, "original_inference_steps": 100, "strength": 0.5},
        {"timesteps": [999, 759, 499, 259], "strength": 0.75},
    ],
    ids=str,
)
def test_timesteps_of_distilled_models(run, options):
    """Compare the timesteps of a distillation, also where a run is shortened by `strength`."""
    theirs, ours, step = pair(run)
    for one in (theirs, ours):
        one.set_timesteps(**options)
    compare(run, (theirs, ours, step))


def test_what_lcm_returns():
    """Check the denoised sample, which the pipeline of LCM takes as its result."""
    theirs, ours, _ = pair("lcm")
    for t in theirs.timesteps[:2]:
        expected, found = (one.step(noise(1), t, noise(0), **draws("lcm")) for one in (theirs, ours))
        assert_close(found.denoised, expected.denoised)
        assert_close(found.prev_sample, expected.prev_sample)
    t, drawn = theirs.timesteps[2], draws("lcm")
    _, denoised = ours.step(noise(1), t, noise(0), **drawn, return_dict=False)
    assert_close(denoised, theirs.step(noise(1), t, noise(0), **draws("lcm")).denoised)


def test_the_eta_of_each_scheduler():
    """Check the default: none is 0 in DDIM and 0.3 in TCD, where it is gamma."""
    for run, eta in (("ddim", 0.0), ("tcd", 0.3)):
        ends = []
        for options in ({}, {"eta": eta}, {"eta": 0.8}):
            _, ours, _ = pair(run)
            t = ours.timesteps[0]
            ends.append(ours.step(noise(1), t, noise(0), **options, **draws(run)).prev_sample)
        assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("run", ["lcm", "flow stochastic", "2m sde", "ddpm"])
def test_noise_in_half_precision(run):
    """Check that noise has diffusers' dtype: other numbers would come from the same generator."""
    theirs, ours, options = pair(run)
    t, (x, g) = theirs.timesteps[3], (noise(seed).bfloat16() for seed in (0, 1))
    expected, found = (one.step(g, t, x, **options, **draws(run)).prev_sample for one in (theirs, ours))
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected.float(), 2**-6)


def test_a_call_of_heun_that_begins_nothing():
    _, ours, _ = pair("heun")
    ours.set_begin_index(3)
    with pytest.raises(
        ValueError, match=r"call 3 is the second of a step .*; set_timesteps\(n\), then set_begin_index\(2\)"
    ):
        ours.step(noise(0), ours.timesteps[3], noise(0))
    ours.set_timesteps(20)
    ours.set_begin_index(2)
    ours.step(noise(0), ours.timesteps[2], noise(0))


@pytest.mark.parametrize("run", ["heun", "pndm"])
def test_timesteps_that_name_two_calls(run):
    _, ours, _ = pair(run)
    with pytest.raises(ValueError, match=r"`timestep` is \[B\], but this run has timesteps twice"):
        ours.step(noise(0), ours.timesteps[: tiny.BATCH], noise(0))


def test_runs_whose_sigmas_repeat():
    """Check that a multistep method refuses them, where diffusers returns NaN."""
    for kind in ("LMSDiscreteScheduler", "UniPCMultistepScheduler"):

        class Repeating(getattr(diffusers, kind)):
            def set_timesteps(self, *args, **options):
                super().set_timesteps(*args, **options)
                if len(self.timesteps) < 10:
                    self.sigmas[3] = self.sigmas[2]

        with pytest.raises(ValueError, match=f"run of {kind} is refused: .*two sigmas of the run are equal"):
            FusedScheduler(Repeating()).set_timesteps(8)


def test_settings_that_a_pipeline_mends():
    """Check that the scheduler has the settings with which a pipeline replaces an old configuration."""
    ours = FusedScheduler(diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True))
    for one in (ours, ours.inner):
        assert one.config.steps_offset == 0
    ours._internal_dict = diffusers.configuration_utils.FrozenDict(dict(ours.config) | {"steps_offset": 1})
    ours.set_timesteps(4)
    assert ours.config.steps_offset == ours.inner.config.steps_offset == 1 and ours.timesteps[-1] == 1
    with pytest.raises(ValueError, match=r"skip_prk_steps=False, expected True: PNDM.*\(scheduler.config, skip_prk_s"):
        ours._internal_dict = diffusers.configuration_utils.FrozenDict(dict(ours.config) | {"skip_prk_steps": False})
    assert ours.config.skip_prk_steps and ours.inner.config.skip_prk_steps
    assert ours.compatibles == ours.inner.compatibles


@functools.cache
def vae():
    torch.manual_seed(0)
    options = {"block_out_channels": (4,), "norm_num_groups": 4, "latent_channels": 4, "shift_factor": 0.0}
    return diffusers.AutoencoderKL(**options).eval()


@functools.cache
def parts():
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return {"vae": vae(), "unet": tiny.unet(), "requires_safety_checker": False} | dict.fromkeys(names)


def images(task, scheduler):
    """Run a Stable Diffusion pipeline: text to image, image to image, or inpainting."""
    image, mask = noise(4, (1, 3, 8, 8)).sigmoid(), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    inputs = {
        "": {"height": 8, "width": 8},
        "Img2Img": {"image": image, "strength": 0.6},
        "Inpaint": {"image": image, "mask_image": mask, "strength": 0.8, "height": 8, "width": 8},
    }[task]
    pipe = getattr(diffusers, f"StableDiffusion{task}Pipeline")(**parts(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": noise(1, (1, 5, 8)), "negative_prompt_embeds": noise(2, (1, 5, 8))}
    options = {"num_inference_steps": 6, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(**prompts, **inputs, **options).images


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
@pytest.mark.parametrize(
    "run", [run for run, (_, settings, *_) in USUAL.items() if settings in (STABLE, tiny.PLAIN)] + ["pndm"]
)
def test_pipelines(run, task):
    pytest.importorskip("transformers")
    kind, settings, _ = RUNS[run]
    offset = {} if kind == "FlowMatchEulerDiscreteScheduler" else {"steps_offset": 1}
    make = functools.partial(getattr(diffusers, kind), **settings, **offset)
    assert_close(images(task, FusedScheduler(make())), images(task, make()))


def sd3(scheduler):
    names = [name + n for n in ("", "_2", "_3") for name in ("text_encoder", "tokenizer")]
    model = {"transformer": tiny.transformer(), "vae": vae()} | dict.fromkeys(names)
    inputs = {"pooled_prompt_embeds": noise(3, (1, 8)), "negative_pooled_prompt_embeds": noise(4, (1, 8))}
    return diffusers.StableDiffusion3Pipeline(**model, scheduler=scheduler), inputs | {"height": 8, "width": 8}


def wan(scheduler):
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1
    ).eval()
    frames = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    none = dict.fromkeys(("text_encoder", "tokenizer"))
    pipe = diffusers.WanPipeline(transformer=transformer, vae=frames, scheduler=scheduler, **none)
    return pipe, {"height": 16, "width": 16, "num_frames": 5}


def lcm(scheduler):
    model = parts() | {"unet": tiny.unet(time_cond_proj_dim=8)}
    inputs = {"height": 8, "width": 8, "original_inference_steps": 50}
    return diffusers.LatentConsistencyModelPipeline(**model, scheduler=scheduler), inputs


@pytest.mark.parametrize("run, make", [("flow heun", sd3), ("unipc flow", wan), ("lcm", lcm)])
def test_pipelines_of_other_models(run, make):
    pytest.importorskip("transformers")
    kind, settings, _ = RUNS[run]
    found = []
    for wrap in (FusedScheduler, lambda scheduler: scheduler):
        pipe, inputs = make(wrap(getattr(diffusers, kind)(**settings)))
        pipe.set_progress_bar_config(disable=True)
        inputs["prompt_embeds"] = noise(1, (1, 5, 8))
        if make is not lcm:
            inputs["negative_prompt_embeds"] = noise(2, (1, 5, 8))
        options = {"num_inference_steps": 6, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        found.append(pipe(**inputs, **options)[0])
    assert_close(*found)
