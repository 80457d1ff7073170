"""Run the smaller studies in miniature: a model for the command, the fitted table, the parts of a training step."""

import json

import pytest
import torch

for module in ("sklearn", "matplotlib"):
    pytest.importorskip(module, reason="the examples need pip install -e '.[examples]'")
pytest.importorskip("safetensors")

from benchmarks import learning  # noqa: E402
from examples.digits import fitting  # noqa: E402
from examples.photographs import model as photographs  # noqa: E402
from examples.photographs.__main__ import main as make  # noqa: E402
from examples.photographs.unet import UNet  # noqa: E402
from lgd_kernels.__main__ import main  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_crops_share_no_pixel():
    """Splits come from rows of their own, and every class has as many."""
    found = photographs.crops()
    assert [len(found[split].x) for split in ("train", "validation", "test")] == [3920, 980, 1960]
    for x, c in found.values():
        assert x.shape[1:] == (3, 32, 32) and x.min() >= -1 and x.max() <= 1
        assert torch.equal(c.bincount(), torch.full((4,), len(c) // 4))
    bands = sorted(band for split in photographs.BANDS.values() for band in split)
    assert bands == list(range(7)) and 7 * photographs.BAND <= 427


def test_the_unet_tells_conditions_apart():
    torch.manual_seed(0)
    net = UNet(3)
    for weight in net.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    x, t = torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1), torch.tensor([0.5, 0.5, 0.9, 0.5])
    out = net(x, t, torch.tensor([0, 1, 0, 0])).detach()
    assert out.shape == x.shape and torch.allclose(out[0], out[3], atol=1e-5)
    assert (out[0] - out[1]).abs().max() > 1e-3 and (out[0] - out[2]).abs().max() > 1e-3


def test_the_command_learns_on_the_crops(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photographs, "STRIDE", 29)  # fewer of them
    folder = str(tmp_path / "photographs")
    assert make(["train", "--folder", folder, "--steps", "2"]) == 0
    out = str(tmp_path / "omega")
    model = ["--model", f"examples.photographs.model:load({folder})", "--prediction", "flow"]
    options = ["--cache", "32", "--batch", "16", "--m", "2", "--steps", "2", "--held-out", "0.05", "--out", out]
    assert main(["learn", "--data", f"{folder}/train.npz", *model, *options]) == 0
    files = [f"{out}/{name}.safetensors" for name in ("omega", "interval")]
    few = ["--samples", "2", "--sampling-steps", "2", "--constants", "0", "1"]
    assert make(["measure", *files, "--folder", folder, *few]) == 0
    said = capsys.readouterr().out
    assert "best on the validation split: constant " in said
    rows = json.loads((tmp_path / "photographs" / "measured.json").read_text())
    assert list(rows) == ["constant 0", "constant 1", *files]
    assert all(len(row["test"]) == 4 and min(row["test"]) > 0 for row in rows.values())


def test_fitting_compares_over_seeds(tmp_path, capsys):
    few = ["--denoiser-steps", "20", "--steps", "3", "--items", "300", "--draws", "300"]
    assert fitting.main(["--seeds", "2", *few, "--out", str(tmp_path / "fit.json")]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "fit.json").read_text())
    assert len(found["seeds"]) == 2 and "table - network: " in said
    losses = [seed["loss"] for seed in found["seeds"]]
    differences = [one["table"] - (one["network"] + one["again"]) / 2 for one in losses]
    assert found["summary"]["paired"]["table - network"]["values"] == pytest.approx(differences)
    assert found["summary"]["spread"] == pytest.approx(
        (sum((one["network"] - one["again"]) ** 2 / 2 for one in losses) / 2) ** 0.5
    )
    with pytest.raises(SystemExit):
        fitting.main(["--seeds", "1"])


def test_the_parts_of_a_step(capsys):
    assert learning.main(["--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and "cached predictions: the loss takes" in lines[1]
    assert sum(float(line.split()[-2]) for line in lines[2:]) == pytest.approx(100, abs=0.5)
