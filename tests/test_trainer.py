"""The trainer: it learns, resumes to the bit, refuses foreign files, stops at NaN, and is the same on two processes."""

import csv
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_ended
from learning import EVERY, Omega, data, denoiser, environment, rows, same, state, trainer

from lgd_kernels import learn
from lgd_kernels.learn import NotFinite, Settings, Trainer
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_constant
from lgd_kernels.learn.logs import Csv, JsonLines, TensorBoard
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.table import OmegaTable

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # several would wait for each other on arrays this small


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder, state) of 30 updates at once, with dropout in omega."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, dropout=0.3)
    run.train(30)
    return folder, state(run)


def test_it_learns_and_its_average_follows():
    run = trainer(lr=0.02, ema=0.9)
    before = run.validate()
    run.train(200)
    s, t = torch.linspace(0.01, 0.4, 50), torch.full((50,), 0.6)
    for omega in (run.omega, run.ema):  # classes lie at 0 and 1; cond is 0 and 0.5, uncond -0.5
        clean, halved = (omega(torch.full((50,), c), s, t).mean() for c in (1, 2))
        assert clean < 0.1 and abs(halved - 0.5) < 0.1
    assert not same(list(run.ema.parameters()), list(run.omega.parameters()))
    assert run.validate() < before - 0.01
    assert not any(weight.requires_grad for weight in run.ema.parameters())


@pytest.mark.parametrize("cache", [0, 25])
def test_resume_is_bitwise(tmp_path, cache):
    whole = trainer(dropout=0.3, cache=cache)
    whole.train(25)
    expected = state(whole)
    first = trainer(tmp_path, dropout=0.3, cache=cache)
    assert not first.resume()  # nothing there yet
    first.train(13)  # ends between intervals: saved all the same
    torch.rand(7)
    second = trainer(tmp_path, dropout=0.3, cache=cache)
    assert second.resume() and second.step == 13
    second.train(25)
    assert same(state(second), expected)


def test_a_killed_run_loses_at_most_one_interval(tmp_path, uninterrupted):
    """Killed by the system during update 20, with no chance to save; what follows is what would have been."""
    command = [sys.executable, str(ROOT / "tests" / "learning.py"), str(tmp_path), "30", "die"]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    run = trainer(tmp_path, dropout=0.3)
    assert run.resume() and run.step == EVERY
    run.train(30)
    assert same(state(run), uninterrupted[1])
    assert [without_time(row) for row in rows(tmp_path)] == [without_time(row) for row in rows(uninterrupted[0])]


def without_time(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    trainer(tmp_path).train(1)
    with pytest.raises(ValueError, match=r"its lr is 0.003, here it is 0.1; pass the same, or another folder"):
        trainer(tmp_path, lr=0.1).resume()
    run = trainer(tmp_path)
    run.omega.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is of another run: its omega is"):
        run.resume()


def test_rows_of_the_log(uninterrupted):
    found = rows(uninterrupted[0])
    assert [row["step"] for row in found] == [10, 20, 30]
    assert all(set(row) == {"step", "loss", "gradient", "seconds", "held_out"} for row in found)


@pytest.mark.parametrize("kind", [JsonLines, Csv])
def test_logs_rewind(tmp_path, kind):
    log = kind(tmp_path / "new" / "log")
    log.rewind(3)  # nothing there yet
    for step in (10, 20, 30):
        log({"step": step, "loss": step / 8})
    log.rewind(20)
    with open(log.path, "a") as file:
        file.write("3")  # a line that was cut off
    log.rewind(20)
    log({"step": 30, "loss": 1.5})
    text = log.path.read_text()
    found = [json.loads(line) for line in text.splitlines()] if kind is JsonLines else csv.DictReader(text.splitlines())
    assert [(int(row["step"]), float(row["loss"])) for row in found] == [(10, 1.25), (20, 2.5), (30, 1.5)]


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or log to JsonLines or Csv"):
        TensorBoard(tmp_path)


def test_it_stops_at_nan_and_says_what_was_seen():
    def sometimes(x, t, c):
        return torch.where((t > 0.97)[:, None], torch.nan, denoiser(x, t, c))

    run = trainer(denoiser=sometimes)
    run.held_out = None
    with pytest.raises(NotFinite) as stopped:
        run.train(1000)
    said = str(stopped.value)
    assert f"update {run.step + 1}: the loss of 1 of 11 items" in said and "norm of the gradient is nan" in said
    assert "`cond` is not finite in 1; `uncond` is not finite in 1; item " in said
    assert "t = 0.9" in said and "omega = " in said and "x_t" not in said
    assert all(weight.isfinite().all() for weight in run.omega.parameters())


def test_a_cache_asks_the_denoiser_once():
    calls = 0

    def counted(x, t, c):
        nonlocal calls
        calls += len(x)
        return denoiser(x, t, c)

    run = trainer(denoiser=counted, cache=25)
    run.held_out = None
    run.train(40)
    assert calls == 2 * 4 * 25
    first, second = run.batches.next(), run.batches.next()
    assert first.seed != second.seed and first.x_t.shape == (11, 4, 6)
    together = run.batches.cached.x_t.flatten(1)
    assert all((item.flatten() == together).all(1).any() for item in second.x_t)


def test_batches_are_drawn_as_the_paper_says():
    run = trainer(batch=2000, delta=0.2, zeta=0.05, s_min=0.1)
    p, following = run.batches.next(), run.batches.next()
    assert p.s.min() >= 0.1 and (p.t - p.s).min() > 0.1999 and p.t.max() <= 0.9501
    assert p.seed != following.seed and not torch.equal(p.s, following.s)
    x0, c = data()
    assert set(map(tuple, p.x0.tolist())) == set(map(tuple, x0.tolist()))  # every item comes up
    pairs = (p.x0[:, None] == x0).all(2).int().argmax(1)
    assert torch.equal(p.c, c[pairs])


def test_datasets_of_pairs():
    x0, c = data()
    pairs = list(zip(x0, c.tolist(), strict=True))
    frozen, settings = trainer().batches.frozen, Settings(batch=5)
    found = [Batches(frozen, given, settings, torch.device("cpu")).next() for given in ((x0, c), pairs)]
    assert torch.equal(found[0].x0, found[1].x0) and torch.equal(found[0].c, found[1].c)
    with pytest.raises(TypeError, match="data is a int"):
        Batches(frozen, 3, settings, torch.device("cpu")).next()
    with pytest.raises(ValueError, match="x0 holds 40 items and c 39"):
        Batches(frozen, (x0, c[1:]), settings, torch.device("cpu")).next()
    for bad, said in (((), "data holds 0 items"), ((x0,), "an item of the tuple is a Tensor, expected a pair")):
        with pytest.raises((TypeError, ValueError), match=said):
            Batches(frozen, bad, settings, torch.device("cpu")).next()
    for bad, said in ((x0, "the Tensor is a Tensor"), ([1, 2], "the list is a int"), ([(x0, c, c)], "is a tuple of 3")):
        with pytest.raises(TypeError, match=rf"{said}, expected a pair \(x0, c\)"):
            Batches(frozen, bad, settings, torch.device("cpu")).next()


def test_any_loss():
    run = trainer()
    run.loss = partial(learn.self_consistency_loss, beta=1.0, churn=0.5, targets=2)
    run.train(2)
    run.loss = learn.with_reward(lambda x0, c: -x0.square().sum(1), 0.1, learn.l2_loss)
    run.train(4)


def knots():
    return torch.linspace(0, 0.75, 4), torch.linspace(0.25, 1, 4)


def test_a_table_is_trained(tmp_path):
    """Its values go where the loss is least, may come to 0 and leave it again, and never fall below."""
    like = trainer()
    frozen, settings = like.batches.frozen, Settings(batch=64, lr=0.05, ema=0.9, seed=3, weight_decay=0.0)
    values = torch.ones(3, 4, 4)
    values[2] = 0.0  # where a ReLU would be dead
    table = OmegaTable(values, *knots())
    run = Trainer(table, frozen, data(), settings, held_out=data(20, 1), folder=tmp_path)
    before = run.validate()
    lowest = 0.0
    for done in range(1, 121):
        run.train(done)
        lowest = min(lowest, float(run.omega.values.detach().min()))
    assert lowest == 0.0 and bool((table.values == values).all())  # what came in stays
    learned = run.ema.table()
    assert type(learned) is OmegaTable and run.validate() < before - 0.01
    s, t = torch.full((2,), 0.3), torch.full((2,), 0.7)
    assert (learned(torch.tensor([1, 2]), s, t) - torch.tensor([0.0, 0.5])).abs().max() < 0.1
    again = Trainer(table, frozen, data(), settings, held_out=data(20, 1), folder=tmp_path)
    assert again.resume() and torch.equal(again.ema.table().values, learned.values)


@pytest.mark.parametrize("start", [Constant(1.0), Interval(1.0, 0.0, 1.0), ClampLinear(1.0, 0.0)])
def test_formulas_are_trained(start):
    """All items together: classes that need 0 and 0.5."""
    like = trainer()
    settings = Settings(batch=64, lr=0.05, ema=0.9, weight_decay=0.0)
    run = Trainer(start, like.batches.frozen, data(), settings, held_out=data(20, 1))
    before = run.validate()
    run.train(100)
    s, t = torch.full((20,), 0.3), torch.linspace(0.4, 0.9, 20)
    assert 0.1 < run.ema(None, s, t).mean() < 0.5 and run.validate() < before


def test_implementations_learn_the_same_curve(target):
    """Updates with a reward, and a fit: with every implementation as with the reference."""
    steps = 4 if target == ("triton", "cpu") else 20  # the interpreter takes a second for each

    def run(impl, device):
        found = trainer(device=device, batch=4)
        found.loss = learn.with_reward(
            lambda x0, c: x0.square().sum(1), 0.05, partial(learn.self_consistency_loss, impl=impl),
            estimate=partial(learn.reward_loss, impl=impl),
        )  # fmt: skip
        losses = [float(found.update()[0]) for _ in range(steps)]
        fitted = fit_constant(learn.curve(found.batches.next(), impl=impl)).omega.item()
        return losses, fitted, [weight.cpu() for weight in found.omega.parameters()]

    losses, fitted, weights = run(target.impl, target.device)
    expected, constant, others = run("reference", "cpu")
    assert losses == pytest.approx(expected, rel=1e-4) and fitted == pytest.approx(constant, abs=1e-5)
    for weight, other in zip(weights, others, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-4)
    assert max(losses) - min(losses) > 0.01  # a curve, not a line


def test_refusals(tmp_path):
    run = trainer()
    with pytest.raises(TypeError, match="`omega` is a function, expected a torch.nn.Module"):
        Trainer(lambda c, s, t: s, run.batches.frozen, data())
    with pytest.raises(TypeError, match="with parameters to learn"):
        Trainer(Omega().requires_grad_(False), run.batches.frozen, data())
    for every in (0, math.nan, 2.5):
        with pytest.raises((TypeError, ValueError), match="`every` is"):
            Trainer(Omega(), run.batches.frozen, data(), every=every)
    with pytest.raises(TypeError, match="`settings` is a dict, expected lgd_kernels.learn.Settings"):
        Trainer(Omega(), run.batches.frozen, data(), {"lr": 0.1})
    for name, bad in (("frozen", None), ("loss", None), ("logs", print), ("logs", [None])):
        options = {"frozen": run.batches.frozen, name: bad}
        with pytest.raises(TypeError, match=f"Trainer: `{name}` is .*, expected"):
            Trainer(Omega(), data=data(), **options)
    for loss, came in ((lambda p, omega: omega.mean(), r"\[\]"), (lambda p, omega: 1.0, "a float")):
        weights = [weight.clone() for weight in run.omega.parameters()]
        wrong = Trainer(run.omega, run.batches.frozen, data(), Settings(batch=4), loss=loss)
        with pytest.raises(ValueError, match=rf"`loss` returned {came}, expected \[4\], a loss for each item"):
            wrong.train(1)
        assert all(map(torch.equal, weights, run.omega.parameters()))
    for steps in (-1, 2.5, "10"):
        with pytest.raises(ValueError, match="`steps` is .*, expected an integer, 0 or more"):
            run.train(steps)
    with pytest.raises(ValueError, match="there is no folder"):
        run.save()
    assert not run.resume()


def test_two_processes_learn_what_one_does(tmp_path):
    """torchrun, gloo, parts of 5 and 6 items: the same draws, and weights equal to 1e-6; one checkpoint, one log."""
    alone = trainer()
    alone.train(10)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(ROOT / "tests" / "learning.py"), str(tmp_path), "10"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert_ended(run)
    first, second = (torch.load(tmp_path / f"omega{rank}.pt") for rank in (0, 1))
    for name, weight in alone.omega.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)
        assert not torch.equal(weight, trainer().omega.state_dict()[name])  # it has moved
    (row,) = rows(tmp_path)
    assert row["held_out"] == pytest.approx(alone.validate(), abs=1e-6)
    resumed = trainer(tmp_path)  # the number of processes may change
    assert resumed.resume() and resumed.step == 10
