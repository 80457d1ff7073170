"""Test the benchmarks: a wrong kernel is not timed, and verdicts on times follow from the samples."""

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import __main__, environment, host, measure, report, timing, workload
from lgd_kernels import testing
from lgd_kernels.runtime import impls

SHAPE = (4, 3, 16, 16)


def run(*arguments):
    return __main__.main(["--device", "cpu", "--rounds", "3", "--no-compile", *map(str, arguments)])


@pytest.fixture
def tiny(monkeypatch):
    """One small workload for each elementwise op."""
    ops = ("guided_step", "guided_score", "guided_energy", "energy_mmd", "moments", "combine", "dynamic_threshold")
    step, score, *others = (importlib.import_module(f"benchmarks.{op}") for op in ops)
    for other in others:
        monkeypatch.setattr(other, "WORKLOADS", [])
    monkeypatch.setattr(
        step, "WORKLOADS", [step.workload(SHAPE, torch.float32, gradients=(step.TO_OMEGA, step.TO_ALL))]
    )
    monkeypatch.setattr(score, "WORKLOADS", [score.workload("omega [B]", SHAPE, torch.bfloat16, score.BOTH)])
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)


@pytest.mark.extension
def test_right_kernels_are_timed(tiny, tmp_path, capsys):
    """The exit status is 0, the JSON is complete, a run compared with itself has no change, a picture is written."""
    assert run("--json", tmp_path / "run.json") == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text())
    assert "guided_step [4,3,16,16] float32, x0: backward to omega" in said and "WRONG" not in said
    assert max(map(len, said.splitlines())) <= 120
    assert {"date", "commit", "dirty", "threads", "cpu", "instruction_set", "torch"} <= found["environment"].keys()
    assert len(found["rows"]) == 5 + 5
    for row in found["rows"]:
        assert len(row["copy"]["direct"]) == 3 and row["best"] == {"direct": "eager"}
        for one in row["variants"]:
            assert one["status"] == "ok" and len(one["samples"]["direct"]) == 3 and 0 <= one["error"] < 1e-2

    verdicts = report.compare(found, found)
    assert len(verdicts) == 11 and all(line.startswith("no change") for line in verdicts[:-1])
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("benchmarks.plot")
    assert plot.roofline(found, tmp_path).stat().st_size > 10_000


@pytest.mark.extension
def test_a_wrong_kernel_is_not_timed(tiny, tmp_path, monkeypatch, capsys):
    """omega is 1 % off in the forward, in every dtype, and its gradient 1 % off in the backward."""
    right = impls.launcher

    def off(omega):
        return omega._replace(tensor=omega.tensor * 1.01)

    def wrong(op, impl):
        def forward(out, a):
            if op == "guided_score":
                a = a._replace(omega=off(a.omega))
            else:
                a = a._replace(scalars=a.scalars._replace(omega=off(a.scalars.omega)))
            right(op, impl).forward(out, a)

        def backward(grads, b):
            right(op, impl).backward(grads, b)
            grads[-1].mul_(1.01)

        return types.SimpleNamespace(forward=forward, backward=backward)

    monkeypatch.setattr(impls, "launcher", wrong)
    assert run("--json", tmp_path / "run.json") == 1
    assert "  cpu" in (said := capsys.readouterr().out) and " WRONG: max error" in said
    for row in json.loads((tmp_path / "run.json").read_text())["rows"]:
        cpu, eager = row["variants"]
        assert cpu["status"] == "WRONG" and "allowed" in cpu["message"] and not cpu["samples"] and not cpu["ratio"]
        assert eager["status"] == "ok" and eager["samples"]


def test_what_cannot_run_says_why(tiny, capsys):
    assert run("guided_score", "--impl", "cuda") == 0
    assert (
        "cannot run: the extension lgd_kernels._C_cuda" in (said := capsys.readouterr().out) or "CUDA tensors" in said
    )
    with pytest.raises(SystemExit):
        run("guided_scores")
    known = ", ".join(impls.ops())
    assert f"unknown workload: guided_scores; there are {known}" in capsys.readouterr().err


@pytest.mark.extension
@pytest.mark.parametrize(
    ("op", "arguments", "options"),
    [
        ("guided_step", (SHAPE, torch.bfloat16), dict(noise="seed", gradients=(("omega",),))),
        ("guided_step", (SHAPE, torch.bfloat16), dict(omega="table", gradients=(("omega",),))),
        ("guided_energy", ((3, 4, 300), torch.float32), {}),
        ("guided_energy", ((3, 4, 300), torch.bfloat16), dict(draws=True)),
        ("guided_energy", ((3, 4, 300), torch.float32), dict(omegas=5)),
    ],
    ids=str,
)
def test_every_baseline_agrees(op, arguments, options, monkeypatch):
    """Some baselines draw their own noise, and torch compiles others; here without its slow last step."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    one = importlib.import_module(f"benchmarks.{op}").workload(*arguments, **options)
    for row in measure.measure(one, "cpu", [], 1, True):
        assert len(row["variants"]) >= 3
        assert [(each["name"], each["message"]) for each in row["variants"] if each["status"] != "ok"] == []


def test_noise_of_its_own_is_looked_at():
    """Noise that cannot be drawn again is checked by its statistics: too small, off centre, or with a wrong omega."""
    step = importlib.import_module("benchmarks.guided_step")
    one = step.workload((16, 4, 64, 64), torch.float32, noise="seed")
    inputs = one.arguments(torch.Generator().manual_seed(0))
    verifier = measure.Verifier(one, workload.kinds(one)[0], inputs)
    z = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1))

    def drawn(noise, **changes):
        return verifier.results(inputs | {"seed": None, "noise": noise} | changes, False)[0]

    verifier.is_normal(drawn(z))
    for noise, message in ((z * 0.98, "variance"), (z + 0.02, "mean")):
        with pytest.raises(AssertionError, match=message):
            verifier.is_normal(drawn(noise))
    with pytest.raises(AssertionError, match="its noise"):
        verifier.is_normal(drawn(z, omega=inputs["omega"] * 1.05))


def test_every_op_has_workloads():
    assert workload.ops() == impls.ops()
    for op in impls.ops():
        module = importlib.import_module(f"benchmarks.{op}")
        names = [(one.case, one.shape, one.dtype) for one in module.WORKLOADS]
        assert len(names) == len(set(names)) and {one.op for one in module.WORKLOADS} == {op}
        assert any(one.quick and "cpu" in one.devices for one in module.WORKLOADS)
        one = min(module.WORKLOADS, key=lambda one: one.bytes)
        arguments = one.arguments(torch.Generator())
        assert {name for wanted in one.backward for name in wanted} <= arguments.keys()


def test_ratios_are_formed_round_by_round():
    """A slowdown that all variants of a round share cancels: here every other round is ten times as slow."""
    slow = [1.0, 10.0, 1.0, 10.0, 1.0]
    best, mine = [2.0 * factor for factor in slow], [1.0 * factor for factor in slow]
    assert timing.spread(timing.ratios(best, mine)) == [2.0, 2.0, 2.0]
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == [3.5, 2.0, 5.0]
    samples = {"copy": {"direct": slow}, "eager": {"direct": best}, "less": {"direct": mine}, "cpu": {"direct": mine}}
    variants = [{"name": name, "ours": name == "cpu", "same_work": name != "less"} for name in ("cpu", "eager", "less")]
    row = measure.compared(samples, variants)
    assert row["best"] == {"direct": "eager"}  # "less" is faster, and does less
    assert [one["ratio"]["direct"][0] for one in row["variants"]] == [2.0, 1.0, 2.0]
    assert [one["of_copy"]["direct"][0] for one in row["variants"]] == [1.0, 0.5, 1.0]


def test_a_round_takes_each_variant_once_after_any_other():
    taken = []
    samplers = {name: lambda name=name: taken.append(name) or float(len(taken)) for name in "abc"}
    samples = timing.alternate(samplers, 30)
    rounds = ["".join(taken[first : first + 3]) for first in range(0, 90, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) == 6
    assert all(taken[int(at) - 1] == name for name, found in samples.items() for at in found)
    assert {name: len(found) for name, found in samples.items()} == {"a": 30, "b": 30, "c": 30}


def test_compare_flags_what_leaves_both_spreads():
    def ran(of_copy, ratio):
        one = {"name": "cpu", "ours": True, "status": "ok", "of_copy": {"direct": of_copy}, "ratio": {"direct": ratio}}
        row = {"op": "o", "shape": [1], "dtype": "float32", "case": "c", "kind": "forward", "variants": [one]}
        return {"rows": [row]}

    def verdict(old, new):
        return report.compare(ran(*old), ran(*new))[0].split(" o [1]")[0].strip()

    steady = [0.9, 0.8, 1.0], [2.0, 1.9, 2.1]
    assert verdict(steady, steady) == "no change"
    assert verdict(steady, ([0.5, 0.4, 0.6], [1.0, 0.9, 1.1])) == "slower"
    assert verdict(steady, ([0.5, 0.4, 0.6], [2.0, 1.9, 2.1])) == "no change"  # another copy, or another baseline
    assert verdict(steady, ([1.5, 1.4, 1.6], [4.0, 3.9, 4.1])) == "faster"
    assert report.compare({"rows": []}, ran(*steady))[0].startswith("new")


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(250_000)  # 1 MB

    def call():
        return ((x + 1) * 2).neg_().clone()  # two temporaries, and the result beside the second

    assert abs(timing.peak_memory(call, "cpu") - 2e6) < 2e4


def test_describes_its_surroundings():
    found = environment.describe("cpu")
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert all(isinstance(line, str) and line for line in environment.in_words(found))
    assert report.seconds(1.5e-6) == "1.50 us" and report.seconds(0.25) == "250 ms" and report.bytes_(512) == "512 B"


def test_terms_of_a_gradient_are_those_of_the_tests(generator):
    """sum |b upstream (cond - uncond)| is computed without reference to the op."""
    step = importlib.import_module("benchmarks.guided_step")
    one = step.workload(SHAPE, torch.float32, gradients=(step.TO_OMEGA,))
    inputs = one.arguments(generator)
    verifier = measure.Verifier(one, workload.kinds(one)[1], inputs)
    b = (inputs["levels"].signal_s.double() * inputs["levels"].gap.double()) / (
        inputs["levels"].signal_s.double() * inputs["levels"].noise_t.double()
    )
    d, cond, uncond = (testing.promoted(value) for value in (verifier.upstream, inputs["cond"], inputs["uncond"]))
    expected = (d * (cond - uncond)).abs().flatten(1).sum(1) * b.abs()
    torch.testing.assert_close(verifier.terms("omega"), expected)


@pytest.mark.extension
def test_host_time_of_a_gpu_call_is_measured_without_a_gpu():
    """Triton's own binder and C launch run on a libcuda that does nothing; in another process, for drivers are kept."""
    pytest.importorskip("triton")
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    script = (
        "import contextlib\n"
        "from benchmarks import host, stubs, timing\n"
        "timing.SAMPLE_SECONDS = 1e-3\n"
        "stubs.cuda_launches = contextlib.nullcontext\n"  # its bindings take a minute to compile
        "host.impls._op_module('guided_score').IMPLEMENTATIONS.pop('cuda')\n"
        "host.main(['guided_score'], 2)\n"
    )
    environment_ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=environment.ROOT, env=environment_, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    calls = ["triton: launcher", "triton: launcher, backward", "triton: whole call", "eager formula", host.SMALLEST]
    rows = run.stdout.splitlines()[1:]
    assert [row[19:48].strip() for row in rows] == calls
    assert all(float(re.sub(r"\[.*?\]", "", row[48:]).split()[1]) > 0 for row in rows)
