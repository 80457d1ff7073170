"""A trainer's folder and numbers: killed, cut off, damaged, in use elsewhere, not finite, or out of range."""

import dataclasses
import errno
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learning import EVERY, environment, rows, same, state, trainer

from lgd_kernels.learn import NotFinite, Settings, checkpoint
from lgd_kernels.learn.logs import Csv

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    """A link with a predictable name would redirect the write to another file."""
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
    with pytest.raises(ValueError, match=r"`folder` is .*, which cannot be made or written \(embedded null byte\)"):
        trainer(tmp_path / "a\0b")
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


@pytest.mark.parametrize("begun", ["", "st", "step,loss\n", "step,loss\n1"])
def test_a_table_that_was_cut_off_begins_anew(tmp_path, begun):
    (tmp_path / "log").write_text(begun)
    log = Csv(tmp_path / "log")
    log.rewind(0)
    log({"step": 10, "loss": 0.5})
    assert (tmp_path / "log").read_text() == "step,loss\n10,0.5\n"


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
    "batch": (0, -1, 2.5, True, "64", math.nan, 10**400),
    "particles": (0, 1.5),
    "delta": (0.0, -0.1, math.nan, math.inf, 0.995, 10**400),
    "zeta": (-0.1, math.nan, 1.0),
    "s_min": (-0.1, math.nan, 0.95),
    "lr": (0.0, -1e-3, math.nan, math.inf, "fast", None, 10**400),
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
