"""The ComfyUI node, with a stand-in that keeps ModelPatcher's contract and calls as ComfyUI's sampler does."""

import copy
import importlib.util
import inspect
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.integrations import comfyui

SIGMAS = torch.tensor([14.0, 5.0, 1.0, 0.2, 0.0])


class Patcher:
    """What the node and the sampler touch of a ModelPatcher."""

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


def denoised(patcher, x, sigma, cond, uncond, scale):
    """The guided x0 of one call of the sampler; the unconditional call is left out at scale 1, but for the option."""
    options = {**patcher.model_options, "transformer_options": {"sample_sigmas": SIGMAS}}
    if math.isclose(scale, 1.0) and not options.get("disable_cfg1_optimization", False):
        uncond = torch.zeros_like(cond)
    if "sampler_cfg_function" not in options:
        return uncond + (cond - uncond) * scale
    sampling = SimpleNamespace(timestep=lambda sigma: sigma.log() * 100 + 500)
    args = {
        "cond": x - cond, "uncond": x - uncond, "cond_scale": scale, "timestep": sigma, "input": x, "sigma": sigma,
        "cond_denoised": cond, "uncond_denoised": uncond, "model": SimpleNamespace(model_sampling=sampling),
        "model_options": options,
    }  # fmt: skip
    return x - options["sampler_cfg_function"](args)


@pytest.fixture
def table(tmp_path):
    s, t = torch.linspace(-1, 900, 7), torch.linspace(0, 950, 6)
    table = lgd.OmegaTable(torch.rand(3, 7, 6, generator=torch.Generator().manual_seed(0)), s, t)
    comfyui.save_table(table, tmp_path / "omega.pt")
    return table


def tensors(count=3, batch=2):
    return torch.randn(count, batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


@pytest.mark.parametrize("times", comfyui.TIMES)
@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("step", range(4))
def test_the_node(table, tmp_path, times, scale, step):
    """The x0 of guided_score, with omega at the sigmas of the step, whatever the sampler's cfg."""
    before = Patcher()
    (model,) = comfyui.LearnedGuidance().patch(before, str(tmp_path / "omega.pt"), 2, 1.5, times)
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
    (model,) = comfyui.LearnedGuidance().patch(Patcher(), str(tmp_path / "omega.pt"))
    x, cond, uncond = (one.half() for one in tensors())
    assert denoised(model, x, SIGMAS[:1].half().expand(2), cond, uncond, 4.0).dtype == torch.float16


def test_what_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match="`condition` is 3, expected one of the table's: 0 to 2"):
        comfyui.CFGFunction(table, 3)
    with pytest.raises(ValueError, match="`times` is 'step'"):
        comfyui.CFGFunction(table, times="step")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no omega table"):
        comfyui.load_table(tmp_path / "other.pt")
    x, cond, uncond = tensors()
    with pytest.raises(ValueError, match="no sample_sigmas"):
        comfyui.CFGFunction(table)({"cond": cond, "uncond": uncond, "sigma": SIGMAS[:1], "model_options": {}})


def test_the_file_alone(tmp_path):
    """Copied, and imported from there as ComfyUI does, where triton cannot be."""
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
