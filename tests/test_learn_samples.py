"""Whole runs compared: the figure and its intervals, the verdict in words, and what `learn` prints and saves of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_learn_command import learn, place, refused  # noqa: F401

import lgd_kernels as lgd
from lgd_kernels.learn import Frozen, command, command_options, command_samples, runs, sources
from lgd_kernels.metrics import energy_distance
from lgd_kernels.omega.files import load

FLOW = lgd.RectifiedFlow()


def test_distances_by_hand():
    """Against data 0, 2, 4: those points, and the same 3 further."""
    y = torch.tensor([[0.0], [2.0], [4.0]])
    found = runs.distances(torch.stack((y, y + 3)), y)
    assert found.value.tolist() == pytest.approx([2 * 16 / 9 - 16 / 3, 2 * 29 / 9 - 16 / 3])
    # p = a - 2 b for n = 3. First: a = 2, 4/3, 2 and b = 3, 2, 3, so p = -4, -8/3, -4 for x, and the same q
    assert found.covariance[0, 0].item() == pytest.approx(2 * 4 / 3 * (16 / 27), rel=1e-5)
    # second: a = 5/3, 3, 5 and p = -13/3, -1, -1 for x; a is 5, 3, 5/3 for y, so q = -1, -1, -13/3
    assert found.covariance[1, 1].item() == pytest.approx(2 * 4 / 3 * (100 / 27), rel=1e-5)
    mean, half = found.difference(1, 0)
    assert mean == pytest.approx(26 / 9, rel=1e-5) and half == pytest.approx(
        1.96 * float(found.covariance[0, 0] + found.covariance[1, 1] - 2 * found.covariance[0, 1]) ** 0.5
    )


@pytest.mark.parametrize("size", [3, 30])
def test_the_covariance_is_the_jackknife(size):
    """Leave out sample i of both sets, or item j of the data, and compute the figure again."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, size, generator=generator, dtype=torch.float64)
    y = torch.randn(7, size, generator=generator, dtype=torch.float64) + 0.5
    x[1] = 0.5 * x[0] + 1
    expected = 0
    for count, without in (
        (9, lambda i: [energy_distance(torch.cat((one[:i], one[i + 1 :])), y) for one in x]),
        (7, lambda j: [energy_distance(one, torch.cat((y[:j], y[j + 1 :]))) for one in x]),
    ):
        values = torch.tensor([without(i) for i in range(count)], dtype=torch.float64)
        expected = expected + (count - 1) ** 2 / count * torch.cov(values.t())
    torch.testing.assert_close(runs.distances(x, y).covariance, expected, rtol=1e-6, atol=1e-12)


def test_intervals_cover_the_truth():
    """N(a, 1) and N(0, 1): 2 E|N(a, 2)| - 2 E|N(0, 2)|, with E|N(a, v)| = sqrt(2v/pi) e^(-a^2/2v) + a erf(a/sqrt(2v)).

    The sets differ by .1, less than the interval of either: only the shared noise shows it.
    """

    def truth(a):
        return 4 / math.pi**0.5 * (math.exp(-a * a / 4) - 1) + 2 * a * math.erf(a / 2)

    torch.manual_seed(0)
    covered, narrower, seen = torch.zeros(2), 0, 0
    for _ in range(200):
        z, y = torch.randn(60, 1), torch.randn(50, 1)
        found = runs.distances(torch.stack((z + 0.9, z + 1)), y)
        (mean, half), (change, less) = found.interval(1), found.difference(1, 0)
        covered += torch.tensor([abs(mean - truth(1)) < half, abs(change - (truth(1) - truth(0.9))) < less])
        narrower += less < half / 3
        seen += change > less
    assert bool(((covered >= 180) & (covered <= 199)).all()) and narrower == seen == 200, covered


def test_distances_refuse():
    y = torch.zeros(5, 2)
    with pytest.raises(
        ValueError, match=r"distances: `x` has shape \[4, 2, 2\], expected samples \[O, n, ...\], n = 3"
    ):
        runs.distances(torch.zeros(4, 2, 2), y)
    with pytest.raises(ValueError, match=r"distances: `y` holds 2 data, expected 3 or more"):
        runs.distances(torch.zeros(4, 3, 2), y[:2])
    with pytest.raises(ValueError, match=r"distances: `y` has shape \[5, 2\]"):
        runs.distances(torch.zeros(4, 3, 7), y)


def weight(value):
    return lambda c, s, t: torch.full_like(t, value)


def halves(x, t, c):
    """Labels: half of what class c should be, at c. Guided with null class 0, omega = 1 repairs it."""
    return 0.5 * c[:, None] + 0.1 * x


def data(counts, seed=0):
    c = torch.cat([torch.full((count,), label) for label, count in counts.items()])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(c), generator=generator)
    return (c[:, None] + 0.1 * torch.randn(len(c), 2, generator=generator))[order], c[order]


OMEGAS = {"none": weight(0.0), "one": weight(1.0), "again": weight(1.0)}


def test_runs_are_paired_weighed_and_reproducible():
    frozen = Frozen(halves, FLOW, null=0)
    counts = {1: 100, 2: 50, 3: 2, 4: 1}
    found = runs.compare(frozen, OMEGAS, data(counts), steps=5, samples=100, seed=3)
    assert (found.conditions, found.held, found.samples, found.left_out, found.labels) == (
        (1, 2),
        (100, 50),
        50,
        (3, 4),
        2,
    )
    values = torch.stack([one.value for one in found.each])
    assert torch.equal(found.over_all.value, values.mean(0)) and found.over_all.difference(2, 1) == (0, 0)
    variances = torch.stack([one.covariance for one in found.each]).sum(0) / 4
    assert torch.equal(found.over_all.covariance, variances)
    mean, half = found.over_all.difference(1, 0)
    assert mean + half < 0
    again = runs.compare(frozen, OMEGAS, data(counts), steps=5, samples=100, seed=3, chunk=7)
    assert torch.equal(again.over_all.value, found.over_all.value)
    assert torch.equal(again.over_all.covariance, found.over_all.covariance)
    other = runs.compare(frozen, OMEGAS, data(counts), steps=5, samples=100, seed=4)
    assert not torch.equal(other.over_all.value, found.over_all.value)


def test_samples_are_those_of_the_sampler():
    x0, c = data({1: 10, 2: 10})
    found = runs.compare(Frozen(halves, FLOW, null=0), {"one": weight(1.0)}, (x0, c), steps=4, samples=16, seed=5)
    asked = torch.arange(1, 3).repeat_interleave(8)
    plan = lgd.solvers.one_step(FLOW, torch.linspace(1, 0, 5))
    x = lgd.sample(halves, lgd.philox_normal((16, 2), 5), plan, asked, 0 * asked, 1.0)
    for label, each in enumerate(found.each, 1):
        assert each.value.item() == pytest.approx(float(energy_distance(x[asked == label], x0[c == label])), abs=1e-6)


def test_no_gradient_is_recorded_and_few_samples_are_in_memory():
    """With an omega that has parameters; in chunks of 5, and without the call that omega = 0 does not need."""
    seen = []

    def model(x, t, c):
        seen.append((len(x), torch.is_grad_enabled(), bool((c == 0).any())))
        return halves(x, t, c)

    omegas = {"none": lgd.omega.forms.Constant(0.0), "one": lgd.omega.forms.Constant(1.0)}
    runs.compare(Frozen(model, FLOW, null=0), omegas, data({1: 9, 2: 9}), steps=3, samples=16, chunk=5)
    assert {count for count, _, _ in seen} == {5, 1} and not any(grad for _, grad, _ in seen)
    assert [len(seen), sum(null for _, _, null in seen)] == [3 * 4 * 3, 3 * 4]


def test_many_labels_are_drawn_from():
    counts = dict.fromkeys(range(40), 4)
    found = runs.compare(Frozen(halves, FLOW, null=0), OMEGAS, data(counts), steps=2, samples=64)
    assert found.samples == 8 and len(found.conditions) == len(set(found.conditions)) == 8 and found.labels == 40
    assert list(found.conditions) == sorted(found.conditions) != list(range(8))


def test_embeddings_are_compared_as_pairs():
    """With omega = -2 a sample shows -c. The law of x is right, and that of (x, c) is not."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(400, 3, generator=generator)
    frozen = Frozen(lambda x, t, c: 2 * c, FLOW, null=lambda c: 0 * c)
    omegas = {"right": weight(0.0), "turned": weight(-2.0)}
    found = runs.compare(frozen, omegas, (2 * c, c), steps=3, samples=150)
    assert found.conditions == ("x", "(x, c)") and found.samples == 150 and found.held == (250, 250)
    marginal, joint = (one.difference(1, 0) for one in found.each)
    assert abs(marginal[0]) < marginal[1] and joint[0] - joint[1] > 0.3 and found.over_all is found.each[1]


@pytest.mark.parametrize("c", [torch.arange(5) % 3, torch.zeros(5, 3)], ids=["labels", "embeddings"])
def test_too_few_to_compare(c):
    with pytest.raises(runs.TooFew, match="no label has 3 items" if c.ndim == 1 else "5 items of held-out data"):
        runs.compare(Frozen(halves, FLOW, null=0), OMEGAS, (torch.zeros(5, 3), c))


def found(learned, others, half=0.01, shared=0.9):
    """A result over one class: distances with intervals of that half width, correlated by their shared noise."""
    value = torch.tensor([*others, learned], dtype=torch.float64)
    covariance = (half / 1.96) ** 2 * (shared + (1 - shared) * torch.eye(len(value), dtype=torch.float64))
    distances = runs.Distances(value, covariance)
    names = (*("unguided", "constant", "interval")[: len(others)], "network")
    return command_samples.judged(runs.Compared(names, (0,), (9,), 8, (distances,), distances, (), 1), "network")


OUT = command_options.parse(["--data", "d", "--model", "m", "--out", "runs/omega"])


@pytest.mark.parametrize(
    "result, better, file, said",
    [
        (
            found(0.0114, (0.4, 0.0165), 0.001),
            "network",
            "omega",
            "learned omega (network): 0.0114 [0.0104, 0.0124];\nbest other, the constant: 0.0165 [0.0155, 0.0175]:\n"
            "the learned omega is better by 0.00510 [0.00465, 0.00555].\n",
        ),
        (
            found(0.1, (0.2, 0.101)),
            None,
            "omega",
            "no difference that these samples can tell (-0.0010 [-0.0055, +0.0035]).\nMore --samples and more held-out "
            "data tell smaller ones. The lines below load the learned omega; the other one\nis "
            "runs/omega/constant.safetensors.\n",
        ),
        (
            found(0.2, (0.3, 0.1)),
            "constant",
            "constant",
            "the constant is better by 0.1000 [0.0955, 0.1045].\nThe learned omega does not win here: the lines below "
            "load runs/omega/constant.safetensors.\n",
        ),
        (
            found(0.2, (0.1, 0.3, 0.4)),
            "unguided",
            "unguided",
            "no guidance is better by 0.1000 [0.0955, 0.1045].\n",
        ),
        (found(math.nan, (0.1, 0.3)), "unguided", "unguided", "learned omega (network): NaN;\n"),
        (found(0.1, (math.nan, math.nan)), "network", "omega", "the learned omega is better.\n"),
        (found(math.nan, (math.nan,)), None, "omega", "the samples of every omega hold NaN or infinity.\n"),
    ],
)
def test_the_verdict(result, better, file, said):
    words = command_samples.words(result, OUT)
    assert (result.better, command_samples.file(result)) == (better, file)
    assert said in words and ("does not win" in words) == (better not in (None, "network"))
    kept = json.loads(json.dumps(command_samples.figures(result, 50), allow_nan=False))
    assert (kept["better"], kept["file"], kept["steps"]) == (better, f"{file}.safetensors", 50)


def test_the_table_shows_the_classes_that_gain_least():
    each = [runs.Distances(torch.tensor([1.0, i / 12]).double(), 1e-4 * torch.eye(2).double()) for i in range(12)]
    compared = runs.Compared(
        ("constant", "network"), tuple(range(12)), (5,) * 12, 8, tuple(each), each[6], (12, 13), 30
    )
    lines = command_samples.summary(command_samples.judged(compared, "network"), 20).splitlines()
    assert "in 20 steps" in lines[0] and "mean of 12 of 30 classes, 8 samples of each" in lines[0]
    assert lines[4] == "constant          1.000   [0.980, 1.020]       -0.500 [-0.528, -0.472]"
    assert [line.split()[0] for line in lines[8:18]] == [str(i) for i in range(11, 1, -1)]
    assert lines[18] == "(10 of 12 classes: those where network gains least)"
    assert lines[19] == "(left out, with fewer than 3 held-out items: class 12, 13)"


def test_delta_follows_the_steps():
    assert [command_samples.delta(steps) for steps in (0, 1, 10, 20, 1000)] == [0.1, 0.1, 0.1, 0.05, 0.001]
    given = ["--data", "d", "--model", "m"]
    assert (
        command_options.parse(given).delta == 0.02
        and command_options.parse([*given, "--sample-steps", "0"]).delta == 0.1
    )
    assert command_options.parse([*given, "--sample-steps", "200", "--delta", "0.3"]).delta == 0.3


def test_the_command_ends_with_samples(capsys):
    sampled = ["--sample-steps", "20", "--samples", "60"]
    assert learn("--steps", "150", "--lr", "0.003", "--ema", "0.9", *sampled) == 0
    said = capsys.readouterr().out
    kept = json.loads(Path("out/samples.json").read_text())
    assert kept["better"] == "network" and kept["file"] == "omega.safetensors" and kept["steps"] == 20
    assert set(kept["over_all"]) == {"unguided", "constant", "interval", "network"}
    assert kept["samples_of_each_condition"] == 30 and set(kept["conditions"]) == {"0", "1"}
    assert said.index("held-out loss") < said.index("energy distance of samples in 20 steps")
    assert "the learned omega is better by" in said and 'load("out/omega.safetensors")' in said
    assert "torch.linspace(1, 0, 21)" in said
    # a run that is gone on with may be compared otherwise, with the same delta
    more = ["--resume", "--steps", "150", "--lr", "0.003", "--ema", "0.9", "--sample-steps", "8"]
    assert "had delta = 0.05, here it is 0.1" in refused(capsys, *more)
    assert learn(*more, "--delta", "0.05") == 0
    assert json.loads(Path("out/samples.json").read_text())["steps"] == 8
    assert learn(*more[:-1], "0", "--delta", "0.05") == 0
    assert "no samples were compared (--sample-steps 0)" in capsys.readouterr().out
    assert not Path("out/samples.json").exists()


def test_a_learned_omega_that_harms_is_not_recommended(capsys):
    """An exact model, and a reward that leads away from the data."""
    options = ["--reward", "my_model:reward", "--gamma", "50", "--steps", "60", "--lr", "0.02", "--ema", "0.5"]
    assert learn(*options, "--sample-steps", "10", "--samples", "64", model="my_model:exact") == 0
    said = capsys.readouterr().out
    best = json.loads(Path("out/samples.json").read_text())["file"]
    assert best in ("unguided.safetensors", "constant.safetensors", "interval.safetensors")
    assert f"The learned omega does not win here: the lines below load out/{best}." in said
    exec(said.strip().rpartition("\n\n")[2], space := {})
    with torch.no_grad():
        assert float(space["omega"](space["c"], space["times"][1:2], space["times"][:1]).max()) < 0.2
    assert load("out/unguided.safetensors").omega.item() == 0


@pytest.mark.parametrize("name", ["embedded", "dataset"])
def test_embeddings_and_datasets_are_sampled(name, capsys):
    options = {
        "embedded": ["--null", "zeros", "--data", "my_model:embedded()", "--model", "my_model:half"],
        "dataset": ["--data", "my_model:dataset", "--classes", "2", "--schedule", "ddpm"],
    }[name]
    assert learn(*options, "--omega", "constant", "--held-out", "0.3", "--sample-steps", "6", "--samples", "16") == 0
    said = capsys.readouterr().out
    expected = "16 pairs (x, c) and 44 held-out ones" if name == "embedded" else "mean of 2 classes, 8 samples of each"
    assert expected in said and "learned omega (constant): " in said


def test_few_held_out_items_are_no_error(capsys):
    assert learn("--omega", "constant", "--held-out", "0.01", "--sample-steps", "3") == 0  # two items
    said = capsys.readouterr().out
    assert "no samples were compared: no label has 3 items of the held-out data; pass more --held-out data" in said
    assert not Path("out/samples.json").exists() and 'load("out/omega.safetensors")' in said


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sample-steps", "-1"], "--sample-steps is -1, expected 1 or more, or 0 to compare losses only"),
        (["--samples", "7"], "--samples is 7, expected 8 or more"),
    ],
)
def test_options_that_cannot_be(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        learn(*options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("study, size", [("mixture", 2), ("digits", 64)])
def test_the_models_of_the_guide(study, size):
    """docs/learning.md names them; here after two steps of training."""
    if study == "digits":
        pytest.importorskip("sklearn")
    data = "pairs(0)" if study == "mixture" else "images(train)"
    named = {"data": f"examples.{study}.command:{data}", "model": f"examples.{study}.command:trained(2)"}
    assert learn("--omega", "constant", "--sample-steps", "2", "--samples", "32", **named) == 0
    assert load("out/omega.safetensors").prediction == "x0"
    assert sources.load(named["data"])[0].shape[1] == size


def test_a_constant_set_by_hand_wins_where_it_is_right(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "learning.md").read_text()
    module = next(block for block in page.split("```") if "return mean + share" in block)
    (tmp_path / "plane.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    call = ["--data", "plane:pairs", "--model", "plane:denoiser", "--steps", "5", "--by-hand", "1", "--items", "1024"]
    assert command.main(call) == 0
    printed = capsys.readouterr().out
    assert "your constant is better by 0.00" in printed and "load runs/omega/by_hand.safetensors" in printed
    assert load("runs/omega/by_hand.safetensors").omega.item() == 1
    with pytest.raises(SystemExit):
        command.main([*call, "--by-hand", "-1"])
    assert "--by-hand is -1.0, expected omega = guidance_scale - 1, 0 or more" in capsys.readouterr().err
