"""`python -m lgd_kernels learn`: invalid numbers, folders and files give one line, before any work is done."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_learn_command import learn, place, refused  # noqa: F401

from lgd_kernels.learn import checkpoint


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ema", "nan"], "--ema is nan, expected a number in [0, 1)"),
        (["--ema", "1"], "--ema is 1.0"),
        (["--lr", "-0.1"], "--lr is -0.1, expected a finite number above 0"),
        (["--lr", "inf"], "--lr is inf"),
        (["--beta", "nan"], "--beta is nan, expected a power in (0, 2]"),
        (["--lam", "2"], "--lam is 2.0, expected a weight in [0, 1]"),
        (["--churn", "-1"], "--churn is -1.0, expected a number in [0, 1]"),
        (["--reward", "my_model:reward", "--gamma", "nan"], "--gamma is nan, expected a finite number"),
        (["--delta", "nan"], "--delta is nan"),
        (["--zeta", "-0.5"], "--zeta is -0.5"),
        (["--s-min", "nan"], "--s-min is nan, expected a number, 0 or more"),
        (["--cache", "-1"], "--cache is -1, expected an integer, 0 or more"),
        (["--seed", str(2**63)], "--seed is 9223372036854775808, expected an integer in"),
        (["--m", "1"], "--particles is 1, but with --lam above 0 particles repel each other: pass --particles 2"),
    ],
)
def test_numbers_are_checked_before_anything_is_done(options, message, capsys):
    said = refused(capsys, *options)
    assert said.startswith(f"learn: {message}") and said.count("\n") == 1 and not Path("out").exists()


@pytest.mark.parametrize("out", ["file", "file/inside"])
def test_a_bad_place_is_one_line(out, capsys):
    Path("file").write_text("kept")
    said = refused(capsys, out=out, model="no_model:here")  # said before the model is looked for
    assert said.startswith(f"learn: --out is {out}, which cannot be made or written") and said.count("\n") == 1
    assert Path("file").read_text() == "kept"


def test_a_folder_that_is_in_use_is_one_line(capsys):
    with checkpoint.locked(Path("out"), "--out"):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(learn).result() == 2
        said = capsys.readouterr().err
        assert said.startswith("learn: --out is out, where another run is at work") and said.count("\n") == 1
        assert os.listdir("out") == ["trainer.lock"]
    assert learn("--omega", "constant") == 0


def test_settings_are_whole_or_absent(capsys, monkeypatch):
    assert learn() == 0
    Path("out/settings.json").write_text('{"beta": 1.')  # as an older version could leave it
    assert "--resume: out/settings.json is damaged" in refused(capsys, "--resume")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert learn(out="new") == 1
    assert "No space left on device: 'new/settings.json'" in capsys.readouterr().err
    assert os.listdir("new") == ["trainer.lock"]


def test_a_reader_that_leaves_early_is_no_error_of_a_file(monkeypatch):
    """`... learn | head`: lgd_kernels.__main__ takes it from there."""

    def gone(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("lgd_kernels.learn.command_fits.summary", gone)
    with pytest.raises(BrokenPipeError):
        learn("--omega", "constant")


def test_a_full_disk_names_the_folder(capsys, monkeypatch):
    def full(log, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lgd_kernels.learn.logs.Csv.__call__", full)
    assert learn(out="new") == 1
    assert "learn: [Errno 28] No space left on device; --out is new\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["network", "table", "constant", "interval"])
@pytest.mark.parametrize("options", [["--held-out", "my_model:spoilt"], []])
def test_no_file_of_a_run_holds_nan(kind, options, capsys):
    """Held-out data of NaN, or a model that returns NaN in the fits."""
    model = "my_model:denoiser" if options else "my_model:nan"
    assert learn("--omega", kind, *options, model=model) == 1
    assert "NaN or infinite" in (said := capsys.readouterr().err) or "not finite" in said
    assert not Path("out/omega.safetensors").exists() and not Path("out/result.json").exists()
