"""Test the ComfyUI node, with a stand-in that keeps ModelPatcher's contract and calls the node as ComfyUI's sampler
does."""

import contextlib
import copy
import importlib.util
import inspect
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.integrations import comfyui

SIGMAS = torch.tensor([14.0, 5.0, 1.0, 0.2, 0.0])


class Patcher:
    """Stand in for what the node and the sampler use of a ModelPatcher."""

    def __init__(self):
        self.model_options = {"transformer_options": {}}

    def clone(self):
        other = Patcher()
        other.model_options = copy.copy(self.model_options)
        return other

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        if len(inspect.signature(function).parameters) == 3:  # the old way
            wrapped = function
            function = lambda args: wrapped(args["cond"], args["uncond"], args["cond_scale"])  # noqa: E731
        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True


NEGATIVE = [{"uuid": 1}]  # conditionings


def denoised(patcher, x, sigma, cond, uncond, scale, negative=NEGATIVE, sigmas=SIGMAS, **changes):
    """Return the guided x0 of one call of the sampler; at scale 1 the unconditional call is skipped, without the
    option.

    `negative` are conditionings; None, as from BasicGuider, or limits that exclude sigma leave zeros.
    """
    options = {**patcher.model_options, "transformer_options": {"sample_sigmas": sigmas}}
    if math.isclose(scale, 1.0) and not options.get("disable_cfg1_optimization", False):
        negative = None
    limits = ((one.get("timestep_start", 1e9), one.get("timestep_end", 0.0)) for one in negative or ())
    if not any(low <= sigma[0] <= high for high, low in limits):
        uncond = torch.zeros_like(cond)
    if "sampler_cfg_function" not in options:
        return uncond + (cond - uncond) * scale
    sampling = SimpleNamespace(timestep=lambda sigma: sigma.log() * 100 + 500)
    args = {
        "cond": x - cond,
        "uncond": x - uncond,
        "cond_scale": scale,
        "timestep": sigma,
        "input": x,
        "sigma": sigma,
        "cond_denoised": cond,
        "uncond_denoised": uncond,
        "model": SimpleNamespace(model_sampling=sampling),
        "model_options": options,
        "input_cond": [{"uuid": 0}],
        "input_uncond": negative,
    }
    args = {name: value for name, value in (args | changes).items() if value is not ...}
    return x - options["sampler_cfg_function"](args)


@pytest.fixture
def table(tmp_path):
    s, t = torch.linspace(-1, 900, 7), torch.linspace(0, 950, 6)
    table = lgd.OmegaTable(torch.rand(3, 7, 6, generator=torch.Generator().manual_seed(0)), s, t)
    table.save(tmp_path / "omega.safetensors", lgd.EDM())
    return table


def tensors(count=3, batch=2):
    return torch.randn(count, batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


@pytest.mark.parametrize("times", comfyui.TIMES)
@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("step", range(4))
def test_the_node(table, tmp_path, times, scale, step):
    """Compare with the x0 of guided_score, with omega at the sigmas of the step, for any cfg of the sampler."""
    before = Patcher()
    (model,) = comfyui.LearnedGuidance().patch(before, str(tmp_path / "omega.safetensors"), 2, 1.5, times)
    x, cond, uncond = tensors()
    sigma = SIGMAS[step].expand(2)
    found = denoised(model, x, sigma, cond, uncond, scale)
    t, s = sigma, SIGMAS[step + 1].expand(2)
    if times == "timestep":
        t, s = t.log() * 100 + 500, torch.where(s > 0, s.log() * 100 + 500, -1.0)
    omega = 1.5 * table(torch.tensor([2, 2]), s, t)
    torch.testing.assert_close(found, lgd.guided_score(cond, uncond, omega), rtol=1e-5, atol=1e-5)
    assert "sampler_cfg_function" not in before.model_options  # the other branches of the graph keep their model


def test_half_precision(table, tmp_path):
    (model,) = comfyui.LearnedGuidance().patch(Patcher(), str(tmp_path / "omega.safetensors"))
    x, cond, uncond = (one.half() for one in tensors())
    assert denoised(model, x, SIGMAS[:1].half().expand(2), cond, uncond, 4.0).dtype == torch.float16


def test_what_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match="`condition` is 3, expected one of the table's: 0 to 2"):
        comfyui.CFGFunction(table, 3)
    for name, bad in (
        ("condition", "0"),
        ("condition", 1.5),
        ("condition", None),
        ("strength", "1"),
        ("strength", None),
    ):
        with pytest.raises(ValueError, match=f"LearnedGuidance: `{name}` is {bad!r}, expected"):
            comfyui.CFGFunction(table, **{name: bad})
    with pytest.raises(ValueError, match="`times` is 'step'"):
        comfyui.CFGFunction(table, times="step")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no omega table"):
        comfyui.load_table(tmp_path / "other.pt")
    with pytest.raises(TypeError, match="`table` is a function, expected an OmegaTable"):
        comfyui.CFGFunction(lambda c, s, t: t)
    with pytest.raises(ValueError, match="`strength` is nan"):
        comfyui.CFGFunction(table, strength=math.nan)
    x, cond, uncond = tensors()
    with pytest.raises(ValueError, match="no sample_sigmas"):
        comfyui.CFGFunction(table)({"cond": cond, "uncond": uncond, "sigma": SIGMAS[:1], "model_options": {}})


def test_the_file_alone(tmp_path):
    """Copy the file, and import it from there as ComfyUI does, where triton is not installed."""
    copied = tmp_path / "learned_guidance.py"
    shutil.copy(comfyui.__file__, copied)
    spec = importlib.util.spec_from_file_location("learned_guidance", copied)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    node = module.NODE_CLASS_MAPPINGS["LGDLearnedGuidance"]
    assert set(node.INPUT_TYPES()["required"]) == set(inspect.signature(node.patch).parameters) - {"self"}
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    script = f"""
import sys
sys.modules["triton"] = None
sys.path.insert(0, {str(tmp_path)!r})
import torch, learned_guidance, lgd_kernels as lgd
function = learned_guidance.CFGFunction(lgd.OmegaTable(torch.ones(1, 1, 1), torch.zeros(1), torch.ones(1)))
options = {{"transformer_options": {{"sample_sigmas": torch.tensor([2.0, 1.0, 0.0])}}}}
args = {{"cond": torch.ones(1, 2), "uncond": torch.zeros(1, 2), "sigma": torch.tensor([2.0]), "model_options": options}}
assert function(args).tolist() == [[2.0, 2.0]]
"""
    root = str(Path(lgd.__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
def test_without_a_negative_it_is_the_conditional_prediction(table, negative, changes, scale):
    model = Patcher()
    model.set_model_sampler_cfg_function(comfyui.CFGFunction(table), disable_cfg1_optimization=True)
    x, cond, uncond = tensors()
    found = denoised(model, x, SIGMAS[1].expand(2), cond, uncond, scale, negative, **changes)
    torch.testing.assert_close(found, cond, rtol=1e-6, atol=1e-6)


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
def test_a_negative_that_was_evaluated_guides(table, negative, uncond, changes):
    """Check a negative whose prediction is 0 everywhere."""
    model = Patcher()
    model.set_model_sampler_cfg_function(comfyui.CFGFunction(table), disable_cfg1_optimization=True)
    x, cond, _ = tensors()
    uncond = torch.full_like(cond, uncond)
    found = denoised(model, x, SIGMAS[1].expand(2), cond, uncond, 7.5, negative, **changes)
    omega = table(torch.tensor([0, 0]), SIGMAS[2].expand(2), SIGMAS[1].expand(2))
    torch.testing.assert_close(found, lgd.guided_score(cond, uncond, omega), rtol=1e-5, atol=1e-5)


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
def test_a_sigma_that_was_rounded(table, around, order):
    """Check sigmas of second order ancestral samplers; each sample has its own sigma."""
    model = Patcher()
    model.set_model_sampler_cfg_function(comfyui.CFGFunction(table), disable_cfg1_optimization=True)
    x, cond, uncond = tensors(batch=4)
    sigma = around(SIGMAS[:4])
    omega = table(torch.zeros(4, dtype=torch.int64), SIGMAS[1:], sigma.float())
    run = SIGMAS if order == 1 else SIGMAS.flip(0)
    found = denoised(model, x, sigma, cond, uncond, 4.0, sigmas=run)
    torch.testing.assert_close(found, lgd.guided_score(cond, uncond, omega), rtol=1e-5, atol=1e-5)


def one_line(error):
    assert "\n" not in str(error.value) and str(error.value).startswith("LearnedGuidance: ")
    return str(error.value)


class Code:
    def __reduce__(self):
        return print, ("run",)


BAD = {
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("omega"),
    "code": lambda path: path.write_bytes(pickle.dumps(Code(), 2)),
    "code in torch.save": lambda path: torch.save(Code(), path),
    "another": lambda path: torch.save(torch.ones(3), path),
    "keys": lambda path: torch.save({"values": torch.ones(1, 1, 1)}, path),
}


@pytest.mark.parametrize("kind", [*BAD, "missing"])
def test_a_bad_path_is_one_line(tmp_path, kind, capsys):
    """Check that all bad paths have the same message, so that a workflow cannot explore a disk."""
    if kind in BAD:
        BAD[kind](tmp_path / "omega.safetensors")
    path = str(tmp_path / "omega.safetensors")
    for read in (comfyui.load_table, lambda path: comfyui.LearnedGuidance().patch(Patcher(), path)):
        with pytest.raises(ValueError) as error:
            read(path)
        assert one_line(error) == (
            f"LearnedGuidance: `path` is {path!r}, which holds no omega table; "
            "OmegaTable.save(path, schedule) writes one, also that of a network's bake()"
        )
    assert "run" not in capsys.readouterr().out
    for odd in ("", "\0", "a" * 5000):
        with pytest.raises(ValueError, match="holds no omega table"):
            comfyui.load_table(odd)
    assert kind != "missing" or math.isnan(comfyui.LearnedGuidance.IS_CHANGED(path))
    assert math.isnan(comfyui.LearnedGuidance.IS_CHANGED(strength=1.0))  # the path comes from another node


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Stand in for ComfyUI's folder_paths, with a second folder of tables."""
    module = ModuleType("folder_paths")
    module.models_dir = str(tmp_path / "models")
    module.folder_names_and_paths = {"omega": ([str(tmp_path / "more")], set())}
    for name in ("models/omega/sub", "models/omega2", "more", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return tmp_path


def test_in_comfyui_only_its_folders_are_read(table, folders):
    good = ("models/omega/a.pt", "models/omega/sub/b.pt", "more/c.pt")
    for place in (*good, "models/omega2/d.pt", "elsewhere/e.pt"):
        table.save(folders / place, lgd.EDM())
    named = ("a.pt", "sub/b.pt", "c.pt", "sub/../a.pt", str(folders / "models/omega/a.pt"))
    for path in named:
        assert torch.equal(comfyui.load_table(path).values, table.values)
        assert comfyui.LearnedGuidance.IS_CHANGED(path, condition=0) > 0
    (folders / "models/omega/link.pt").symlink_to(folders / "elsewhere/e.pt")  # links are allowed
    comfyui.load_table("link.pt")
    elsewhere = "../../../etc/passwd ../../elsewhere/e.pt ../../elsewhere/missing.pt ../omega2/d.pt"
    refused = ["", "\0", *f"missing.pt sub .. /etc/passwd {elsewhere}".split()]
    refused += [str(folders / path) for path in ("elsewhere/e.pt", "models/omega2/d.pt", "models/omega")]
    for path in (None, 3, b"a.pt"):
        with pytest.raises(ValueError, match=f"`path` is a {type(path).__name__}, expected the name of a file"):
            comfyui.load_table(path)
        assert math.isnan(comfyui.LearnedGuidance.IS_CHANGED(path))
    for path in refused:
        with pytest.raises(ValueError) as error:
            comfyui.load_table(path)
        assert one_line(error) == (
            f"LearnedGuidance: `path` is {path!r}, expected the name of a file in ComfyUI's models/omega, or in a "
            "folder that extra_model_paths.yaml names under omega"
        )
        assert math.isnan(comfyui.LearnedGuidance.IS_CHANGED(path))


@pytest.mark.parametrize("name", ["values", "s_knots", "t_knots"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tables_that_are_not_finite(name, value):
    kept = {"values": torch.ones(1, 3, 3), "s_knots": torch.tensor([0.0, 1.0, 2.0])}
    kept["t_knots"] = kept["s_knots"] + 1
    kept[name].view(-1)[0 if value < 0 else -1] = value
    if not math.isnan(value) or name == "values":
        with pytest.raises(ValueError, match=f"`{name}` (holds NaN or infinities|must increase strictly and)"):
            comfyui.CFGFunction(lgd.OmegaTable(**kept))


class Sampling:
    """Stand in for a model_sampling, up to `sigma_max`; its timesteps are `timestep(sigma)`."""

    def __init__(self, sigma_max, timestep):
        self.sigma_max, self.timestep = torch.tensor(sigma_max), timestep


DISCRETE = Sampling(14.6, lambda sigma: (sigma.log() + 3.5) * 161.6)  # 999 at 14.6
EDM = Sampling(80.0, lambda sigma: sigma.log() / 4)
FLOW = Sampling(1.0, lambda sigma: sigma)
FLOW_1000 = Sampling(1.0, lambda sigma: sigma * 1000)


@pytest.mark.parametrize(
    "last, times, sampling, said",
    [
        (14.6, "sigma", DISCRETE, None),
        (80.0, "sigma", DISCRETE, None),
        (5.0, "sigma", DISCRETE, None),
        (999.0, "timestep", DISCRETE, None),
        (80.0, "sigma", EDM, None),
        (1.0, "sigma", FLOW, None),
        (1.0, "timestep", FLOW, None),
        (1000.0, "timestep", FLOW_1000, None),
        (1.0, "sigma", DISCRETE, "end at 1, but this model's sigmas reach 14.6; make a table whose knots"),
        (1.0, "sigma", EDM, "end at 1, but this model's sigmas reach 80; make"),
        (1.0, "timestep", DISCRETE, "end at 1, but this model's timesteps reach 99[89]"),
        (14.6, "timestep", DISCRETE, "reach 99[89].*; set times to 'sigma', which fits"),
        (999.0, "sigma", DISCRETE, "reach 14.6; set times to 'timestep', which fits"),
        (1.0, "timestep", FLOW_1000, "set times to 'sigma', which fits"),
        (80.0, "sigma", FLOW, "end at 80, but this model's sigmas reach 1; make"),
        (1000.0, "sigma", FLOW_1000, "set times to 'timestep'"),
    ],
)
def test_knots_of_another_scale(tmp_path, last, times, sampling, said):
    """Check that the node refuses such knots, and the function if it is set without the node; the remedy works."""
    knots = torch.linspace(0, last, 4)
    table = lgd.OmegaTable(torch.ones(1, 4, 4), knots, knots)
    table.save(tmp_path / "omega.safetensors", lgd.EDM())
    model = Patcher()
    model.get_model_object = {"model_sampling": sampling}.__getitem__
    function = comfyui.CFGFunction(table, times=times)
    x, cond, uncond = tensors()
    plain = Patcher()
    plain.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)
    sigma = (sampling.sigma_max / 2).expand(2)
    calls = [
        lambda: comfyui.LearnedGuidance().patch(model, str(tmp_path / "omega.safetensors"), times=times),
        lambda: denoised(plain, x, sigma, cond, uncond, 4.0, model=SimpleNamespace(model_sampling=sampling)),
    ]
    for call in calls:
        if said is None:
            call()
        else:
            with pytest.raises(ValueError, match=said) as error:
                call()
            if "which fits" in one_line(error):
                comfyui.CFGFunction(table, times=str(error.value).split("'")[-2]).check_model(sampling)


def test_knots_of_another_scale_than_the_run():
    """Check the scale without a model; a run may begin anywhere below the model's largest sigma."""
    for last, refused in ((1.0, True), (14.0, False), (999.0, False)):
        knots = torch.linspace(0, last, 4)
        model = Patcher()
        model.set_model_sampler_cfg_function(comfyui.CFGFunction(lgd.OmegaTable(torch.ones(1, 4, 4), knots, knots)))
        x, cond, uncond = tensors()
        with pytest.raises(ValueError, match="this run's sigmas reach 14") if refused else contextlib.nullcontext():
            denoised(model, x, SIGMAS[:1].expand(2), cond, uncond, 4.0)
