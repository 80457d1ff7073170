"""Test that choices in signatures are Literal types, which an editor offers and a type checker checks."""

import inspect
import runpy
import typing
from pathlib import Path

import pytest

import lgd_kernels as lgd
from lgd_kernels import learn, metrics
from lgd_kernels.guidance.stateful import Feedback
from lgd_kernels.integrations import k_diffusion
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.sampling import log_prob, sampler, solvers

CHOICES = {
    "impl": impls.NAMES,
    "precision": ("direct", "product"),
    "prediction": PREDICTIONS,
    "reduction": ("sum", "mean"),
    "rule_space": ("prediction", "x0"),
    "variant": ("bh1", "bh2"),
}
PUBLIC = [getattr(owner, name) for owner in (lgd, learn) for name in owner.__all__]
PUBLIC += [solvers.StepPlan.step, k_diffusion.GuidedDenoiser, Feedback, *vars(Feedback).values()]
for module in (solvers, sampler, log_prob, metrics):
    own = (value for name, value in vars(module).items() if not name.startswith("_"))
    PUBLIC += [value for value in own if getattr(value, "__module__", None) == module.__name__]
CASES = {
    f"{function.__qualname__}({name})": (function, name)
    for function in PUBLIC
    if inspect.isfunction(function) or (inspect.isclass(function) and not issubclass(function, Exception))
    for name in inspect.signature(function).parameters
    if name in CHOICES
}


def test_the_typed_script_runs(capsys):
    """`make lint` checks the types of this script; a hint that is never true would not fail there."""
    runpy.run_path(str(Path(__file__).parent / "typing" / "user_script.py"))["main"]()
    assert "tensor" in capsys.readouterr().out


def test_this_file_sees_the_choices():
    assert {name for _, name in CASES.values()} == CHOICES.keys() and len(CASES) > 25


@pytest.mark.parametrize("case", CASES)
def test_choices_are_literal(case):
    function, name = CASES[case]
    owner = function.__init__ if inspect.isclass(function) and "__init__" in vars(function) else function
    hint = typing.get_type_hints(owner, localns={"OmegaTable": lgd.OmegaTable})[name]
    literals = [one for one in (hint, *typing.get_args(hint)) if typing.get_origin(one) is typing.Literal]
    assert [typing.get_args(one) for one in literals] == [CHOICES[name]]
    assert str not in typing.get_args(hint)
