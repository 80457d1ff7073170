"""The trainer: it learns, resumes to the bit, refuses foreign files, stops at NaN, and is the same on two processes."""

import csv
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learning import EVERY, Omega, data, denoiser, trainer

from lgd_kernels import learn
from lgd_kernels.learn import NotFinite, Settings, Trainer, checkpoint
from lgd_kernels.learn.batches import Batches
from lgd_kernels.learn.fit import fit_constant
from lgd_kernels.learn.logs import Csv, JsonLines, TensorBoard
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.table import OmegaTable

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # several would wait for each other on arrays this small


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state(run: Trainer) -> list[torch.Tensor]:
    """All that a run is made of."""
    optimizer = [value for weight in run.optimizer.state.values() for value in weight.values()]
    generators = [run.batches.generator.get_state(), torch.get_rng_state()]
    return [*run.omega.state_dict().values(), *run.ema.state_dict().values(), *optimizer, *generators]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


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


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def without_time(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_a_killed_run_leaves_no_partial_files(tmp_path):
    """The next run in the folder removes what it finds half written; files of others stay."""
    left, other = tmp_path / f".{'0a' * 8}.partial", tmp_path / ".my.partial"
    for path in (left, other):
        path.write_bytes(b"half")
    trainer(tmp_path)
    assert not left.exists() and other.exists()


def test_killed_before_the_first_checkpoint_no_row_comes_twice(tmp_path):
    first = trainer(tmp_path)
    for _ in range(EVERY):
        first.update()
    first.logs[0]({"step": first.step, "loss": 1.0})  # the row is written, the checkpoint is not
    run = trainer(tmp_path)
    assert not run.resume()
    run.train(EVERY)
    assert [row["step"] for row in rows(tmp_path)] == [EVERY]


def test_a_write_that_is_cut_off_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.train(10)
    before = (tmp_path / "trainer.ckpt").read_bytes()
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        run.train(20)
    assert (tmp_path / "trainer.ckpt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "trainer.ckpt", "trainer.lock"]
    monkeypatch.undo()
    again = trainer(tmp_path)
    assert again.resume() and again.step == 10
    again.train(20)


def test_a_partial_file_has_an_unpredictable_name(tmp_path, monkeypatch):
    """A link under a name that can be guessed would lead the write to another file."""
    seen = []
    monkeypatch.setattr("os.replace", lambda source, target: seen.append(Path(source)))
    run = trainer(tmp_path)
    run.train(1)
    run.save()
    assert len({path.name for path in seen}) == 2 and {path.parent for path in seen} == {tmp_path}
    assert not any(str(os.getpid()) in path.name for path in seen)


HOLD = """
import sys
from learning import trainer
run = trainer(sys.argv[1])
run.logs = [lambda row: (print("training", flush=True), sys.stdin.readline())]
run.train(10)
"""


def test_a_second_trainer_in_the_folder_is_refused(tmp_path):
    """In another process, which is then killed: its lock is gone with it."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    paths = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    there = subprocess.Popen(
        command, env={**environment(), "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with there:
        try:
            assert there.stdout.readline() == b"training\n"
            with pytest.raises(ValueError, match="`folder` is .* where another run is at work: wait until it ends, or"):
                trainer(tmp_path)
        finally:
            there.kill()
    trainer(tmp_path).train(1)


def test_a_second_trainer_in_the_process_is_refused_while_the_first_trains(tmp_path):
    first, second, refused = trainer(tmp_path), trainer(tmp_path), []

    def meanwhile(row):
        def train():
            try:
                second.train(10)
            except ValueError as error:
                refused.append(str(error))

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    first.logs = [meanwhile]
    first.train(10)
    assert len(refused) == 1 and "another run is at work" in refused[0] and second.step == 0
    assert second.resume() and second.step == 10  # the first has ended
    second.train(11)


@pytest.mark.parametrize("held", [True, False, None])
def test_locks_without_fcntl(tmp_path, monkeypatch, held):
    """msvcrt's where there is that; else none."""
    asked = []

    def locking(descriptor, mode, count):
        asked.append((mode, count))
        if held:
            raise PermissionError("locked")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None if held is None else SimpleNamespace(locking=locking, LK_NBLCK=2))
    if held:
        with pytest.raises(ValueError, match="another run is at work"):
            trainer(tmp_path)
    else:
        trainer(tmp_path).train(1)
        assert (tmp_path / "trainer.ckpt").exists()
    assert set(asked) == (set() if held is None else {(2, 1)})


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    trainer(tmp_path).train(1)
    assert (tmp_path / "trainer.ckpt").exists()


def test_a_folder_that_cannot_be_made_is_named_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match="`folder` is .*file.* which cannot be made or written"):
            trainer(folder)

    def denied(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(ValueError, match=r"cannot be made or written \(Permission denied\); pass a folder"):
        trainer(tmp_path / "new")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1  # a bit of a weight: the file can be read and means something else
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "foreign":
        torch.save({"weights": torch.zeros(2)}, path)
        return
    else:
        content = b""
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "how, message",
    [
        ("flipped", "is damaged"),
        ("cut", "is damaged"),
        ("foreign", "is no checkpoint of a trainer"),
        ("empty", "is no checkpoint of a trainer"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, how, message):
    run = trainer(tmp_path)
    run.train(1)
    damage(tmp_path / "trainer.ckpt", how)
    fresh = trainer(tmp_path)
    before = state(fresh)
    with pytest.raises(ValueError, match=message + ".*nothing was loaded"):
        fresh.resume()
    assert fresh.step == 0 and same(state(fresh), before)


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


@pytest.mark.parametrize("begun", ["", "st", "step,loss\n", "step,loss\n1"])
def test_a_table_that_was_cut_off_begins_anew(tmp_path, begun):
    (tmp_path / "log").write_text(begun)
    log = Csv(tmp_path / "log")
    log.rewind(0)
    log({"step": 10, "loss": 0.5})
    assert (tmp_path / "log").read_text() == "step,loss\n10,0.5\n"


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


@pytest.mark.parametrize("decay", [1e20, 3.4e38])
def test_it_stops_where_the_update_itself_makes_nan(tmp_path, decay):
    """lr x weight_decay overflows the weights, while loss and gradient are still finite."""
    run = trainer(tmp_path, lr=1e20, weight_decay=decay)
    before = [weight.detach().clone() for weight in run.omega.parameters()]
    with pytest.raises(NotFinite, match="update 1: AdamW made weights of omega NaN or infinite.* a smaller `lr` or"):
        run.train(1)
    assert same(before, list(run.omega.parameters())) and same(before, list(run.ema.parameters()))
    assert run.step == 0 and not (tmp_path / "trainer.ckpt").exists()


@pytest.mark.parametrize("where", ["omega", "ema", "optimizer"])
def test_no_checkpoint_holds_nan(tmp_path, where):
    run = trainer(tmp_path)
    run.train(1)
    before = (tmp_path / "trainer.ckpt").read_bytes()
    part = run.optimizer.state[run.weights[0]]["exp_avg"] if where == "optimizer" else getattr(run, where).head[0].bias
    sound = part.detach().clone()
    part.data[0] = torch.nan
    with pytest.raises(NotFinite, match=f"update 1: NaN in {where}.*; the checkpoint was not written"):
        run.save()
    assert (tmp_path / "trainer.ckpt").read_bytes() == before
    state = checkpoint.read(tmp_path / "trainer.ckpt")
    next(iter(state["omega"].values()))[0] = torch.nan
    checkpoint.write(tmp_path / "trainer.ckpt", state)  # of a version that did not look
    part.data.copy_(sound)
    with pytest.raises(ValueError, match="holds NaN in omega.condition.weight; nothing was loaded"):
        run.resume()


NUMBERS = {
    "batch": (0, -1, 2.5, True, "64", math.nan),
    "particles": (0, 1.5),
    "delta": (0.0, -0.1, math.nan, math.inf, 0.995),
    "zeta": (-0.1, math.nan, 1.0),
    "s_min": (-0.1, math.nan, 0.95),
    "lr": (0.0, -1e-3, math.nan, math.inf, "fast", None),
    "weight_decay": (-0.1, math.nan, math.inf),
    "clip": (-1.0, 0.0, math.nan, "1"),
    "ema": (math.nan, 1.0, -0.1, 1.5, math.inf, None),
    "seed": (1.5, 2**63, None),
    "cache": (-1, 2.5, None),
}


@pytest.mark.parametrize("name, value", [(name, value) for name in NUMBERS for value in NUMBERS[name]])
def test_settings_are_checked(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^Settings: .*{name}.*expected"):
        Settings(**{name: value})


def test_every_setting_is_checked():
    assert set(NUMBERS) == {field.name for field in dataclasses.fields(Settings)}


def test_settings_at_their_ends():
    Settings(zeta=0, s_min=0, delta=0.5, lr=1, weight_decay=0, ema=0, seed=-(2**63), clip=math.inf)
    unclipped, wide = trainer(clip=None), trainer(clip=math.inf)
    for run in (unclipped, wide):
        run.train(3)
    assert same(state(unclipped), state(wide))


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
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"omega{rank}.pt") for rank in (0, 1))
    for name, weight in alone.omega.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)
        assert not torch.equal(weight, trainer().omega.state_dict()[name])  # it has moved
    (row,) = rows(tmp_path)
    assert row["held_out"] == pytest.approx(alone.validate(), abs=1e-6)
    resumed = trainer(tmp_path)  # the number of processes may change
    assert resumed.resume() and resumed.step == 10
