"""Test the study in the plane: its closed forms, its statistics, and a short run from end to end."""

import contextlib
import io
import json
import re

import pytest
import torch

from examples.mixture import claims, seed, study
from examples.mixture.__main__ import main
from examples.mixture.plane import CLASSES, NULL, Mixture, mislabelled_shares, pinwheel, undoing
from examples.shared import command, measures
from lgd_kernels.learn import Frozen
from lgd_kernels.runtime.progress import silent
from lgd_kernels.sampling.schedules import RectifiedFlow

for module in ("sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(module, reason="the examples need pip install -e '.[examples]'")

FALLS = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(truth: Mixture, u: float, count: int = 200):
    """x_t of every condition at a unit time, float64: x, signal, noise, c."""
    c = torch.arange(CLASSES + 1).repeat_interleave(count)
    t = torch.full((len(c),), u, dtype=torch.float64)
    signal, noise = RectifiedFlow().signal_noise(t)
    x0 = truth.sample(c, seeded(1))
    z = torch.randn(x0.shape, generator=seeded(2), dtype=torch.float64)
    return signal[:, None] * x0 + noise[:, None] * z, signal, noise, c


@pytest.mark.parametrize("u", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("wrong", [False, True])
def test_denoiser_is_the_slope_of_the_log_density(u, wrong):
    """signal E[x0 | x_t] = x_t + noise^2 grad log p(x_t): Tweedie's formula, with autograd for the gradient."""
    truth = pinwheel(torch.float64)
    truth = truth.mislabelled(0.4, FALLS) if wrong else truth
    x, signal, noise, c = points(truth, u)
    x.requires_grad_()
    (score,) = torch.autograd.grad(truth.log_density(x, signal, noise, c).sum(), x)
    expected = (x + noise[:, None].square() * score) / signal[:, None]
    torch.testing.assert_close(truth.denoise(x, signal, noise, c), expected, rtol=0, atol=1e-11 / float(signal[0]))


def test_denoiser_is_the_mean_of_the_data_behind_x_t():
    """E[x0 | x_t] by weighing many data with p(x_t | x0): Monte Carlo, within five of its standard errors."""
    truth = pinwheel(torch.float64)
    x, signal, noise, c = points(truth, 0.5, count=5)
    for i in range(len(c)):
        x0 = truth.sample(c[i].expand(200_000), seeded(3 + i))
        weight = (-(x[i] - signal[i] * x0).square().sum(1) / (2 * noise[i] ** 2)).softmax(0)
        found = weight @ x0
        error = (weight.square() @ (x0 - found).square()).sqrt()
        exact = truth.denoise(*(part[i : i + 1] for part in (x, signal, noise, c)))[0]
        assert bool(((found - exact).abs() < 5 * error).all()) and bool((error < 0.01).all())


def test_density_sums_to_one_and_the_null_is_the_mean_of_the_classes():
    truth = pinwheel(torch.float64)
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    signal, noise = torch.full((2, len(x)), 0.6, dtype=torch.float64)
    density = [truth.log_density(x, signal, noise, torch.full((len(x),), c)).exp() for c in range(CLASSES + 1)]
    for one in density:
        assert float(one.sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(density[NULL], sum(density[:NULL]) / CLASSES)


def test_a_turn_carries_the_classes_into_each_other():
    truth = pinwheel(torch.float64)
    x, signal, noise, _ = points(truth, 0.4)
    angle = torch.tensor(2 * torch.pi / 3, dtype=torch.float64)
    turn = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
    zero = torch.zeros(len(x), dtype=torch.int64)
    first = truth.denoise(x, signal, noise, zero)
    torch.testing.assert_close(truth.denoise(x @ turn.T, signal, noise, zero + 1), first @ turn.T)


def test_wrong_labels_are_what_drawing_them_gives():
    """Throw labels away and draw them anew: which class carries which label."""
    share, count = 0.4, 300_000
    true = torch.randint(0, CLASSES, (count,), generator=seeded())
    thrown = torch.rand(count, generator=seeded(1)) < share
    drawn = torch.multinomial(FALLS, count, replacement=True, generator=seeded(2))
    label = torch.where(thrown, drawn, true)
    carries = torch.stack([true[label == k].bincount(minlength=CLASSES) / (label == k).sum() for k in range(CLASSES)])
    chance = mislabelled_shares(share, FALLS)[:, None]
    expected = (1 - chance) * torch.eye(CLASSES) + chance / CLASSES
    assert float((carries - expected).abs().max()) < 0.005
    truth = pinwheel(torch.float64)
    weights = truth.mislabelled(share, FALLS).weights
    torch.testing.assert_close(weights[:NULL], expected @ truth.weights[:NULL])
    assert torch.equal(weights[NULL], truth.weights[NULL]) and torch.equal(weights[0], truth.weights[0])


def test_guidance_undoes_wrong_labels():
    """At pure noise by one omega for each class; elsewhere by one that depends on x_t, through Bayes' rule."""
    truth = pinwheel(torch.float64)
    wrong = truth.mislabelled(0.4, FALLS)
    chance = mislabelled_shares(0.4, FALLS)
    # of three classes, each a third of the data: 0.4 falls_k carry k by chance, 0.6 / 3 by right
    torch.testing.assert_close(undoing(0.4, FALLS), 0.4 * FALLS / 0.2)
    for u in (1.0, 0.9, 0.4):
        x, signal, noise, c = points(truth, u)
        x, signal, noise, c = (part[c != NULL] for part in (x, signal, noise, c))
        cond, uncond = (wrong.denoise(x, signal, noise, one) for one in (c, torch.full_like(c, NULL)))
        right = (1 - chance[c]) * (
            truth.log_density(x, signal, noise, c) - wrong.log_density(x, signal, noise, c)
        ).exp()  # the probability that x_t carries its label by right
        omega = (1 / right - 1)[:, None]
        clean = truth.denoise(x, signal, noise, c)
        torch.testing.assert_close(cond + omega * (cond - uncond), clean, rtol=0, atol=1e-8)
        if u == 1.0:
            torch.testing.assert_close(omega[:, 0], undoing(0.4, FALLS)[c])


def test_samples_follow_the_density():
    truth = pinwheel(torch.float64)
    x = truth.per_class(100_000, seeded())
    one, none = torch.ones(len(x[0]), dtype=torch.float64), torch.zeros(len(x[0]), dtype=torch.float64)
    for c in range(CLASSES):
        mean = truth.weights[c] @ truth.means
        torch.testing.assert_close(x[c].mean(0), mean, rtol=0, atol=0.01)
        spread = truth.weights[c] @ (truth.means.square().sum(1) + 2 * truth.deviations.square()) - mean.square().sum()
        assert float(x[c].var(0).sum()) == pytest.approx(float(spread), rel=0.01)
        assert torch.isfinite(truth.log_density(x[c], one, none, torch.full((len(x[c]),), c))).all()


def test_verdicts():
    below, across, above, none = ({"interval95": one} for one in ([-3.0, -1.0], [-1.0, 2.0], [1.0, 2.0], None))
    said = [claims.verdict(value) for value in (below, across, above, none)]
    assert said == ["holds", "not shown", "does not hold", "not shown"]
    said = [claims.verdict(value, above=True) for value in (below, across, above, none)]
    assert said == ["does not hold", "not shown", "holds", "not shown"]
    said = [claims.around(value, 1.5) for value in (below, across, above, none)]
    assert said == ["does not hold", "holds", "holds", "not shown"]
    assert claims.at_most(above, 2.0) == "holds" and claims.at_most(across, 1.0) == "not shown"
    assert claims.at_most(above) == "does not hold" and claims.at_most(none) == "not shown"


def test_differences_are_paired_by_seed():
    """Seeds differ by 10, methods by 0.1: unpaired nothing would show."""
    tested = [(10.0 * i + 0.1 + 0.001 * (-1) ** i, 10.0 * i) for i in range(8)]
    seeds = [
        {"denoisers": {"exact": {"test": {"learned": {"energy": one}, "constant": {"energy": other}}}}}
        for one, other in tested
    ]
    value = claims.difference(seeds, "exact", "learned", "constant")
    assert value["mean"] == pytest.approx(0.1) and value["std"] == pytest.approx(0.001 * (8 / 7) ** 0.5, rel=1e-6)
    half = 2.364624 * value["std"] / 8**0.5  # the t-quantile of 7 degrees of freedom
    assert value["interval95"] == pytest.approx([0.1 - half, 0.1 + half])
    assert claims.verdict(value) == "does not hold"


def test_energy_is_the_energy_distance_of_each_class():
    truth = pinwheel(torch.float64)
    x, real = truth.per_class(50, seeded()), truth.per_class(70, seeded(1))
    found = measures.energy_per_class(torch.stack((x, x + 0.5)), real)
    for i, shift in enumerate((0.0, 0.5)):
        for c in range(CLASSES):
            within = torch.pdist(x[c]).mean() + torch.pdist(real[c]).mean()
            assert float(found[i, c]) == pytest.approx(float(2 * torch.cdist(x[c] + shift, real[c]).mean() - within))


def test_l2_bias_of_an_exact_denoiser():
    """signal_t A / B (docs/math.md), by least squares over steps; for churn 0 that is s (1 - t) / (t - s)."""
    truth, schedule = pinwheel(), RectifiedFlow()
    frozen = Frozen(lambda x, t, c: truth.denoise(x, *schedule.signal_noise(t), c), schedule, null=NULL)
    c = torch.randint(0, CLASSES, (6000,), generator=seeded())
    rows = study.l2_bias(frozen, (truth.sample(c, seeded(1)), c), 0, items=6000)
    for row in rows[: len(study.STEPS)]:
        assert row["churn"] == 0
        assert row["expected"] == pytest.approx(row["s"] * (1 - row["t"]) / (row["t"] - row["s"]), rel=1e-4)
    for churn in (0.0, 1.0):
        assert claims.ratio([row for row in rows if row["churn"] == churn]) == pytest.approx(1, abs=0.08)


def test_undecided_network_ignores_its_condition():
    net = seed.undecided(16).eval()
    x, u = torch.randn(4, 2, generator=seeded()), torch.full((4,), 0.5)
    first, null = (net(x, u, torch.full((4,), c)) for c in (0, NULL))
    assert torch.equal(first, null) and net.null == NULL


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what was printed) of a quick run with two seeds."""
    out = tmp_path_factory.mktemp("mixture")
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        assert main(["--quick", "--seeds", "2", "--out", str(out)]) == 0
    assert errors.getvalue() == ""
    return out, printed.getvalue()


def test_metrics(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(metrics) == {"config", "versions", "quick", "seeds", "summary", "claims"} and metrics["quick"]
    for number, ran in enumerate(metrics["seeds"]):
        assert ran["seed"] == number and list(ran["denoisers"]) == list(seed.DENOISERS)
        for found in ran["denoisers"].values():
            assert list(found["test"]) == list(study.METHODS)
            for values in found["test"].values():
                assert values["energy"] == pytest.approx(sum(values["energy_per_class"]) / CLASSES, abs=1e-5)
            # the unguided method is the constant 0: one noise for all, so the same samples
            assert found["test"]["unguided"]["energy"] == pytest.approx(found["constants"]["energy"][0], abs=1e-6)
            assert found["held_out_loss"]["unguided"] == pytest.approx(found["constants"]["loss"][0], abs=1e-9)
            chosen, tried = found["chosen"], found["validation"]["constant"]
            assert chosen["constant"] == metrics["config"]["constants"][tried.index(min(tried))]
            for path in found["omega_path"].values():
                assert len(path) == metrics["config"]["sampling_steps"] and min(map(min, path)) >= 0
            assert set(found["seconds"]) == {"predicted", "fitted", "network"}
    test = [ran["denoisers"]["even labels"]["test"] for ran in metrics["seeds"]]
    assert metrics["summary"]["paired"]["even labels"]["learned - constant"]["values"] == pytest.approx(
        [values["learned"]["energy"] - values["constant"]["energy"] for values in test]
    )
    assert {row["verdict"] for row in metrics["claims"]} <= {"holds", "does not hold", "not shown"}
    assert {row["denoiser"] for row in metrics["claims"]} == set(seed.DENOISERS)


def test_a_seed_says_the_same_twice(finished):
    """But for the seconds."""
    once = json.loads((finished[0] / "metrics.json").read_text())["seeds"][1]
    again, _ = seed.run_seed(1, study.Config.quick(), silent)
    again = json.loads(json.dumps(again))
    for ran in (once, again):
        ran.pop("seconds")
        for found in ran["denoisers"].values():
            found.pop("seconds")
    assert once == again


def test_prints_the_tables_and_nothing_else(finished):
    out, printed = finished
    lines = printed.splitlines()
    assert lines[0].startswith("energy distance from held-out data in the plane, 2 seeds")
    assert [line[:14].strip() for line in lines[3:13]] == list(study.METHODS)
    assert "figures mean nothing" in printed and lines[-1] == f"report: {out / 'report.html'}"


def test_report_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page and "prefers-color-scheme: dark" in page
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert len(sources) == 6 and set(sources) == {"data:image/png;base64,"}
    assert all(name in page for name in (*seed.DENOISERS, *study.METHODS, "signal_t A / B"))


def test_one_seed_has_no_verdict_on_differences(tmp_path, capsys):
    assert main(["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "[" not in capsys.readouterr().out.split("report:")[0]
    rows = json.loads((tmp_path / "metrics.json").read_text())["claims"]
    assert {row["verdict"] for row in rows[1:]} == {"not shown"}


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--threads", "0"], ["--what"]])
def test_refuses(argv):
    with pytest.raises(SystemExit):
        main(argv)


def test_default_is_fair():
    """Guidance by hand is searched finely, and there are seeds enough for an interval."""
    config = study.Config()
    assert len(config.constants) >= 10 and command.parser("mixture", "x", seeds=8).parse_args([]).seeds == 8
    assert sum(config.even) == pytest.approx(1) and sum(config.uneven) == pytest.approx(1)
