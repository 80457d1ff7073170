"""Run the notebook, and check that the learned omega does what its text says."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "learn_look_sample.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_runs_and_learns(monkeypatch):
    """Its cells, one after the other in this process. Learned omega is better than each constant, in the mean."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    namespace["pyplot"].close("all")
    means = {name: sum(values) / 3 for name, values in namespace["distances"].items()}
    assert min(means, key=means.get) == "learned" and means["learned"] < 0.3 * means["no guidance"]
    wrong = namespace["wrong"]
    assert (namespace["learned"] - wrong / (1 - wrong)).abs().max() < 0.25


def test_outputs_are_stripped():
    """Git keeps what was written, not what it printed."""
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []


def test_its_links_lead_somewhere():
    for cell in CELLS:
        for target in re.findall(r"\]\(([^)]+)\)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / target).exists(), target
