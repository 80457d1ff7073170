"""Test the CFG function of the ComfyUI node, with a stand-in that calls it as ComfyUI's samplers do."""

import math

import comfyui_standin as comfy
import pytest
import torch
from comfyui_standin import FLOW_SIGMAS, NEGATIVE, SIGMAS, denoised, dual, guided_by, sampling

import lgd_kernels as lgd
from lgd_kernels.integrations import comfyui
from lgd_kernels.integrations.comfyui_times import times
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork

FLOW = sampling(comfy.CONST, 1.0)
COSMOS = sampling(comfy.COSMOS_RFLOW, 80.0)
SCHEDULES = [lgd.VPCosine(), lgd.VPLinear.ddpm(), lgd.VPLinear.stable_diffusion(), lgd.VPLinear(2.0, 2.0), lgd.EDM()]


def table(schedule=None, conditions=3):
    """Return a table of random values over all times of a schedule, by default EDM."""
    schedule = schedule or lgd.EDM()
    knots = schedule.from_unit(torch.linspace(0, 1, 7)).float()
    values = torch.rand(conditions, 7, 7, generator=torch.Generator().manual_seed(0))
    return lgd.OmegaTable(values, knots, knots, schedule=schedule)


def tensors(count=3, batch=2):
    return torch.randn(count, batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "schedule, sigma, time, model",
    [
        (lgd.EDM(), 5.0, 5.0, None),
        (lgd.RectifiedFlow(), 0.3, 0.3, FLOW),
        (lgd.RectifiedFlow(), 3.0, 0.75, COSMOS),
        (lgd.VPCosine(), math.sqrt(3), 2 / 3, None),
        (lgd.VPLinear(1.0, 5.0), math.sqrt(math.e - 1), 0.5, None),  # beta = 1 + 4 t: its integral is 1
        (lgd.VPLinear(1.0, 5.0), 0.0, 0.0, None),
        (lgd.Discrete.stable_diffusion(), 0.0, -1, None),
        (lgd.Discrete.stable_diffusion(), 0.0292, 0, None),  # sigma_min and sigma_max of Stable Diffusion
        (lgd.Discrete.stable_diffusion(), 14.6146, 999, None),
    ],
)
def test_times_by_hand(schedule, sigma, time, model):
    found = times(schedule, torch.tensor([sigma]), model)
    assert float(found) == pytest.approx(time, rel=1e-6) and found.is_floating_point() != isinstance(time, int)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_times_are_the_inverse_of_the_schedules_levels(schedule):
    t = schedule.from_unit(torch.linspace(0, 1, 200)[:-1]).double()
    signal, noise = schedule.signal_noise(t)
    torch.testing.assert_close(times(schedule, (noise / signal).float()), t.float(), rtol=2e-5, atol=1e-7)


def test_times_of_a_table_are_its_steps():
    for schedule in (lgd.Discrete.stable_diffusion(), lgd.Discrete(torch.tensor([0.9, 0.5, 0.0]))):
        steps = torch.arange(-1, schedule.alphas_cumprod.numel())
        signal, noise = schedule.signal_noise(steps)
        sigma = (noise / signal).clamp(max=4519.0)  # ComfyUI's sigma without signal
        assert times(schedule, sigma).tolist() == steps.tolist()
        assert times(schedule, sigma * 1.0001).tolist() == steps.tolist()


def test_sigmas_half_way_between_two_steps():
    """ComfyUI's schedulers "normal" and "sgm_uniform" place sigmas there; its models are called at the nearest step."""
    schedule = lgd.Discrete.stable_diffusion()
    known = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().log().float()
    sigma = (0.5 * known[:-1] + 0.5 * known[1:]).exp()
    assert torch.equal(times(schedule, sigma), (sigma.log() - known[:, None]).abs().argmin(0))


def test_a_call_by_hand():
    """The step from sigma 2 to 1: omega(s = 1, t = 2) = 3, so x0 = 5 + 0.5 * 3 (5 - 1)."""
    values = torch.tensor([[[9.0, 9.0], [9.0, 9.0]], [[9.0, 1.0], [9.0, 3.0]]])
    omega = lgd.OmegaTable(values, torch.tensor([0.0, 1.0]), torch.tensor([1.5, 2.0]), schedule=lgd.EDM())
    model = guided_by(comfyui.CFGFunction(omega, condition=1, strength=0.5))
    x, cond, uncond = (torch.full((1, 3), one) for one in (7.0, 5.0, 1.0))
    run = torch.tensor([2.0, 1.0, 0.0])
    close(denoised(model, x, torch.tensor([2.0]), cond, uncond, 4.0, sigmas=run), torch.full((1, 3), 11.0))


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("kind", ["EDM", "SD", "VPLinear", "flow"])
def test_every_step_of_a_run(kind, step, scale):
    """Compare with the x0 of guided_score, with omega at the times of the step, for any cfg of the sampler."""
    run, model = (FLOW_SIGMAS, FLOW) if kind == "flow" else (SIGMAS, sampling(comfy.V_PREDICTION))
    at = {"EDM": SIGMAS, "flow": FLOW_SIGMAS}.get(kind)
    if kind == "SD":  # ComfyUI's own: the nearest logarithm in its table
        schedule = lgd.Discrete.stable_diffusion()
        known = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().float().log()
        at = torch.stack([(known - one.log()).abs().argmin() for one in SIGMAS[:-1]] + [torch.tensor(-1)]).float()
    elif kind == "VPLinear":
        schedule = lgd.VPLinear.stable_diffusion()
        fine = torch.linspace(0, 1, 200001, dtype=torch.float64)
        signal, noise = schedule.signal_noise(fine)
        at = fine[(noise / signal - SIGMAS.double()[:, None]).abs().argmin(-1)].float()
    else:
        schedule = lgd.EDM() if kind == "EDM" else lgd.RectifiedFlow()
    omega = table(schedule)
    guided = guided_by(comfyui.CFGFunction(omega, 2, 1.5), model)
    x, cond, uncond = tensors()
    found = denoised(guided, x, run[step].expand(2), cond, uncond, scale, sigmas=run)
    weight = 1.5 * omega(torch.tensor([2, 2]), at[step + 1].expand(2), at[step].expand(2))
    torch.testing.assert_close(found, lgd.guided_score(cond, uncond, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("omega", [Constant(1.5), Interval(1.5, 0.5, 2.0), ClampLinear(0.5, 1.0)], ids=repr)
def test_formulas(omega):
    """At sigma 1, from 1 to 0.2: each has omega 1.5 there. s plays no part, so no run is needed."""
    model = guided_by(comfyui.CFGFunction(omega, schedule=None if isinstance(omega, Constant) else lgd.EDM()))
    x, cond, uncond = tensors()
    for run in (SIGMAS, None):
        found = denoised(model, x, SIGMAS[2].expand(2), cond, uncond, 4.0, sigmas=run)
        close(found, lgd.guided_score(cond, uncond, 1.5))
    assert omega.state_dict().keys() and all(one.requires_grad for one in omega.parameters())  # a copy was frozen


def test_a_network_with_classes_takes_the_condition():
    torch.manual_seed(0)
    net = OmegaNetwork(lgd.EDM(), classes=4, hidden=16)
    x, cond, uncond = tensors()
    found = denoised(guided_by(comfyui.CFGFunction(net, 3)), x, SIGMAS[1].expand(2), cond, uncond, 4.0)
    weight = net(torch.tensor([3]), SIGMAS[2:3], SIGMAS[1:2]).detach().expand(2)
    close(found, lgd.guided_score(cond, uncond, weight))
    with pytest.raises(ValueError, match="`condition` is 4, expected one of omega's: 0 to 3"):
        comfyui.CFGFunction(net, 4)


def test_half_precision():
    x, cond, uncond = (one.half() for one in tensors())
    found = denoised(guided_by(comfyui.CFGFunction(table())), x, SIGMAS[:1].half().expand(2), cond, uncond, 4.0)
    assert found.dtype == torch.float16


def test_what_is_refused():
    with pytest.raises(ValueError, match="`condition` is 3, expected one of omega's: 0 to 2"):
        comfyui.CFGFunction(table(), 3)
    with pytest.raises(ValueError, match="`condition` is 1, expected 0: this omega has no labels to choose"):
        comfyui.CFGFunction(Constant(1.0), 1)
    bad = {"condition": ("0", 1.5, None, True), "strength": ("1", None, math.nan)}
    for name, value in ((name, value) for name, values in bad.items() for value in values):
        with pytest.raises(ValueError, match=f"LearnedGuidance: `{name}` is {value!r}, expected"):
            comfyui.CFGFunction(table(), **{name: value})
    with pytest.raises(TypeError, match="`omega` is a function, expected a table, a network or a formula"):
        comfyui.CFGFunction(lambda c, s, t: t)
    bare = lgd.OmegaTable(torch.ones(1, 1, 1), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"`schedule` is missing.*such as lgd_kernels.EDM\(\)"):
        comfyui.CFGFunction(bare)
    comfyui.CFGFunction(bare, schedule=lgd.EDM())


@pytest.mark.parametrize("name", ["values", "s_knots", "t_knots"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tables_that_are_not_finite(name, value):
    kept = {"values": torch.ones(1, 3, 3), "s_knots": torch.tensor([0.0, 1.0, 2.0])}
    kept["t_knots"] = kept["s_knots"] + 1
    kept[name].view(-1)[0 if value < 0 else -1] = value
    if not math.isnan(value) or name == "values":
        with pytest.raises(ValueError, match=f"`{name}` (holds NaN or infinities|must increase strictly and)"):
            comfyui.CFGFunction(lgd.OmegaTable(**kept), schedule=lgd.EDM())


@pytest.mark.parametrize(
    "schedule, model, said",
    [
        (lgd.RectifiedFlow(), FLOW, None),
        (lgd.RectifiedFlow(), COSMOS, None),
        (lgd.Discrete.stable_diffusion(), sampling(), None),
        (lgd.EDM(), sampling(comfy.V_PREDICTION), None),
        (lgd.RectifiedFlow(), object(), None),  # a program without ComfyUI's classes
        (lgd.RectifiedFlow(), sampling(), r"of RectifiedFlow\(\), but this is no flow model \(Levels, EPS\); choose a"),
        (lgd.EDM(), FLOW, r"of EDM\(.*, but this is a flow model \(Levels, CONST\).*learned for RectifiedFlow\(\)"),
        (lgd.VPCosine(), COSMOS, r"of VPCosine\(\), but this is a flow model \(Levels, COSMOS_RFLOW\)"),
    ],
)
def test_a_flow_and_another_model(schedule, model, said):
    """Check that both the node and the call refuse a mismatch, naming both."""
    function = comfyui.CFGFunction(table(schedule))
    x, cond, uncond = tensors()
    run = FLOW_SIGMAS if isinstance(schedule, lgd.RectifiedFlow) else SIGMAS
    for call in (
        lambda: function.check_model(model),
        lambda: denoised(guided_by(function, model), x, run[1].expand(2), cond, uncond, 4.0, sigmas=run),
    ):
        if said is None:
            call()
        else:
            with pytest.raises(ValueError, match=said):
                call()


@pytest.mark.parametrize("last, fits", [(14.6, True), (80, True), (5, True), (1, False), (999, False)])
def test_knots_of_another_scale(last, fits):
    """A table of timesteps that was saved as one of sigmas, and the like."""
    knots = torch.linspace(0, last, 4)
    function = comfyui.CFGFunction(lgd.OmegaTable(torch.ones(1, 4, 4), knots, knots, schedule=lgd.EDM()))
    if fits:
        return function.check_model(sampling(sigma_max=14.6))
    with pytest.raises(ValueError, match=f"t_knots end at {last}, but this model's times reach 14.6, counted as EDM"):
        function.check_model(sampling(sigma_max=14.6))


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize(
    "negative, changes",
    [
        (None, {}),
        ([], {}),
        (None, {"input_uncond": ...}),  # an older ComfyUI does not pass it
        ([{"timestep_start": 4.0}], {}),
        ([{"timestep_end": 8.0}, {"timestep_start": 0.5, "timestep_end": 0.0}], {}),
    ],
    ids=["none", "empty", "older", "later", "around"],
)
def test_without_a_negative_it_is_the_conditional_prediction(negative, changes, scale):
    x, cond, uncond = tensors()
    model = guided_by(comfyui.CFGFunction(table()))
    close(denoised(model, x, SIGMAS[1].expand(2), cond, uncond, scale, negative, **changes), cond)


@pytest.mark.parametrize(
    "negative, uncond, changes",
    [
        (NEGATIVE, 0.0, {}),  # a network that predicts zeros
        ([{"timestep_start": 4.0}, {"uuid": 1}], 0.0, {}),
        ([{"timestep_start": 6.0}], 1.0, {}),
        (NEGATIVE, 1.0, {"input_uncond": ...}),
        (NEGATIVE, 1e-40, {"input_uncond": ...}),
        (NEGATIVE, 1.0, {"input_uncond": ..., "uncond_denoised": ..., "cond_denoised": ..., "input": ...}),
    ],
)
def test_a_negative_that_was_evaluated_guides(negative, uncond, changes):
    """Check a negative whose prediction is 0 everywhere."""
    x, cond, _ = tensors()
    uncond = torch.full_like(cond, uncond)
    found = denoised(
        guided_by(comfyui.CFGFunction(table())), x, SIGMAS[1].expand(2), cond, uncond, 7.5, negative, **changes
    )
    omega = table()(torch.tensor([0, 0]), SIGMAS[2].expand(2), SIGMAS[1].expand(2))
    close(found, lgd.guided_score(cond, uncond, omega))


@pytest.mark.parametrize(
    "around",
    [
        lambda sigma: sigma,
        lambda sigma: torch.nextafter(sigma, torch.tensor(math.inf)),
        lambda sigma: torch.nextafter(sigma, torch.tensor(0.0)),
        lambda sigma: sigma * (1 + 1e-6),
        lambda sigma: sigma.half(),
        lambda sigma: sigma.bfloat16(),
        lambda sigma: sigma.double(),
    ],
    ids=["exact", "up", "down", "some", "half", "bfloat16", "double"],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_sigma_that_was_rounded(around, order):
    """Check sigmas of second order ancestral samplers; each sample has its own sigma."""
    x, cond, uncond = tensors(batch=4)
    sigma = around(SIGMAS[:4])
    omega = table()(torch.zeros(4, dtype=torch.int64), SIGMAS[1:], sigma.float())
    run = SIGMAS if order == 1 else SIGMAS.flip(0)
    close(
        denoised(guided_by(comfyui.CFGFunction(table())), x, sigma, cond, uncond, 4.0, sigmas=run),
        lgd.guided_score(cond, uncond, omega),
    )


def test_a_program_without_sample_sigmas():
    """As Forge: refused where omega depends on s, and the remedy works."""
    x, cond, uncond = tensors()
    call = (x, SIGMAS[1].expand(2), cond, uncond, 4.0)
    with pytest.raises(ValueError, match=r"passes no sample_sigmas; .*CFGFunction\(..., sigmas=sigmas\)"):
        denoised(guided_by(comfyui.CFGFunction(table())), *call, sigmas=None)
    found = denoised(guided_by(comfyui.CFGFunction(table(), sigmas=SIGMAS)), *call, sigmas=None)
    close(found, denoised(guided_by(comfyui.CFGFunction(table())), *call))
    flat = lgd.OmegaTable(torch.tensor([[[1.0, 2.0]]]), torch.zeros(1), torch.tensor([4.0, 5.0]), schedule=lgd.EDM())
    close(denoised(guided_by(comfyui.CFGFunction(flat)), *call, sigmas=None), lgd.guided_score(cond, uncond, 2.0))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg(style):
    """Both styles call the function once; it replaces cfg_cond2_negative in the regular style, cfg_conds if nested."""
    x, first, second, negative = tensors(4)
    sigma = SIGMAS[1].expand(2)
    conditionings = [[{"uuid": name}] for name in (0, 1, 2)]
    found = dual(
        guided_by(comfyui.CFGFunction(table(), 1)),
        x,
        sigma,
        (first, second, negative),
        (3.0, 5.0),
        style,
        conditionings,
    )
    omega = table()(torch.tensor([1, 1]), SIGMAS[2].expand(2), sigma).view(2, 1, 1, 1)
    if style == "nested":
        expected = negative + 5.0 * (first + omega * (first - second) - negative)
    else:
        expected = second + omega * (second - negative) + 3.0 * (first - second)
    close(found, expected)
