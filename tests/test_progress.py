"""Test bars in a notebook. (tests/test_energy_mmd_pieces.py tests those in a terminal and in a pipe.)"""

import sys
from types import SimpleNamespace

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.runtime import progress


class Bar:
    """A stand-in for the part of tqdm that is used."""

    made: list = []

    def __init__(self, desc, total, leave):
        assert not leave
        self.desc, self.total, self.n, self.closed = desc, total, 0, False
        self.made.append(self)

    def update(self, more):
        assert more >= 0 and not self.closed
        self.n += more

    def close(self):
        self.closed = True


@pytest.mark.parametrize("installed", [True, False])
def test_bars_in_a_notebook(capsys, monkeypatch, installed):
    """A notebook's stderr is no terminal. tqdm draws there or, where it is not installed, the bar of terminals."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Bar) if installed else None)
    monkeypatch.setattr(Bar, "made", [])
    x = torch.randn(50, 2)
    lgd.energy_mmd(x, x, progress=True)
    assert list(progress.bars("run")([1, 2], "label")) == [1, 2]
    said = capsys.readouterr().err
    if installed:
        assert said == "" and [bar.desc.split() for bar in Bar.made] == [["energy_mmd"], ["run", "label"]]
        assert all(bar.closed and bar.n == bar.total for bar in Bar.made)
    else:
        assert "energy_mmd" in said and "run label" in said
    shell.config = {}  # IPython in a terminal, whose output is a pipe
    lgd.energy_mmd(x, x, progress=True)
    assert capsys.readouterr().err == ""
