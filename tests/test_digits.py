"""Run the digits example in miniature: from labels to a report, through the function that the command line calls."""

import contextlib
import importlib.util
import io
import json
import math
import re

import pytest
import torch

from examples.digits import judge, study
from examples.digits.__main__ import main
from examples.digits.data import Labelled, load_digits, replace_labels
from examples.shared import by_hand, guidance, measures
from lgd_kernels.sampling.schedules import RectifiedFlow

for module in ("sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(module, reason="the examples need pip install -e '.[examples]'")

from examples.digits.report import text_table  # noqa: E402


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what was printed to stdout and stderr) of a quick run with two seeds."""
    out = tmp_path_factory.mktemp("digits")
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = main(["--quick", "--seeds", "2", "--ablate", "--out", str(out)])
    assert status == 0
    return out, printed.getvalue(), errors.getvalue()


def test_prints_the_table_and_nothing_else(finished):
    out, printed, errors = finished
    assert errors == ""  # no bars in a pipe
    lines = printed.splitlines()
    assert lines[0].startswith("held-out digits, 2 seeds, noise rising")
    assert [line[:10].strip() for line in lines[3:11]] == list(study.METHODS)
    assert "figures mean nothing" in printed and "of a training step in eager PyTorch" in printed
    assert lines[-1] == f"report: {out / 'report.html'}"


def test_metrics(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(metrics) == {"config", "versions", "quick", "seeds", "summary"} and metrics["quick"]
    for number, seed in enumerate(metrics["seeds"]):
        assert seed["seed"] == number
        for values in seed["test"].values():
            assert len(values["energy_per_class"]) == 10
            assert values["energy"] == pytest.approx(sum(values["energy_per_class"]) / 10, abs=1e-5)
            assert 0 <= values["accuracy"] <= 1 and values["frechet"] > 0
        assert seed["accuracy_real"] > 0.9
        assert all(omega >= 0 for row in seed["omega_path"] for omega in row)
        for name, tried in seed["validation"].items():  # the choice is the best of what was tried, on validation
            energies = [found["energy"] if name in ("learned", "L2") else found[-1] for found in tried]
            assert seed["chosen"][name]["validation"] == min(energies)
        assert len(seed["chosen"]["per class"]["settings"]) == 10
        assert seed["chosen"]["per class"]["validation"] <= seed["chosen"]["interval"]["validation"]
        assert set(seed["loss_share"]) == {"predicted", "cached"}
        for share in seed["loss_share"].values():
            assert 0 < share["one_pass"] < 1 and 0 < share["eager"] < 1
            assert share["loss_ratio"] > 0 and share["step_ratio"] > 0
        assert all(seconds > 0 for seconds in seed["fit"].values()) and seed["bake_error"] >= 0
        assert [row["gamma"] for row in seed["reward"]] == metrics["config"]["gammas"]
        assert all(row["reward"] < 0 and row["omega"] >= 0 for row in seed["reward"])
        tried = {name: [value for value, _ in found] for name, found in seed["ablations"].items()}
        assert tried == {name: list(values) for name, values in metrics["config"]["ablations"]}
    summary, test = metrics["summary"], [seed["test"] for seed in metrics["seeds"]]
    assert summary["methods"]["learned"]["energy"]["mean"] == pytest.approx(
        (test[0]["learned"]["energy"] + test[1]["learned"]["energy"]) / 2
    )
    assert list(summary["paired"]) == [f"learned - {other}" for other in study.METHODS if other != "learned"]
    assert summary["paired"]["learned - constant"]["energy"]["values"] == pytest.approx(
        [values["learned"]["energy"] - values["constant"]["energy"] for values in test]
    )


def test_report_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page and "prefers-color-scheme: dark" in page
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert len(sources) == 7 and set(sources) == {"data:image/png;base64,"}
    for name in (
        *study.METHODS,
        "Paired differences",
        "wrong",
        "of a training step in eager PyTorch",
        "With a reward",
        "Ablations",
    ):
        assert name in page


def test_one_seed_has_no_interval(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    metrics["seeds"] = metrics["seeds"][:1]
    metrics["summary"] = study.summarise(metrics["seeds"])
    assert metrics["summary"]["methods"]["learned"]["energy"]["std"] is None
    table = text_table(metrics)
    assert "1 seed," in table and "[" not in table and table.count("±") == 1


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    assert main(["--quick", "--out", str(tmp_path / "none")]) == 1
    assert "sklearn" in (error := capsys.readouterr().err) and "pip install -e '.[examples]'" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--noise", "some"], ["--threads", "0"], ["--what"]])
def test_refuses(argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)


def test_default_grid_is_fair():
    config = study.Config()
    intervals = len(config.interval_omegas) * len(config.interval_lows) * len(config.interval_highs)
    assert intervals >= 100 and intervals > len(config.learning) * config.omega_steps // config.checkpoint_every


def test_splits_share_no_image_and_follow_the_seed():
    data = load_digits("rising", "swapped", seeded())
    assert [len(part.c) for part in (data.train, data.validation, data.test)] == [1000, 400, 397]
    assert data.train.x.shape == (1000, 64) and data.train.x.min() == -1 and data.train.x.max() == 1
    rows = torch.cat([data.train.x, data.validation.x, data.test.x])
    assert len(rows.unique(dim=0)) == 1797
    assert torch.equal(data.train.x, load_digits("uniform", "any", seeded()).train.x)
    assert not torch.equal(data.train.x, load_digits("rising", "swapped", seeded(1)).train.x)


def test_replaced_labels():
    c = torch.arange(10).repeat_interleave(2000)
    rates = torch.linspace(0, 0.75, 10)
    swapped = replace_labels(c, rates, "swapped", seeded())
    assert torch.equal(swapped.bincount(), c.bincount())  # captions stay as frequent
    assert bool((c[swapped == 0] == 0).all())  # and a clean class has clean captions
    share = torch.stack([(swapped[c == k] != k).double().mean() for k in range(10)])
    expected = rates * (1 - rates / rates.sum())  # some get their own label back
    assert bool((share - expected).abs().max() < 0.03)
    anything = replace_labels(c, rates, "any", seeded())
    share = torch.stack([(anything[c == k] != k).double().mean() for k in range(10)])
    assert bool((share - 0.9 * rates).abs().max() < 0.03) and bool((c[anything == 0] != 0).any())


def test_figures_are_those_of_the_metrics():
    """The distances of lgd_kernels.metrics, class by class: of shifted copies, and of one class alone."""
    y = torch.randn(3000, 64, generator=seeded())
    real = Labelled(torch.cat([y + k for k in range(10)]), torch.arange(10).repeat_interleave(3000))
    samples = torch.stack([y + k for k in range(9)] + [y])[:, :200]
    per_class = measures.energy_per_class(samples[None], real.by_class())
    assert per_class.shape == (1, 10) and bool(per_class[0, :9].abs().max() < 0.1) and per_class[0, 9] > 1
    apart = torch.cdist(samples[9].double(), (y + 9).double())
    within = (torch.pdist(one.double()).mean() for one in (samples[9], y))
    assert float(per_class[0, 9]) == pytest.approx(float(2 * apart.mean() - sum(within)), rel=1e-5)
    figures = judge.measure(samples, real, judge.fit_classifier(Labelled(real.x[::50], real.c[::50])))
    assert figures["energy_per_class"] == pytest.approx(per_class[0].tolist()) and figures["accuracy"] > 0.8
    assert figures["frechet"] > 1 and figures["energy_overall"] > 0.1


def test_spread():
    value = measures.spread([1.0, 2.0, 3.0])
    assert value["mean"] == 2 and value["std"] == pytest.approx(1)
    assert value["interval95"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)])


def test_interval_table():
    table = by_hand.interval_table(2.0, 0.4, 0.8, steps=5, classes=3)
    assert table.tolist() == [[0.0] * 3, [2.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3]  # middles .9 .7 .5 .3 .1
    assert bool((by_hand.interval_table(1.0, 0.0, 1.0, steps=50, classes=3) == 1).all())


def test_sampling_takes_each_samples_own_weight():
    """One batch of settings and classes gives what each gives alone."""

    def predict(x, u, c):
        return torch.tanh(x) * (1 + c[:, None]), 0.5 * torch.tanh(x) * u[:, None]

    tables = torch.rand(3, 5, 2, generator=seeded())
    together = guidance.sample_classes(predict, tables, 4, 6, RectifiedFlow(), seeded(1), chunk=2)
    assert together.shape == (3, 2, 4, 6)
    z = torch.randn(8, 6, generator=seeded(1))
    for i, table in enumerate(tables):
        for c in range(2):
            alone = guidance.sample(
                predict, z[4 * c : 4 * c + 4], torch.full((4,), c), table[:, [c, c]], RectifiedFlow()
            )
            torch.testing.assert_close(together[i, c], alone)
