"""Test LearnedGuidance in diffusers' denoising loop, with tiny random models."""

import functools
import itertools
import math

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.guidance import rules

diffusers = pytest.importorskip("diffusers")
guiders = pytest.importorskip("diffusers.guiders")

from tiny import BATCH, assert_close, call_transformer, call_unet, denoise, noise, pair, prompts, sdxl_unet  # noqa: E402

from lgd_kernels.integrations.diffusers import LearnedGuidance  # noqa: E402
from lgd_kernels.integrations.diffusers_plans import times_of  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


REAL = {
    "unet, ddim": (call_unet, "ddim"),
    "unet, euler": (call_unet, "euler"),
    "transformer": (call_transformer, "flow"),
}
each_model = pytest.mark.parametrize("model", REAL)


@each_model
@pytest.mark.parametrize("fused", [False, True])
def test_a_constant_omega_is_classifier_free_guidance(model, fused):
    """Compare 20 steps with the same seed at w = 1 + omega; with diffusers' scheduler and with ours."""
    network, run = REAL[model]
    theirs, ours, _ = pair(run)
    expected = denoise(network, theirs, guiders.ClassifierFreeGuidance(guidance_scale=4.5))
    assert_close(denoise(network, ours if fused else theirs, LearnedGuidance(3.5)), expected)


@each_model
def test_guidance_of_each_sample(model):
    """Compare each sample with a run at its own weight; diffusers' guider takes one weight for all."""
    network, run = REAL[model]
    scheduler, fused, _ = pair(run)
    omega = torch.tensor([0.5, 2.0, 4.0])
    found = denoise(network, fused, LearnedGuidance(omega), steps=5)
    for b, w in enumerate(1 + omega):
        expected = denoise(network, scheduler, guiders.ClassifierFreeGuidance(guidance_scale=float(w)), steps=5)
        assert_close(found[b], expected[b])
    with pytest.raises(ValueError):
        denoise(network, scheduler, guiders.ClassifierFreeGuidance(guidance_scale=1 + omega))


class Recorder:
    """Record the arguments of omega."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, c, s, t):
        self.asked.append((c, s, t))
        return self.function(c, s, t)


@pytest.mark.parametrize("run", ["flow", "ddim"])
def test_omega_is_asked_once_for_the_whole_run(run):
    """Check one call with N * B rows: c from the inputs, t and s neighbours in the scheduler's run."""
    network = call_transformer if run == "flow" else call_unet
    scheduler, fused, _ = pair(run, 5)
    omega = Recorder(lambda c, s, t: c.mean((1, 2)).abs() + s - t)
    denoise(network, fused, LearnedGuidance(omega, scheduler=fused), steps=5)
    ((c, s, t),) = omega.asked
    times = scheduler.sigmas if run == "flow" else torch.cat((scheduler.timesteps, torch.tensor([-1]))).float()
    torch.testing.assert_close(t.view(5, BATCH), times[:-1, None].expand(5, BATCH))
    torch.testing.assert_close(s.view(5, BATCH), times[1:, None].expand(5, BATCH))
    assert torch.equal(c, prompts()["prompt_embeds"][0].repeat(5, 1, 1)) and torch.equal(times, times_of(fused))


def test_a_table_and_labels():
    """Compare with the values of the table given step by step."""
    scheduler, _, _ = pair("ddim", 4)
    knots = torch.linspace(-1, 1000, 6)
    values = torch.rand(7, 6, 6, generator=torch.Generator().manual_seed(0))
    table, labels = lgd.OmegaTable(values, knots, knots), torch.tensor([3, 0, 6])
    guider = LearnedGuidance(table, scheduler=scheduler)
    guider.condition_value = labels
    times = torch.cat((scheduler.timesteps, torch.tensor([-1]))).float()
    c, u = noise(1), noise(2)
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        guider.set_state(step, 4, scheduler.timesteps[step])
        omega = table(labels, s.expand(BATCH), t.expand(BATCH))
        assert_close(guider.forward(c, u).pred, lgd.guided_score(c, u, omega), 1e-6)


def test_a_run_of_the_guider_that_begins_in_the_middle():
    """Check a run that counts from 0 in the middle of the timesteps; found by the timestep, or from begin_index."""
    for run in ("ddim", "euler"):
        scheduler, _, _ = pair(run)
        if run == "euler":
            scheduler.set_begin_index(8)
        guider = LearnedGuidance(lambda c, s, t: t, scheduler=scheduler)
        for step, t in enumerate(scheduler.timesteps[8:]):
            guider.set_state(step, 12, t)
            assert_close(guider.forward(torch.ones(2, 1), torch.zeros(2, 1)).pred, (1 + t).expand(2, 1).float(), 1e-6)


def test_an_interval():
    """Check that outside the interval there is no guidance, and no call of the network without the prompt."""
    scheduler, _, _ = pair("ddim")
    guider, calls = LearnedGuidance(2.0, scheduler=scheduler, interval=(200.0, 700.0)), []
    found = denoise(call_unet, scheduler, guider, calls=calls)
    inside = [200 < t <= 700 for t in scheduler.timesteps]
    assert calls == [1 + one for one in inside] and 5 < sum(inside) < 15
    share = [n / 20 + 1e-6 for n in (inside.index(True), 20 - inside[::-1].index(True))]
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=share[0], stop=share[1])
    assert_close(found, denoise(call_unet, scheduler, theirs))


@pytest.mark.parametrize(
    "options, calls",
    [
        ({"omega": 0.0}, 1),
        ({"omega": 0.0, "rule": "tcfg"}, 2),
        ({"omega": 1.0}, 2),
        ({"omega": 1.0, "enabled": False}, 1),
    ],
)
def test_the_second_call_is_left_out_where_nothing_needs_it(options, calls):
    assert LearnedGuidance(**options).num_conditions == calls


@pytest.mark.parametrize(
    "name, options, theirs",
    [
        ("apg", {"eta": 0.4, "radius": 6.0}, None),
        ("tcfg", {}, "TangentialClassifierFreeGuidance"),
        ("cfg_zero_star", {}, "ClassifierFreeZeroStarGuidance"),
        ("rescale", {"phi": 0.7}, None),
        ("beta_cfg", {}, None),
    ],
)
def test_rules_by_name(name, options, theirs):
    c, u = noise(1), noise(2)
    for step in (0, 1, 7):
        guider = LearnedGuidance(2.0, rule=name, rule_options=options)
        guider.set_state(step, 20, torch.tensor(500))
        set_by_step = {"cfg_zero_star": {"zero": step == 0}, "beta_cfg": {"progress": step / 19}}.get(name, {})
        rule = functools.partial(getattr(rules, name), **options, **set_by_step)
        found = guider.forward(c, u).pred
        assert torch.equal(found, lgd.guided_score(c, u, 2.0, rule=rule))
        if theirs:
            guider = getattr(guiders, theirs)(guidance_scale=3.0)
            guider.set_state(step, 20, torch.tensor(500))
            torch.testing.assert_close(found, guider.forward(c, u).pred, rtol=1e-4, atol=1e-4)


def test_a_guider_is_saved_and_loaded(tmp_path):
    guider = LearnedGuidance(2.5, rule="apg", rule_options={"eta": 0.5}, start=0.1, condition="prompt_embeds")
    guider.save_pretrained(tmp_path)
    loaded = LearnedGuidance.from_pretrained(tmp_path)
    assert loaded.omega == 2.5 and loaded.rule is rules.apg and loaded.config == guider.config
    table = lgd.OmegaTable(torch.ones(1, 1, 1), torch.zeros(1), torch.ones(1))
    LearnedGuidance(table).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"from_pretrained\(folder, omega=...\)"):
        LearnedGuidance.from_pretrained(tmp_path)
    loaded = LearnedGuidance.from_pretrained(tmp_path, omega=table)
    assert loaded.omega is table and loaded.new(start=0.5).omega is table


def test_guiders_that_are_refused():
    with pytest.raises(TypeError, match="`rule` is a int, expected a rule"):
        LearnedGuidance(1.0, rule=3)
    for interval in ((800, 200), (0, math.nan), (1,), 3, ("a", "b")):
        with pytest.raises(ValueError, match=r"`interval` is .*, expected two times \(low, high\) with low <= high"):
            LearnedGuidance(1.0, interval=interval)
    with pytest.raises(ValueError, match="`rule` is 'agp'"):
        LearnedGuidance(1.0, rule="agp")
    with pytest.raises(ValueError, match="pass scheduler=pipe or pipe.scheduler"):
        LearnedGuidance(lambda c, s, t: t).forward(noise(1), noise(2))
    scheduler, _, _ = pair("ddim")
    with pytest.raises(ValueError, match="call set_state"):
        LearnedGuidance(lambda c, s, t: t, scheduler=scheduler).forward(noise(1), noise(2))
    guider = LearnedGuidance(lambda c, s, t: t[:1], scheduler=scheduler, condition="labels")
    guider.set_state(0, 20, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="one of the pipeline's inputs: prompt_embeds, pooled"):
        guider.prepare_inputs(prompts())
    with pytest.raises(ValueError, match=r"returned \[1\], expected a tensor \[60\]"):
        guider.forward(noise(1), noise(2))


def test_a_modular_pipeline():
    """Run Stable Diffusion XL's own denoising blocks."""
    pytest.importorskip("transformers")
    from diffusers.modular_pipelines.modular_pipeline import PipelineState, SequentialPipelineBlocks
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    sdxl = sdxl_unet()
    blocks = SequentialPipelineBlocks.from_blocks_dict({"denoise": StableDiffusionXLDenoiseStep()})
    pipe = blocks.init_pipeline()

    def run(guider, scheduler):
        pipe.update_components(guider=guider, scheduler=scheduler, unet=sdxl)
        scheduler.set_timesteps(20)
        state = PipelineState()
        embeds = {"prompt_embeds": (5, 8), "pooled_prompt_embeds": (8,), "add_time_ids": (6,)}
        for seed, (name, shape) in enumerate(embeds.items()):
            for which, field in enumerate((name, f"negative_{name}")):
                state.set(field, noise(2 * seed + which + 1, (BATCH, *shape)), "denoiser_input_fields")
        latents = noise(0) * float(scheduler.init_noise_sigma)
        options = {"timesteps": scheduler.timesteps, "num_inference_steps": 20, "output": "latents"}
        return pipe(state, latents=latents, **options)

    theirs, ours, _ = pair("euler")
    expected = run(guiders.ClassifierFreeGuidance(guidance_scale=4.5), theirs)
    assert_close(run(LearnedGuidance(3.5), ours), expected)
    learned = LearnedGuidance(lambda c, s, t: torch.full_like(t, 3.5), scheduler=ours)
    assert_close(run(learned, ours), expected)
    learned = LearnedGuidance(lambda c, s, t: torch.full_like(t, 3.5), scheduler=pipe)
    for scheduler in (ours, theirs):  # followed where it is replaced
        assert_close(run(learned, scheduler), expected)
    learned.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="set_timesteps was never called on it; set guider.scheduler = pipe"):
        run(learned, ours)
