"""Compare FusedScheduler with diffusers in whole runs of every configuration, and in what pipelines do around a
step."""

import functools

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from tiny import ANCESTRAL, BATCH, DDIM, DPM, EULER, FLOW, STABLE, assert_close, drawn_from, draws, noise, pair, toy  # noqa: E402

from lgd_kernels.integrations.diffusers import FusedScheduler  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


def whole_run(scheduler, steps=None, seed=0, **options):
    """Run with a network that depends only on x; the first sample has the scale that the scheduler expects."""
    scheduler.set_timesteps(steps, **options)
    x = noise(seed) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    generator = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(0.9 * torch.tanh(0.7 * scaled + 0.3), t, x, generator=generator).prev_sample
    return x


SPACINGS = {
    "linspace": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
}
FLOWS = {name: settings for name, settings in SPACINGS.items() if name in ("linspace", "karras", "exponential", "beta")}
GRID = [
    *(
        (EULER, STABLE | one | {"final_sigmas_type": end})
        for name, one in SPACINGS.items()
        if name != "lu"
        for end in ("zero", "sigma_min")
    ),
    *(
        (EULER, STABLE | {"interpolation_type": "log_linear", "final_sigmas_type": end})
        for end in ("zero", "sigma_min")
    ),
    (EULER, STABLE | {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
    (EULER, STABLE | {"prediction_type": "sample"}),
    *(
        (DPM, STABLE | one | {"final_sigmas_type": end, "algorithm_type": kind})
        for one in SPACINGS.values()
        for end in ("zero", "sigma_min")
        for kind in ("dpmsolver++", "sde-dpmsolver++")
    ),
    (DPM, {"use_flow_sigmas": True, "prediction_type": "epsilon", "flow_shift": 3.0}),
    *((ANCESTRAL, STABLE | SPACINGS[name]) for name in ("linspace", "leading", "trailing")),
    *(
        (DDIM, STABLE | SPACINGS[name] | {"clip_sample": False, "set_alpha_to_one": one})
        for name in ("linspace", "leading", "trailing")
        for one in (True, False)
    ),
    (DDIM, STABLE | {"clip_sample": False, "set_alpha_to_one": False}),  # prompt-to-prompt's, AnimateDiff's
    *((FLOW, one | {"shift": 3.0, "stochastic_sampling": draws}) for one in FLOWS.values() for draws in (True, False)),
]


@pytest.mark.parametrize("kind, settings", GRID, ids=lambda one: "" if isinstance(one, str) else str(one))
def test_whole_runs_of_every_length(kind, settings):
    """Compare runs of 1 step and more. Spacings that end where they already are (sigma_min, the first index of a table)
    take a last step of no length, from sigmas that may differ by rounding."""
    if "use_beta_sigmas" in settings:
        pytest.importorskip("scipy")
    make = functools.partial(getattr(diffusers, kind), **settings)
    for steps in (1, 2, 3, 20):
        expected, found = whole_run(make(), steps), whole_run(FusedScheduler(make()), steps)
        assert expected.isfinite().all()
        assert_close(found, expected, 1e-4)


def test_sigmas_given_twice():
    given = [1.0, 0.75, 0.75, 0.25]
    expected = whole_run(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas=given)
    assert_close(whole_run(FusedScheduler(diffusers.FlowMatchEulerDiscreteScheduler()), sigmas=given), expected)
    given = [9.0, 3.0, 3.0, 3.0, 0.5, 0.0]
    expected = whole_run(diffusers.EulerDiscreteScheduler(), sigmas=given)
    assert_close(whole_run(FusedScheduler(diffusers.EulerDiscreteScheduler()), sigmas=given), expected)


def test_runs_that_are_refused():
    """Check that set_timesteps raises, before any step."""
    trailing = {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ours = FusedScheduler(diffusers.DDIMScheduler(**trailing))
    with pytest.raises(
        ValueError, match="FusedScheduler: the run of DDIMScheduler .* an eps prediction holds no information"
    ):
        ours.set_timesteps(4)
    with pytest.raises(ValueError, match="no run is set up"):
        ours.step(noise(0), 999, noise(0))
    assert_close(
        *(
            whole_run(one(diffusers.DDIMScheduler(**trailing, prediction_type="v_prediction")), 4)
            for one in (FusedScheduler, lambda one: one)
        )
    )
    ours = FusedScheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        ValueError, match=r"FlowMatchEuler.* refused: one_step: `times` rises at times\[2\], from 0.5 to 0.7"
    ):
        ours.set_timesteps(sigmas=[1.0, 0.5, 0.7])
    for options in ({"num_inference_steps": 0}, {"num_inference_steps": -1}, {"sigmas": []}):
        with pytest.raises(ValueError, match="FusedScheduler.set_timesteps: .*, expected 1 or more"):
            ours.set_timesteps(**options)


class FromTheEnd(diffusers.EulerDiscreteScheduler):
    """Make other timesteps, and take diffusers' steps."""

    def set_timesteps(self, num_inference_steps=None, device=None, **options):
        super().set_timesteps(num_inference_steps, device, **options)
        self.sigmas, self.timesteps = self.sigmas[1:], self.timesteps[1:]


def test_subclasses():
    """Check that a subclass with diffusers' step is accepted, and saved as diffusers' class."""
    make = functools.partial(FromTheEnd, **STABLE)
    ours = FusedScheduler(make())
    assert_close(whole_run(ours, 8), whole_run(make(), 8))
    assert ours.config.fused == EULER and type(FusedScheduler.from_config(ours.config).inner) is getattr(
        diffusers, EULER
    )


@pytest.mark.parametrize("run", ["flow", "euler", "ancestral", "2m", "lms", "unipc", "deis", "singlestep"])
def test_noise_is_added_where_the_run_is(run):
    """Check image-to-image before the first step, inpainting after each: add_noise uses begin_index, then the step."""
    theirs, ours, options = pair(run)
    data, z = noise(1), noise(2)
    x, ends = noise(0), []
    for one in (theirs, ours):
        one.set_begin_index(8)
        add = one.scale_noise if run == "flow" else one.add_noise
        at = one.timesteps[8:9].expand(BATCH)
        order = (data, at, z) if run == "flow" else (data, z, at)
        found = [add(*order)]
        y, generator = x, torch.Generator().manual_seed(3)
        for t in one.timesteps[8:11]:
            scaled = one.scale_model_input(y, t) if hasattr(one, "scale_model_input") else y
            drawn = {"generator": generator} if draws(run) else {}
            y = one.step(toy(scaled, t), t, y, **options, **drawn).prev_sample
            found.append(add(*order))
        assert one.begin_index == 8
        ends.append(torch.stack(found))
    assert_close(ends[1], ends[0])
    assert ends[1].flatten(1).unique(dim=0).shape[0] == 4


@pytest.mark.parametrize("run", ["flow", "euler", "ancestral", "2m"])
def test_eta_is_ddims(run):
    """Check that other schedulers ignore eta: pipelines pass it to every scheduler with such a parameter."""
    steps = []
    for eta in ({}, {"eta": 0.5}):
        _, ours, _ = pair(run)
        t = ours.timesteps[0]
        steps.append(ours.step(toy(noise(0), t), t, noise(0), **drawn_from(1), **eta).prev_sample)
    assert torch.equal(*steps)
    _, ours, _ = pair("ddim")
    with pytest.raises(ValueError, match="`eta` is 1.5"):
        ours.step(noise(0), ours.timesteps[0], noise(0), eta=1.5)


def test_a_first_timestep_that_repeats():
    """Check that a run begins at the second of two, where diffusers runs out of timesteps; set_begin_index(0) begins at
    the first in both."""
    make = functools.partial(getattr(diffusers, DPM), beta_schedule="squaredcos_cap_v2", use_exponential_sigmas=True)
    ends = []
    for one in (make(), FusedScheduler(make())):
        one.set_timesteps(15)
        assert one.timesteps[0] == one.timesteps[1]
        one.set_begin_index(0)
        x = noise(0)
        for t in one.timesteps:
            x = one.step(toy(x, t), t, x).prev_sample
        ends.append(x)
    assert_close(ends[1], ends[0])
    ours = FusedScheduler(make())
    with pytest.raises(ValueError, match=r"timesteps repeat here, and set_begin_index\(0\) begins at the first"):
        whole_run(ours, 15)
