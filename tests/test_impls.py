"""Test which implementation runs, why another does not, and that an import stays cheap and silent."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import __main__ as program
from lgd_kernels import testing
from lgd_kernels.ops.guided_score import op
from lgd_kernels.runtime import builds, impls

ROOT = Path(__file__).parents[1]
ONE = torch.ones(1, 2)
PACKAGES = ("lgd_kernels", "lgd_kernels.omega", "lgd_kernels.integrations")


def forget():
    impls._load.cache_clear()
    impls._choose.cache_clear()


@pytest.fixture(autouse=True)
def uninterpreted(monkeypatch):
    """Undo the interpreter's setting, so that a test sees what a user's machine shows."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(impls, "_load", lambda name: (None, f"the extension lgd_kernels.{name} is not built (as if)"))


@pytest.fixture
def with_extension():
    if impls.extension_error():
        pytest.skip(impls.extension_error())


def python(code, **environment):
    """Return (stdout, stderr) of a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_extension_is_built_where_it_must_be():
    """LGD_REQUIRE_EXT=1, as continuous integration sets it, turns the skips of a missing extension into a failure."""
    if os.environ.get("LGD_REQUIRE_EXT") != "1" and impls.extension_error():
        pytest.skip(impls.extension_error())
    assert impls.extension_error() == ""
    assert impls.extension().__name__ == "lgd_kernels._C"


@pytest.mark.parametrize("name", impls.ops())
def test_available_on_the_cpu(name, with_extension):
    assert lgd.available_impls(name) == lgd.available_impls(name, torch.device("cpu")) == ("cpu", "reference")


@pytest.mark.parametrize("name", impls.ops())
def test_available_elsewhere(name):
    """The automatic choice comes first; a device without kernels has the reference."""
    pytest.importorskip("triton")
    found = lgd.available_impls(name, "cuda:0")
    assert found == tuple(impl for impl in impls.ORDER["cuda"] if impl in found)
    offered = importlib.import_module(f"lgd_kernels.ops.{name}.op").IMPLEMENTATIONS
    assert found[-1] == "reference" and ("triton" in found) == ("triton" in offered)
    assert lgd.available_impls(name, "mps") == ("reference",)


def test_interpreter_makes_triton_available(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" in lgd.available_impls("guided_score", "cpu")
    assert impls.choose("guided_score", None, ONE.device, ONE.dtype) != "triton"  # never chosen automatically


def test_available_without_the_extension(without_extension):
    assert lgd.available_impls("guided_score", "cpu") == ("reference",)


@pytest.mark.parametrize(
    ("impl", "device", "reasons"),
    [
        ("reference", "cpu", []),
        ("reference", "cuda", []),
        ("cpu", "cuda", ["cpu runs on CPU tensors, these are on cuda"]),
        ("triton", "cpu", ["triton runs on GPU tensors, these are on the CPU (tests run its interpreter: "]),
        ("triton", "cuda", []),
        ("triton", "mps", ["triton runs on CUDA and ROCm tensors, these are on mps"]),
    ],
)
def test_why_not_a_device(impl, device, reasons, with_extension):
    if impl == "triton":
        pytest.importorskip("triton")
    found = lgd.why_not("guided_score", impl, device=device)
    assert len(found) == len(reasons) and all(one.startswith(two) for one, two in zip(found, reasons, strict=True))


def test_why_not_a_dtype():
    reason = "triton does not take float64 (it takes bfloat16, float16, float32)"
    assert lgd.why_not("guided_score", "triton", ONE, ONE.double())[-1] == reason
    assert reason not in lgd.why_not("guided_score", "triton", ONE.half())
    assert lgd.why_not("guided_score", "reference", ONE.int()) == [
        "reference does not take int32 (it takes bfloat16, float16, float32, float64)"
    ]


def test_why_not_gives_every_reason(without_extension):
    reasons = lgd.why_not("guided_score", "cpu", ONE.int(), ONE.int(), device="cuda")
    assert [reason.split(" ", 2)[:2] for reason in reasons] == [["the", "extension"], ["cpu", "runs"], ["cpu", "does"]]


def test_why_not_what_is_not_written(monkeypatch):
    monkeypatch.delitem(op.IMPLEMENTATIONS, "cuda", raising=False)
    assert lgd.why_not("guided_score", "cuda", ONE) == ["guided_score has no 'cuda' implementation in this version"]


@pytest.mark.parametrize(
    ("cuda", "hip", "interpret", "hint"),
    [
        ("13.0", None, "0", "(pip install 'triton==3.6.0')"),
        (None, "7.0", "0", "(install triton==3.6.0 from where this torch came from)"),
        (None, None, "0", "(torch's wheels for CUDA and ROCm bring it; this torch is for the CPU)"),
        (None, None, "1", "(pip install 'triton==3.6.0')"),
    ],
)
def test_why_not_without_triton(monkeypatch, cuda, hip, interpret, hint):
    """torch pins the triton that fits, so the message names that version."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["numpy", "triton==3.6.0; sys_platform == 'linux'"]
    )
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert lgd.why_not("guided_score", "triton", device="cuda") == [f"triton is not installed {hint}"]


def test_why_not_without_triton_elsewhere(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.setattr(sys, "platform", "darwin")
    reason = "triton is not installed (torch brings it on Linux only)"
    assert lgd.why_not("guided_score", "triton", device="cuda") == [reason]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (True, "the extension lgd_kernels._C is not built (it needs a C++17 compiler at install time)"),
        (False, "the extension lgd_kernels._C does not load: undefined symbol"),
    ],
)
def test_why_the_extension_is_missing(monkeypatch, tmp_path, missing, reason):
    """Messages distinguish an extension that is not built from one that does not load."""

    def fail(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(builds, "PACKAGE", tmp_path)
    monkeypatch.setattr(builds, "extension_in", lambda folder, name: None if missing else folder / name)
    monkeypatch.setattr(builds, "elsewhere", lambda name: [])
    monkeypatch.setattr(builds, "note", lambda name: "")
    assert impls._load.__wrapped__("_C") == (None, reason)  # without the cache


@pytest.mark.parametrize("call", [lgd.available_impls, lambda name: lgd.why_not(name, "cpu")])
def test_refuses_unknown_ops(call):
    with pytest.raises(ValueError, match=f"`op` is 'guided_soup', expected one of {', '.join(impls.ops())}"):
        call("guided_soup")


def test_refuses_unknown_impls():
    with pytest.raises(ValueError, match="why_not: `impl` is 'gpu', expected one of cuda, triton, cpu, reference"):
        lgd.why_not("guided_score", "gpu")
    with pytest.raises(
        ValueError, match="guided_score: `impl` is 'gpu', expected None or one of cuda, triton, cpu, reference"
    ):
        lgd.guided_score(ONE, ONE, 1.0, impl="gpu")


def test_choice(with_extension):
    assert impls.choose("guided_score", None, ONE.device, ONE.dtype) == "cpu"
    assert impls.choose("guided_score", "reference", ONE.device, ONE.dtype) == "reference"
    assert impls.choose("guided_score", None, torch.device("meta"), ONE.dtype) == "reference"
    assert impls.choose("guided_score", None, ONE.device, ONE.dtype, torch.int32) == "reference"  # of int32


def test_an_explicit_impl_is_the_one_that_runs(monkeypatch, with_extension):
    """The backward uses the same implementation."""
    calls = []
    launcher = impls.launcher

    def watched(name, impl):
        calls.append(impl)
        return launcher(name, impl)

    monkeypatch.setattr(impls, "launcher", watched)
    cond = ONE.clone().requires_grad_()
    lgd.guided_score(cond, ONE, 1.0, impl="reference").sum().backward()
    assert calls == []
    lgd.guided_score(cond, ONE, 1.0, impl="cpu").sum().backward()
    assert calls == ["cpu", "cpu"]
    lgd.guided_score(cond, ONE, 1.0)
    assert calls == ["cpu"] * 3


def test_an_explicit_impl_never_falls_back(with_extension):
    message = (
        r"guided_score: impl='triton' cannot run here: triton runs on GPU tensors, .*; triton does not take float64 "
        r".*\. These can: cpu, reference; impl=None chooses"
    )
    with pytest.raises(ValueError, match=message):
        lgd.guided_score(ONE.double(), ONE, 1.0, impl="triton")


def test_an_explicit_impl_never_falls_back_to_the_reference(without_extension):
    message = r"impl='cpu' cannot run here: the extension .* is not built \(as if\)\. These can: reference;"
    with pytest.raises(ValueError, match=message):
        lgd.guided_score(ONE, ONE, 1.0, impl="cpu")


def test_an_explicit_impl_never_falls_back_under_vmap():
    with pytest.raises(ValueError, match="guided_score: impl='cpu' has no rule for vmap, jvp or func.grad; impl=None"):
        torch.vmap(lambda cond: lgd.guided_score(cond, cond, 1.0, impl="cpu"))(torch.ones(2, 1, 2))


def test_everything_works_without_the_extension(without_extension):
    """The automatic choice is the reference: the same values, gradients and noise."""
    assert impls.choose("guided_score", None, ONE.device, ONE.dtype) == "reference"
    cond, omega = torch.tensor([[2.0]], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    guided = lgd.guided_score(cond, torch.tensor([[1.0]]), omega)
    guided.sum().backward()
    assert guided.item() == 2.5 and cond.grad.item() == 1.5 and omega.grad.item() == 1

    levels = lgd.RectifiedFlow().levels(torch.tensor([1.0]), 0.5)
    x_s = lgd.guided_step(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[0.0]]), 1.0, levels)
    assert x_s.item() == 2  # half of x = 2 and half of 1 + 1 (1 - 0)
    assert lgd.philox_normal((2, 3), seed=1).shape == (2, 3)


def test_import_is_silent_and_light():
    """Neither triton nor the extension is loaded before a call needs it, and a call on the CPU never needs triton."""
    code = """
import json, sys
import lgd_kernels as lgd
def loaded():
    heavy = "triton", "lgd_kernels._C", "lgd_kernels._C_cuda", "matplotlib", "sklearn", "safetensors"
    heavy += tuple("lgd_kernels." + name for name in ("learn", "metrics", "sampling.solvers", "integrations"))
    return [name for name in heavy if name in sys.modules]
before = loaded()
import torch
from lgd_kernels.runtime import impls
lgd.guided_score(torch.ones(1, 2), torch.ones(1, 2), 1.0)
print(json.dumps([before, loaded(), impls.extension_error()]))
"""
    out, errors = python(code)
    before, after, missing = json.loads(out)  # nothing else was printed
    assert errors == "" and before == []
    assert after == ([] if missing else ["lgd_kernels._C"])


def test_submodules_are_there_on_first_use():
    """Lazy submodules are listed in dir() and loaded on use; other names raise AttributeError as usual."""
    code = """
import sys
import lgd_kernels as lgd
names = "integrations learn log_prob metrics omega rules sample sampler solvers".split()
assert set(names) <= set(dir(lgd)) and "lgd_kernels.metrics" not in sys.modules
found = [getattr(lgd, name) for name in names]
assert [one.__name__.split(".")[-1] for one in found] == names
assert lgd.sample is lgd.sampler.sample and lgd.metrics is sys.modules["lgd_kernels.metrics"]
assert callable(lgd.omega.files.load) and callable(lgd.integrations.k_diffusion.sample_euler)
assert lgd.learn.fit.__name__ == "lgd_kernels.learn.fit" and callable(lgd.learn.logs.Csv)
assert callable(lgd.omega.plot.draw)
assert "files" in dir(lgd.omega) and "fit" in dir(lgd.learn) and "comfyui" in dir(lgd.integrations)
for package in lgd, lgd.omega, lgd.integrations:
    try:
        package.guided_soup
    except AttributeError as error:
        print(error)
"""
    out, errors = python(code)
    said = [f"module '{name}' has no attribute 'guided_soup'" for name in PACKAGES]
    assert errors == "" and out.splitlines() == said


def test_import_without_the_extension_and_without_triton():
    code = """
import sys
sys.modules["lgd_kernels._C"] = sys.modules["triton"] = None
import torch
import lgd_kernels as lgd
print(lgd.available_impls("guided_step"), lgd.guided_score(torch.ones(1, 1), torch.zeros(1, 1), 1.0).item())
"""
    out, errors = python(code)
    assert errors == "" and out == "('reference',) 2.0\n"


def test_version(capsys):
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lgd_kernels {lgd.__version__}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(unbuffered):
    """`python -m lgd_kernels info | head -1` closes the pipe before all is written."""
    running = subprocess.Popen(
        [sys.executable, "-m", "lgd_kernels", "info"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    running.stdout.close()
    errors = running.stderr.read()
    running.stderr.close()
    assert running.wait(timeout=120) == 141 and errors == ""


def test_another_broken_pipe_is_an_error(monkeypatch):
    """A broken pipe other than stdout is an error."""

    def broken(arguments):
        raise BrokenPipeError("a worker died")

    monkeypatch.setattr(program, "main", broken)
    with pytest.raises(BrokenPipeError, match="a worker died"):
        program.command()


def test_a_closed_stdout_is_no_error(monkeypatch):
    """`python -m lgd_kernels info >&-` leaves sys.stdout None."""
    monkeypatch.setattr(program, "main", lambda arguments: 0)
    monkeypatch.setattr(sys, "stdout", None)
    assert program.command() == 0


@pytest.mark.parametrize("kind", ["float", "bool", "ndarray", "Tensor", "list"])
def test_an_impl_that_is_no_name(kind):
    x = torch.ones(2, 3)
    impl = {"float": 1.0, "bool": True, "ndarray": np.ones(2), "Tensor": torch.ones(2), "list": ["cpu"]}[kind]
    calls = {
        "guided_score": lambda: lgd.guided_score(x, x, 1.0, impl=impl),
        "guided_step": lambda: lgd.guided_step(x, x, x, 1.0, testing.step_levels(2), impl=impl),
        "combine": lambda: lgd.combine((x,), torch.ones(2, 1), impl=impl),
        "moments": lambda: lgd.moments((x,), impl=impl),
        "dynamic_threshold": lambda: lgd.dynamic_threshold(x, impl=impl),
        "energy_mmd": lambda: lgd.energy_mmd(x, x, impl=impl),
        "guided_energy": lambda: lgd.guided_energy(*[x[None]] * 3, 1.0, testing.step_levels(1), x[None], impl=impl),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"{name}: `impl` is a {kind}, expected None or one of cuda, triton"):
            call()
