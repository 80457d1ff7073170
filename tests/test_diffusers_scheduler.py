"""Compare FusedScheduler with each scheduler that it takes, in whole runs, and in diffusers' own pipeline."""

import functools

import pytest
import torch

import lgd_kernels as lgd

diffusers = pytest.importorskip("diffusers")

from tiny import BATCH, DDIM, DPM, EULER, ROUGH, RUNS, assert_close, draws, noise, pair, toy  # noqa: E402

from lgd_kernels.integrations.diffusers import FusedScheduler, LearnedGuidance  # noqa: E402
from lgd_kernels.integrations.diffusers_plans import times_of  # noqa: E402

each_run = pytest.mark.parametrize("run", RUNS)
TWICE = {"heun", "heun v", "pndm", "pndm v", "flow heun"}  # runs in which timesteps are there twice


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


@each_run
def test_guided_on_the_way(run):
    """Pass both predictions to the step, which guides them in its own pass."""
    _, one, options = pair(run)
    _, two, _ = pair(run)
    x, omega = noise(0), torch.tensor([0.5, 2.0, 4.0])
    drawn = [draws(run), draws(run)]
    y = x
    for t in one.timesteps[:6]:
        predictions = toy(x, t), toy(x + 1, t)
        guided = lgd.guided_score(*predictions, omega)
        y = two.step(guided, t, y, **options, **drawn[1]).prev_sample
        x = one.step(predictions[0], t, x, uncond=predictions[1], omega=omega, **options, **drawn[0]).prev_sample
        assert_close(x, y)


@pytest.mark.parametrize("run", [run for run in RUNS if run not in TWICE])
def test_timesteps_of_their_own(run):
    """Compare a batch with a different step for each sample with three runs of diffusers, which takes no such batch."""
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
    assert_close(x, torch.cat(expected), ROUGH.get(run, 1e-5))
    theirs, _, _ = pair(run)
    with pytest.raises(RuntimeError):
        theirs.step(x, theirs.timesteps[at], x, **options)


class fixed_noise:
    """Make diffusers' schedulers draw this noise."""

    def __init__(self, z):
        self.z = z

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for kind in {kind for kind, *_ in RUNS.values()}:
            module = __import__(getattr(diffusers, kind).__module__, fromlist=["randn_tensor"])
            if hasattr(module, "randn_tensor"):
                self.patch.setattr(module, "randn_tensor", lambda *_, **__: self.z)

    def __exit__(self, *_):
        self.patch.undo()


def test_timesteps_that_repeat():
    """Check that steps are counted, as in diffusers; timesteps `[B]` would be ambiguous."""
    theirs, ours, _ = pair("2m karras", 80)
    assert len(theirs.timesteps.unique()) < 80
    x = y = noise(0)
    for t in theirs.timesteps:
        x, y = theirs.step(toy(x, t), t, x).prev_sample, ours.step(toy(y, t), t, y).prev_sample
    assert_close(y, x)
    with pytest.raises(ValueError, match="twice"):
        ours.step(x, ours.timesteps[:BATCH], x)


def test_seeds():
    """Check that the noise of a sample depends on its seed and step, not on its place in a batch."""
    _, ours, _ = pair("ancestral")
    x, start, found = noise(0), torch.tensor([4, 9, 2]), []
    ours.seed = 11
    whole = ours.step(toy(x, 1.0), ours.timesteps[start], x).prev_sample
    for b in range(BATCH):
        ours.seed = torch.tensor([11 + b])
        ours.set_timesteps(20)
        ours.set_begin_index(int(start[b]))
        one = x[b : b + 1]
        found.append(ours.step(toy(one, 1.0), ours.timesteps[start[b]], one).prev_sample)
    assert torch.equal(torch.cat(found), whole)
    seeds = torch.arange(BATCH) + 11 + (start << 32)
    z = lgd.philox_normal(x.shape, seeds, stream=1)
    _, given, _ = pair("ancestral")
    assert_close(given.step(toy(x, 1.0), given.timesteps[start], x, variance_noise=z).prev_sample, whole)


@pytest.mark.parametrize("run", ["ddim", "ancestral", "2m", "unipc", "pndm", "heun", "lcm"])
def test_nothing_waits_for_the_device(run):
    """Run on a device without data, where reading a value raises."""
    _, ours, _ = pair(run)
    ours.seed = 3
    x = torch.empty(2, 4, 8, 8, device="meta")
    t = torch.empty((), device="meta", dtype=ours.timesteps.dtype)
    guider = LearnedGuidance(lambda c, s, t: t * 0, scheduler=ours, interval=(0.0, 500.0))
    for step, at in enumerate([t, t, t] + [t.expand(2)] * (run not in TWICE)):
        guider.set_state(step, 20, t)
        guided = guider.forward(ours.scale_model_input(x, at), x).pred
        x = ours.step(guided, at, x).prev_sample
    assert x.device.type == "meta" and x.shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    "run, graphs", [("ddim", 2), ("flow", 2), ("ancestral", 2), ("2m", 3), ("unipc", 4), ("lms", 5)]
)
def test_a_step_compiles_whole(run, graphs):
    """Compile one graph for a first step and one for all others (one more for each length of the history)."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    _, ours, _ = pair(run)
    _, plain, _ = pair(run)
    ours.seed = plain.seed = 3
    counter = CompileCounter()

    @functools.partial(torch.compile, backend=counter, fullgraph=True)
    def step(x, t):
        return ours.step(toy(ours.scale_model_input(x, t), t), t, x, return_dict=False)[0]

    x = y = noise(0)
    for t in ours.timesteps:
        x = step(x, t)
        y = plain.step(toy(plain.scale_model_input(y, t), t), t, y).prev_sample
    assert_close(x, y, 1e-6)
    assert counter.frame_count <= graphs


@functools.cache
def dit_pipeline():
    torch.manual_seed(0)
    pipe = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8
        ).eval(),
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4).eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe):
    return pipe([1, 5], num_inference_steps=20, output_type="pt", generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("kind", [DDIM, DPM, EULER])
def test_a_pipeline(kind):
    pipe, before = dit_pipeline(), dit_pipeline().scheduler
    try:
        pipe.scheduler = getattr(diffusers, kind).from_config(before.config)
        expected = images(pipe)
        pipe.scheduler = FusedScheduler(pipe.scheduler)
        assert_close(images(pipe), expected)
    finally:
        pipe.scheduler = before


def test_a_pipeline_is_saved_and_loaded(tmp_path):
    pipe, before = dit_pipeline(), dit_pipeline().scheduler
    try:
        pipe.scheduler = FusedScheduler(before)
        expected = images(pipe)
        pipe.save_pretrained(tmp_path)
    finally:
        pipe.scheduler = before
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, FusedScheduler)
    assert torch.equal(images(loaded), expected)


@each_run
def test_a_scheduler_is_saved_and_loaded(run, tmp_path):
    theirs, ours, _ = pair(run)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        found = FusedScheduler.from_pretrained(tmp_path / folder)
        assert type(found.inner) is type(theirs)
        same = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
        assert {name: found.config[name] for name in same} == same
    assert type(theirs).from_config(ours.config).config.items() >= same.items()


@pytest.mark.parametrize("loaded", [True, False])
def test_a_scheduler_made_from_our_configuration_is_what_it_is(loaded, tmp_path):
    """Make another scheduler from a FusedScheduler's configuration, which includes "fused"."""
    ours = FusedScheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    if loaded:
        ours.save_pretrained(tmp_path)
        ours = FusedScheduler.from_pretrained(tmp_path)
    other = diffusers.DPMSolverMultistepScheduler.from_config(ours.config)
    assert type(FusedScheduler.from_config(other.config).inner) is type(FusedScheduler(other).inner) is type(other)
    other.set_timesteps(4)
    assert times_of(other).tolist() == [*other.timesteps.tolist(), -1]  # no flow, although made from one
    again = FusedScheduler(FusedScheduler(other))
    assert again.inner is other and again.kind == DPM


def test_a_configuration_without_a_class():
    with pytest.raises(ValueError, match=r"`config` names no class.*pass the scheduler itself: FusedSch"):
        FusedScheduler.from_config(diffusers.EulerDiscreteScheduler().config)


dpm = diffusers.DPMSolverMultistepScheduler


class DDIMScheduler(diffusers.schedulers.scheduling_utils.SchedulerMixin, diffusers.ConfigMixin):
    """Share only the name of diffusers' class."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, clip_sample=False, thresholding=False, prediction_type="epsilon"):
        pass


class Halved(diffusers.DDIMScheduler):
    def step(self, model_output, *args, **options):
        return super().step(model_output / 2, *args, **options)


@pytest.mark.parametrize(
    "scheduler, said",
    [
        (lambda: diffusers.DDIMScheduler(), "clip_sample=True"),
        (lambda: diffusers.LCMScheduler(thresholding=True), "LCMScheduler has thresholding=True"),
        (lambda: diffusers.PNDMScheduler(), "PNDMScheduler has skip_prk_steps=False"),
        (lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"), "variance_type='learned_r"),
        (lambda: diffusers.DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpms"),
        (
            lambda: diffusers.UniPCMultistepScheduler(solver_order=3),
            "solver_order=3, expected 2 or 1: UniPC.*solver_order=2",
        ),
        (
            lambda: diffusers.UniPCMultistepScheduler(disable_corrector=[0]),
            "disable_corrector=\\[0\\], expected \\[\\]",
        ),
        (lambda: diffusers.UniPCMultistepScheduler(predict_x0=False), "predict_x0=False, expected True"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (lambda: diffusers.KDPM2DiscreteScheduler(), "KDPM2DiscreteScheduler, expected one of"),
        (
            lambda: diffusers.EulerDiscreteScheduler(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction'",
        ),
        (
            lambda: dpm(prediction_type="flow_prediction"),
            "prediction_type='flow_prediction', expected one of epsilon, sample",
        ),
        (lambda: dpm(prediction_type="v_prediction", use_flow_sigmas=True), "'v_prediction' with use_flow_sigmas=True"),
        (
            lambda: DDIMScheduler(clip_sample=False),
            r"`scheduler` is a test_diffusers_scheduler.DDIMScheduler, expected one",
        ),
        (lambda: Halved(clip_sample=False), "`scheduler` is a Halved, whose step is its own, expected DDIMScheduler's"),
        (lambda: None, "`scheduler` is a builtins.NoneType, expected one of DDIMScheduler"),
    ],
)
def test_schedulers_that_are_refused(scheduler, said):
    with pytest.raises(ValueError, match=said):
        FusedScheduler(scheduler())


def test_steps_that_are_refused():
    _, ours, _ = pair("euler")
    x = noise(0)
    with pytest.raises(ValueError, match="expected timesteps of this run"):
        ours.step(x, 3.25, x)
    ours.step(x, ours.timesteps[0], x)
    with pytest.raises(ValueError, match="step 1 of this run; set_timesteps"):
        ours.step(x, ours.timesteps[5], x)
    with pytest.raises(ValueError, match="set_timesteps"):
        FusedScheduler(diffusers.EulerDiscreteScheduler()).step(x, 1.0, x)


def test_hints_for_a_timestep_that_is_not_the_next():
    """Check that each remedy in the message works."""
    scheduler, x = FusedScheduler(diffusers.EulerDiscreteScheduler()), torch.randn(2, 3)
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"set_timesteps\(n\) starts at the first, and set_begin_index\(k\) right"):
        scheduler.step(x, scheduler.timesteps[3], x)
    scheduler.step(x, scheduler.timesteps[[3, 3]], x)  # a timestep [B]
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    scheduler.step(x, scheduler.timesteps[3], x)
