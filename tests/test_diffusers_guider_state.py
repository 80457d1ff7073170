"""Test what LearnedGuidance keeps between steps and runs: the scheduler, the samples, the grad mode, and its scale."""

from types import SimpleNamespace

import pytest
import torch

import lgd_kernels as lgd

diffusers = pytest.importorskip("diffusers")
guiders = pytest.importorskip("diffusers.guiders")

from tiny import BATCH, STABLE, assert_close, below, call_unet, denoise, noise, pair, prompts, sdxl_unet  # noqa: E402

from lgd_kernels.integrations import diffusers as module  # noqa: E402
from lgd_kernels.integrations.diffusers import FusedScheduler, LearnedGuidance  # noqa: E402
from lgd_kernels.integrations.diffusers_plans import times_of  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def weight(c, s, t):
    return (t - s) / 100 + t / 1000


def run_of(guider, scheduler, steps=None):
    """Return omega at every step of a run, from predictions 1 and 0; steps are counted as in a pipeline."""
    timesteps = scheduler.timesteps if steps is None else scheduler.timesteps[steps]
    found = []
    for step, t in enumerate(timesteps):
        guider.set_state(step, len(timesteps), t)
        found.append(guider.forward(torch.ones(2, 1), torch.zeros(2, 1)).pred[0, 0] - 1)
    return torch.stack(found)


def expected_of(scheduler, steps=slice(None)):
    times = times_of(scheduler)
    return weight(None, below(times), times[:-1])[steps]


def made(kind, steps=None, **options):
    scheduler = getattr(diffusers, kind)(**options)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


DDIM = ("DDIMScheduler", {**STABLE, "clip_sample": False})
OTHERS = {
    "fewer steps": ("DDIMScheduler", 10, {**STABLE, "clip_sample": False}),
    "other spacing": ("DDIMScheduler", 20, {**STABLE, "clip_sample": False, "timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", 20, STABLE),
    "flow": ("FlowMatchEulerDiscreteScheduler", 20, {"shift": 3.0}),
    "heun": ("HeunDiscreteScheduler", 10, STABLE),
}
OLD = {
    "never set": ("DDIMScheduler", None, DDIM[1]),
    "flow, never set": ("FlowMatchEulerDiscreteScheduler", None, {}),
    "other steps": ("DDIMScheduler", 25, DDIM[1]),
    "same steps": ("DDIMScheduler", 20, {**DDIM[1], "steps_offset": 7}),
    "flow": ("FlowMatchEulerDiscreteScheduler", 20, {}),
}
READABLE = pytest.mark.parametrize("readable", [True, False], ids=["host", "device"])


@pytest.mark.parametrize("new", OTHERS)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_scheduler_that_is_replaced_is_followed(new, fuse):
    """Replace the scheduler of a pipeline before a run, between runs, and by the same one."""
    kind, steps, options = OTHERS[new]
    pipe = SimpleNamespace(scheduler=made(DDIM[0], 20, **DDIM[1]))
    guider = LearnedGuidance(weight, scheduler=pipe)
    torch.testing.assert_close(run_of(guider, pipe.scheduler), expected_of(pipe.scheduler))
    pipe.scheduler = made(kind, **options)
    if fuse and new != "heun":
        pipe.scheduler = FusedScheduler(pipe.scheduler)
    pipe.scheduler.set_timesteps(steps)
    torch.testing.assert_close(run_of(guider, pipe.scheduler), expected_of(pipe.scheduler))
    pipe.scheduler.set_timesteps(steps + 3)
    torch.testing.assert_close(run_of(guider, pipe.scheduler), expected_of(pipe.scheduler))
    assert guider.new().scheduler is pipe.scheduler


@READABLE
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("new", OTHERS)
def test_a_scheduler_that_was_replaced_is_noticed(old, new, readable, monkeypatch):
    """Check a guider with the old scheduler: an error that names the remedy, or NaN where the host reads no values."""
    kind, steps, options = OLD[old]
    scheduler = made(OTHERS[new][0], OTHERS[new][1], **OTHERS[new][2])
    guider = LearnedGuidance(weight, scheduler=made(kind, steps, **options))
    if not readable:
        monkeypatch.setattr(module, "readable", lambda tensor: False)
        try:
            assert run_of(guider, scheduler).isnan().any()
            assert "never" not in old
        except ValueError as error:
            assert "guider.scheduler = pipe" in str(error)
        return
    with pytest.raises(ValueError, match="set guider.scheduler = pipe, which follows") as error:
        run_of(guider, scheduler)
    assert ("set_timesteps was never called" in str(error.value)) == ("never" in old)
    for remedy in (SimpleNamespace(scheduler=scheduler), scheduler):
        guider.scheduler = remedy
        torch.testing.assert_close(run_of(guider, scheduler), expected_of(scheduler))


@READABLE
@pytest.mark.parametrize("steps", [slice(None), slice(8, None), slice(0, 12), slice(5, 15)])
@pytest.mark.parametrize("kind", ["ddim", "euler", "flow"])
def test_parts_of_a_run(kind, steps, readable, monkeypatch):
    """Run parts as image-to-image and denoising_end do, also with copies of the timesteps."""
    scheduler, fused, _ = pair(kind)
    if not readable:
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    for one in (scheduler, fused):
        guider = LearnedGuidance(weight, scheduler=one)
        torch.testing.assert_close(run_of(guider, one, steps), expected_of(one, steps))
        copied = SimpleNamespace(timesteps=one.timesteps.clone())
        torch.testing.assert_close(run_of(guider, copied, steps), expected_of(one, steps))


@READABLE
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("begin", [0, 4, 6])
@pytest.mark.parametrize("told", [False, True])
def test_timesteps_that_repeat(begin, copied, readable, told, monkeypatch):
    """Run Heun's timesteps; a run from the middle begins with the second of two, as in diffusers."""
    scheduler = made("HeunDiscreteScheduler", 10, **STABLE)
    assert len(set(scheduler.timesteps.tolist())) < len(scheduler.timesteps)
    if told:
        scheduler.set_begin_index(begin)
    if not readable:
        monkeypatch.setattr(module, "readable", lambda tensor: False)
    guider = LearnedGuidance(weight, scheduler=scheduler)
    given = SimpleNamespace(timesteps=scheduler.timesteps.clone()) if copied else scheduler
    steps = slice(begin, None)
    if copied and not (readable or told or begin == 0):
        steps = slice(begin, begin + 1)  # on a device, later steps are ambiguous
    torch.testing.assert_close(run_of(guider, given, steps), expected_of(scheduler, steps))


def test_an_interval_needs_the_right_scheduler_too():
    scheduler = made(DDIM[0], 20, **DDIM[1])
    guider = LearnedGuidance(2.0, scheduler=made(DDIM[0], **DDIM[1]), interval=(200.0, 700.0))
    guider.set_state(0, 20, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="set_timesteps was never called"):
        guider.prepare_inputs(prompts())
    guider = LearnedGuidance(torch.tensor([2.0, 1.0, 0.5]), scheduler=scheduler, interval=(200.0, 700.0))
    found = denoise(call_unet, scheduler, guider)
    own = LearnedGuidance(lambda c, s, t: guider.omega.repeat(20) * ((t > 200) & (t <= 700)), scheduler=scheduler)
    assert_close(found, denoise(call_unet, scheduler, own))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["tensor", "interval", "labels", "embeds"])
def test_num_images_per_prompt(kind, count):
    """Check that the images of a prompt are neighbours, as diffusers repeats prompts."""
    scheduler, _, _ = pair("ddim", 4)
    knots = torch.linspace(-1, 1000, 6)
    table = lgd.OmegaTable(torch.rand(7, 6, 6, generator=torch.Generator().manual_seed(0)), knots, knots)
    omega, labels = torch.tensor([0.5, 2.0]), torch.tensor([3, 6])
    if kind in ("tensor", "interval"):
        guider = LearnedGuidance(omega, scheduler=scheduler, interval=(-1.0, 600.0) if kind == "interval" else None)
    elif kind == "labels":
        guider = LearnedGuidance(table, scheduler=scheduler)
        guider.condition_value = labels
    else:
        guider = LearnedGuidance(lambda c, s, t: c.mean((1, 2)) + t / 1000, scheduler=scheduler)
    c, u = noise(1, (2 * count, 3)), noise(2, (2 * count, 3))
    embeds = noise(3, (2, 5, 4))
    repeated = embeds.repeat(1, count, 1).view(2 * count, 5, 4)  # as pipelines do
    times = times_of(scheduler)
    for given in (embeds, repeated) if kind == "embeds" else (repeated,):
        for step, t in enumerate(scheduler.timesteps):
            guider.set_state(step, 4, t)
            guider.prepare_inputs({"prompt_embeds": (given, given)})
            found = guider.forward(c, u).pred
            if kind == "labels":
                w = table(labels.repeat_interleave(count), *(times[step + n].expand(2 * count) for n in (1, 0)))
            elif kind == "embeds":
                w = repeated.mean((1, 2)) + t / 1000
            else:
                w = omega.repeat_interleave(count) * (t <= 600 if kind == "interval" else 1)
            assert_close(found, lgd.guided_score(c, u, w.float()), 1e-6)


def test_batches_that_do_not_fit():
    scheduler, _, _ = pair("ddim", 4)
    c, u = noise(1, (3, 3)), noise(2, (3, 3))
    with pytest.raises(ValueError, match="`omega` has 2 entries for a batch of 3, expected one for each sample, or"):
        LearnedGuidance(torch.ones(2)).forward(c, u)
    guider = LearnedGuidance(weight, scheduler=scheduler)
    guider.set_state(0, 4, scheduler.timesteps[0])
    guider.condition_value = torch.ones(2, 4)
    with pytest.raises(ValueError, match="`condition_value` has 2 entries for a batch of 3"):
        guider.forward(c, u)
    guider.condition_value = None
    guider.prepare_inputs({"prompt_embeds": ([c, c, c], [u, u, u])})
    with pytest.raises(TypeError, match="`condition` is a list, expected a tensor .*; set guider.condition_value"):
        guider.forward(c, u)
    guider.condition_value = torch.ones(3, 4)
    guider.forward(c, u)


def test_a_condition_that_changes_within_a_run():
    """Change the condition, also its batch: nothing of the old one is kept."""
    scheduler, _, _ = pair("ddim", 4)
    guider = LearnedGuidance(lambda c, s, t: c + 0 * t, scheduler=scheduler)
    guider.set_state(2, 4, scheduler.timesteps[2])
    for value in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0])):
        guider.condition_value = value
        one = torch.ones(len(value), 1)
        assert torch.equal(guider.forward(one, 0 * one).pred[:, 0], 1 + value)


@pytest.mark.parametrize("before", ["inference", "no_grad", "grad"])
@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("own_times", [False, True])
def test_a_run_before_a_training(before, step, own_times):
    """Run without grad, then train: the kept rows and times are not reused, and every step has gradients, with or
    without step 0."""
    with torch.inference_mode(before == "inference"):
        scheduler, _, _ = pair("ddim")
        labels, embeds = torch.tensor([0, 2, 1]), noise(1, (BATCH, 4))
    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 1))
    asked = []

    def omega(c, s, t):
        asked.append(len(t))
        return network(torch.cat((c, torch.stack((s, t), 1) / 1000), 1))[:, 0]

    options = {"times": lambda scheduler: times_of(scheduler)} if own_times else {}
    if own_times and before == "inference":
        with torch.inference_mode():
            kept = times_of(scheduler)
        options = {"times": lambda scheduler: kept}
    guider = LearnedGuidance(omega, scheduler=scheduler, **options)
    guider.condition_value = embeds
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    with modes[before]():
        for i, t in enumerate(scheduler.timesteps):
            guider.set_state(i, 20, t)
            guider.forward(noise(3), noise(4))
    assert before == "grad" or asked == [20 * BATCH]
    for i in range(step, step + 3):
        guider.set_state(i, 20, scheduler.timesteps[i])
        network.zero_grad()
        guider.forward(noise(3), noise(4)).pred.square().mean().backward()
        assert all(one.grad.abs().sum() > 0 for one in network.parameters())
    guider.condition_value = labels
    with torch.no_grad():
        guider.set_state(0, 20, scheduler.timesteps[0])
        guider.omega = lambda c, s, t: c + t
        assert not guider.forward(noise(3), noise(4)).pred.requires_grad


def test_the_scale_that_models_embed():
    """Check that w = guidance_scale - 1 is omega, as in diffusers' own guiders at the same guidance."""
    for omega in (0.0, 3.5, 7):
        assert LearnedGuidance(omega).guidance_scale == guiders.ClassifierFreeGuidance(1.0 + omega).guidance_scale
    guider = LearnedGuidance(3.5)
    guider.guidance_scale = 3.0
    assert guider.omega == guider.config.omega == 2.0 and guider.new().guidance_scale == 3.0
    for omega in (torch.tensor([1.0, 2.0]), weight):
        guider = LearnedGuidance(omega)
        with pytest.raises(ValueError, match=r"omega is a \w+; set guider.guidance_scale = 1 \+ the weight to embed"):
            guider.guidance_scale  # noqa: B018
        guider.guidance_scale = 1 + 7.0
        assert guider.guidance_scale == 8.0 and guider.omega is omega and guider.new().guidance_scale == 8.0


def test_a_consistency_model_reads_its_scale():
    """Run Stable Diffusion XL's own block."""
    pytest.importorskip("transformers")
    from diffusers.modular_pipelines.modular_pipeline import PipelineState, SequentialPipelineBlocks
    from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise

    unet = sdxl_unet(time_cond_proj_dim=8)
    step = before_denoise.StableDiffusionXLPrepareAdditionalConditioningStep()
    pipe = SequentialPipelineBlocks.from_blocks_dict({"condition": step}).init_pipeline()
    state = {"latents": noise(0, (6, 4, 8, 8)), "pooled_prompt_embeds": noise(1, (6, 8)), "batch_size": 3}

    def embedded(guider):
        pipe.update_components(guider=guider, unet=unet, requires_aesthetics_score=False)
        return pipe(PipelineState(), **state, num_images_per_prompt=2, output="timestep_cond")

    found, expected = embedded(LearnedGuidance(7.0)), embedded(guiders.ClassifierFreeGuidance(8.0))
    assert torch.equal(found, expected) and found.shape == (6, 8)
