"""Random calls of every public function: a few here, the same ones every time; `make fuzz` makes 100,000."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import checks, functions, inputs, run, strategies
from fuzz.inputs import Call, Steps, T

import lgd_kernels as lgd

pytestmark = pytest.mark.extension
SCORE = Call("guided_score", {"cond": T((3, 5)), "uncond": T((3, 5), seed=1), "omega": 0.5})


def test_a_fixed_set_of_calls_has_no_fault():
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests)))}
    command = [sys.executable, "-m", "fuzz.run", "--calls", "600", "--seed", "0", "--jobs", "1"]
    ended = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "600 calls of seed 0" in ended.stdout


def test_every_op_and_every_metric_is_called():
    public = {name for name in lgd.__all__ if name.islower()} - {"available_impls", "why_not"}
    assert public <= strategies.FUNCTIONS.keys()


def score(change):
    """Change guided_score, but not its reference."""

    def changed(cond, uncond, omega, impl=None):
        guided = lgd.guided_score(cond, uncond, omega, impl=impl)
        return guided if impl == "reference" else change(cond, guided)

    return changed


def writes(cond, guided):
    cond.mul_(1)
    return guided


def fails(cond, guided):
    raise ValueError("something is wrong")


def refuses(cond, guided):
    raise ValueError("guided_score: `cond` is refused")


PLANTED = {
    "budget": (lambda cond, guided: guided * (1 + 1e-6), "further from float64"),
    "NaN": (lambda cond, guided: guided / 0, "NaN|further from float64"),
    "bits": (lambda cond, guided: guided + torch.rand(()) * 1e-7, "other bits"),
    "threads": (lambda cond, guided: guided * (1 + 1e-7 * (torch.get_num_threads() - 1)), "other bits: on two threads"),
    "written": (writes, "an input was written to"),
    "dtype": (lambda cond, guided: guided.double(), "dtype torch.float64"),
    "strides": (lambda cond, guided: guided.t().contiguous().t(), "not contiguous"),
    "no name": (fails, "does not name the function"),
    "refusal": (refuses, "a good call is refused"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_finds_a_planted_fault(planted, monkeypatch):
    assert checks.check(SCORE) is None
    change, said = PLANTED[planted]
    monkeypatch.setitem(functions.CALLED, "guided_score", score(change))
    torch.manual_seed(0)
    fault = checks.check(SCORE)
    assert fault is not None and re.search(said, str(fault))


def test_simplifies_a_call(monkeypatch):
    """Arguments that do not matter to the fault are simplified."""
    monkeypatch.setitem(functions.CALLED, "guided_score", score(PLANTED["budget"][0]))
    uncond = T((3, 5), "float64", special="huge")
    call = Call("guided_score", {"cond": T((3, 5), layout="strided", seed=3), "uncond": uncond, "omega": 2})
    plainest = Call("guided_score", {"cond": T((3, 5)), "uncond": T((3, 5)), "omega": 2})
    assert run.simplified(call, checks.check(call).key)[0] == plainest


@pytest.mark.parametrize(
    ("code", "said"),
    [("import os; os.abort()", "ended with -6"), ("while True: pass", "no end within"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_crash_or_a_hang_is_traced_to_its_call(code, said, tmp_path):
    note = tmp_path / "note"
    note.write_text(f"41 {SCORE!r}")
    found = run.watched([sys.executable, "-c", code], note, 2)
    assert found.calls == 41 and len(found.faults) == 1
    assert said in found.faults[0]["what"] and found.faults[0]["call"] == repr(SCORE) and not found.faults[0]["known"]


def test_a_call_prints_as_what_makes_it():
    call = Call(
        "guided_step", {"x": T((2, 3), "float16", special="nan"), "levels": Steps(2, ends=True)}, False, "autocast"
    )
    assert eval(repr(call), vars(inputs)) == call
