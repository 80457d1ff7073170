"""`python -m lgd_kernels learn`: from a user's model and data to a file, and plain errors for what is wrong."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import assert_ended

import lgd_kernels as lgd
from lgd_kernels.__main__ import main
from lgd_kernels.learn import command
from lgd_kernels.omega.files import load

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]
MODEL = """
import torch
from torch import nn
import lgd_kernels as lgd

means = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
shares = torch.tensor([0.5, 0.625, 0.0])  # of what should be said, in each class: omega = 1 and 0.6 repair it


def denoiser(x, t, c):
    return (shares[c, None] * means[c]).expand_as(x)


def exact(x, t, c):
    return means[c].expand_as(x)


def half(x, t, c):  # embeddings
    return 0.5 * c + 0 * x


def images(x, t, c):
    return 0.5 * (torch.tensor([1.0, -1.0, 0.0])[c]).view(-1, 1, 1, 1).expand_as(x)


def flow(x, t, c):
    return (x - denoiser(x, t, c)) / t[:, None]


def eps(x, t, c):
    return (x - (1 - t[:, None]) * denoiser(x, t, c)) / t[:, None]


class Net(nn.Module):
    def forward(self, x, t, c):
        assert not self.training
        return denoiser(x, t, c)


def make(path):
    assert path == "some file.pt"
    return Net()


def pairs():
    c = torch.arange(200) % 2
    return means[c] + 0.1 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), c


def embedded():
    x0, _ = pairs()
    return x0, x0


class Pairs(list):
    pass


dataset = Pairs(zip(*pairs()))
flat = torch.zeros(20, 2), torch.zeros(20, dtype=torch.int64)
number = 7


def wrong_shape(x, t, c):
    return x[:, :1]


def fails(x, t, c):
    raise RuntimeError("no such layer")


def nan(x, t, c):
    return torch.where((t > 0.9)[:, None], torch.nan, denoiser(x, t, c))


def reward(x0, c):
    return x0.square().sum(1)


edm = lgd.EDM(sigma_max=10.0)
spoilt = torch.full((20, 3), torch.nan), torch.arange(20) % 2


class Own(lgd.RectifiedFlow):
    pass


own = Own()
null_vector = torch.zeros(3)


def null_like(c):
    return 0 * c
"""
QUICK = ["--steps", "4", "--every", "2", "--batch", "64", "--items", "200", "--hidden", "8", "--sample-steps", "0"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with the user's module."""
    torch.set_num_threads(1)
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_model", None)


def learn(*options, data="my_model:pairs()", model="my_model:denoiser", out="out", quick=True):
    return main(["learn", "--data", data, "--model", model, "--out", out, *(QUICK if quick else []), *options])


def result(out="out"):
    return json.loads((Path(out) / "result.json").read_text())


def refused(capsys, *options, **named):
    assert learn(*options, **named) == 2
    return capsys.readouterr().err


def test_a_network_end_to_end(capsys):
    assert learn("--steps", "150", "--lr", "0.003", "--ema", "0.9", "--items", "500", quick=False) == 0
    said = capsys.readouterr().out
    omega = load("out/omega.safetensors", lgd.RectifiedFlow())
    with torch.no_grad():
        found = omega(torch.tensor([0, 1]), torch.full((2,), 0.3), torch.full((2,), 0.7))
    assert (found - torch.tensor([1.0, 0.6])).abs().max() < 0.2
    losses = result()
    assert set(losses) == {"unguided", "constant", "interval", "network"}
    assert losses["network"]["held_out"] < losses["interval"]["held_out"] <= losses["unguided"]["held_out"]
    gained = losses["constant"]["learned_minus_this"]
    assert gained["mean"] + gained["half_width"] < 0 and gained["mean"] == pytest.approx(
        losses["network"]["held_out"] - losses["constant"]["held_out"]
    )
    assert "best constant" in said and 'load("out/omega.safetensors")' in said
    with open("out/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["150"] and float(rows[0]["held_out"]) < 100


def test_a_network_that_has_nothing_to_gain_ends_near_zero():
    """Every condition is already told right."""
    assert learn("--steps", "60", "--lr", "0.02", "--ema", "0.5", model="my_model:exact") == 0
    s, t = torch.rand(2, 50).sort(0).values
    assert load("out/omega.safetensors", lgd.RectifiedFlow())(torch.arange(50) % 2, s, t).max() < 0.2


def test_fits_of_one_number():
    for kind in ("constant", "interval"):
        assert learn("--omega", kind, "--held-out", "my_model:pairs()", out=kind) == 0
        assert load(f"{kind}/{kind}.safetensors").omega == load(f"{kind}/omega.safetensors").omega
        assert 0.6 < load(f"{kind}/omega.safetensors").omega < 1
        assert result(kind)["constant" if kind == "interval" else "interval"]["learned_minus_this"]["mean"] < 0.05


def test_resume_is_bitwise():
    assert learn("--steps", "9", out="whole") == 0
    assert learn("--steps", "5", out="parts") == 0
    assert learn("--steps", "9", "--resume", out="parts") == 0
    whole, parts = (load(f"{out}/omega.safetensors").state_dict() for out in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    steps = [row.split(",")[0] for row in Path("parts/log.csv").read_text().splitlines()]
    assert steps == ["step", "2", "4", "5", "6", "8", "9"]
    assert result("whole") == result("parts")


def test_a_run_is_neither_overwritten_nor_continued_as_another(capsys):
    assert learn() == 0
    before = Path("out/settings.json").read_text()
    assert "holds a checkpoint: go on from it with --resume" in refused(capsys)
    assert "had beta = 1.75, here it is 1.0" in refused(capsys, "--resume", "--beta", "1.0")
    assert "--steps is 2, but 4 updates are done" in refused(capsys, "--resume", "--steps", "2")
    assert "there is no checkpoint in new" in refused(capsys, "--resume", out="new")
    Path("out/trainer.ckpt").write_bytes(b"something else")
    assert "no checkpoint of a trainer" in refused(capsys, "--resume")
    assert Path("out/settings.json").read_text() == before


@pytest.mark.parametrize("kind", ["npz", "pt", "pair.pt", "dataset"])
def test_forms_of_data(kind):
    exec(MODEL, space := {})
    x0, c = space["pairs"]()
    name, options = f"data.{kind}", []
    if kind == "npz":
        numpy.savez(name, x0=x0.numpy(), c=c.int().numpy())
    elif kind == "dataset":
        name, options = "my_model:dataset", ["--classes", "2"]
    else:
        torch.save((x0, c) if kind == "pair.pt" else {"x0": x0, "c": c}, name)
    assert learn("--omega", "constant", *options, data=name) == 0
    assert result()["constant"]["draws"] == 160


def test_a_folder_of_images(capsys):
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (Path("photos") / name).mkdir(parents=True)
        for i in range(12):
            pixels = numpy.full((6, 6 + (i == 5), 3), 255 * (1 - label), dtype=numpy.uint8)
            image.fromarray(pixels).save(f"photos/{name}/{i}.png")
    Path("photos/notes.txt").write_text("not a class")
    said = refused(capsys, data="photos", model="my_model:images")
    assert "have different sizes; pass --size N" in said
    given = ["--omega", "table", "--size", "4", "--knots", "3", "--batch", "16"]
    Path("others/fox").mkdir(parents=True)
    Path("others/fox/1.png").write_bytes(Path("photos/cat/1.png").read_bytes())
    said = refused(capsys, *given, "--held-out", "others", data="photos", model="my_model:images")
    assert "its classes are ['fox'], expected ['cat', 'dog']" in said
    assert learn(*given, data="photos", model="my_model:images") == 0
    omega = load("out/omega.safetensors")
    assert omega.values.shape == (2, 3, 3) and (omega.values - 1).abs().max() < 0.1


def test_embeddings_modules_rewards_and_schedules():
    assert learn("--null", "zeros", data="my_model:embedded()", model="my_model:half", out="embedded") == 0
    assert load("embedded/omega.safetensors").embedding == 3
    assert learn("--prediction", "flow", "--log", "jsonl", model="my_model:flow", out="flow") == 0
    assert [json.loads(line)["step"] for line in Path("flow/log.jsonl").read_text().splitlines()] == [2, 4]
    assert learn("--cache", "100", model="my_model:make(some file.pt)", out="made") == 0
    for flag in ([], ["--black-box"]):
        assert learn("--reward", "my_model:reward", "--gamma", "0.1", *flag, out=f"reward{len(flag)}") == 0
    for schedule, kind in (("ddpm", "network"), ("ddpm", "table"), ("my_model:edm", "table")):
        out = f"{schedule.split(':')[-1]}_{kind}"
        assert learn("--schedule", schedule, "--omega", kind, "--knots", "4", out=out) == 0
    assert load("edm_table/omega.safetensors", lgd.EDM(sigma_max=10.0)).values.shape == (2, 4, 4)


def test_implementations_agree():
    found = {}
    for impl in ("reference", *(["cpu"] if "cpu" in lgd.available_impls("guided_energy", "cpu") else [])):
        assert learn("--impl", impl, out=impl) == 0
        found[impl] = [result(impl)[name]["held_out"] for name in ("unguided", "constant", "interval", "network")]
    for losses in found.values():
        assert losses == pytest.approx(found["reference"], rel=1e-4)


@pytest.mark.parametrize(
    "named, message",
    [
        ({"data": "nowhere"}, "--data: nowhere is no folder, no .npz or .pt file and no module:name"),
        ({"data": "nowhere.npz"}, "there is no file nowhere.npz"),
        ({"data": "empty"}, "--data: empty holds no images in folders of their class"),
        ({"data": "text.pt"}, "--data: text.pt cannot be read as tensors"),
        ({"data": "weights.pt"}, "does not hold the arrays x0 [N, ...] and c"),
        ({"data": "bytes.pt"}, "x0 is [4, 3] torch.uint8, expected floats [N, ...], scaled as the model was trained"),
        ({"data": "uneven.pt"}, "x0 holds 4 items and c 3"),
        ({"data": "my_model:number"}, "data is a int, expected (x0 [N, ...], c [N, ...]) or a dataset"),
        ({"data": "my_model:dataset"}, "--classes is missing"),
        ({"data": "my_model:embedded()"}, "--null is missing: c are embeddings"),
        ({"model": "their_model:net"}, "--model: there is no module 'their_model' here or on PYTHONPATH"),
        ({"model": "broken:net"}, "--model: broken cannot be imported: SyntaxError"),
        ({"model": "my_model:net"}, "--model: my_model has no net"),
        ({"model": "my_model"}, "--model is 'my_model', expected module:name"),
        ({"model": "my_model:make(other.pt)"}, "--model: my_model:make failed: AssertionError"),
        ({"model": "my_model:number"}, "`denoiser` is a int, expected a callable"),
        ({"model": "my_model:number()"}, "my_model:number is a int, expected a function to call"),
        ({"model": "my_model:wrong_shape"}, "the denoiser returned [4, 1] for x of shape [4, 3]"),
        ({"model": "my_model:fails"}, "--model: it failed for x [4, 3], t [4] and c [4]: RuntimeError: no such layer"),
    ],
)
def test_what_is_wrong_is_said(named, message, capsys):
    Path("empty").mkdir()
    Path("broken.py").write_text("def")
    Path("text.pt").write_text("not a file of torch")
    torch.save({"weight": torch.zeros(2)}, "weights.pt")
    torch.save({"x0": torch.zeros(4, 3, dtype=torch.uint8), "c": torch.zeros(4)}, "bytes.pt")
    torch.save({"x0": torch.zeros(4, 3), "c": torch.zeros(3)}, "uneven.pt")
    said = refused(capsys, **named)
    assert message in said and said.startswith("learn: ") and "Traceback" not in said
    assert not Path("out/omega.safetensors").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--schedule", "vp"], "--schedule is 'vp', expected one of flow, cosine"),
        (["--schedule", "my_model:number"], "is a int, expected a Schedule"),
        (["--delta", "2"], "delta = 2.0"),
        (["--classes", "1"], "labels reach from 0 to 1, expected 0 to --classes - 1"),
        (["--impl", "cuda"], "cuda"),
        (["--held-out", "1"], "--held-out is 1 of 200 items"),
        (["--held-out", "nowhere"], "--held-out: nowhere is no folder"),
        (["--held-out", "my_model:flat"], "--held-out: items have shapes"),
        (["--reward", "my_model:number"], "--reward: my_model:number is a int"),
        (["--schedule", "my_model:own"], "--schedule: `schedule` is a Own, expected one of"),
    ],
)
def test_options_that_do_not_fit(options, message, capsys):
    assert message in refused(capsys, *options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--m", "0"], "--particles is 0, expected 1 or more"),
        (["--omega", "table", "--resume"], "--reward and --resume are for --omega network"),
        (["--knots", "1"], "--knots is 1, expected 2 or more"),
        (["--omega", "spline"], "invalid choice"),
        (["--gamma", "0.5"], "--black-box and --gamma are options of a reward: pass --reward"),
    ],
)
def test_options_that_cannot_be(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        learn(*options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_nan_stops_it(capsys):
    assert learn("--steps", "50", model="my_model:nan") == 1
    assert "`cond` is not finite" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0 and "--black-box" in capsys.readouterr().out


def test_two_processes_learn_what_one_does():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lgd_kernels"]
    model = ["--data", "my_model:pairs()", "--model", "my_model:denoiser", "--device", "cpu"]
    options = ["learn", *model, *QUICK, "--sample-steps", "4", "--delta", "0.1"]
    run = subprocess.run(
        [*launch, *options, "--out", "two"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert_ended(run)
    assert run.stdout.count("held-out loss") == run.stdout.count("energy distance of samples") == 1
    assert learn(out="one") == 0
    one, two = (load(f"{out}/omega.safetensors") for out in ("one", "two"))
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weight, rtol=0, atol=1e-6)
