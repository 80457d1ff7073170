"""Test the comparison with other libraries: reasons to skip, the check against the truth, tables and pictures."""

import copy
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, markdown, measure, timing, workload
from benchmarks.workload import Provider

ROOT = Path(__file__).parents[1]
steps, energies = (importlib.import_module(f"benchmarks.{name}") for name in ("steps", "energies"))
SHAPE = (2, 3, 8, 8)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)


def rows(one, rounds=1):
    return list(measure.measure(one, "cpu", [], rounds, False))


def statuses(row):
    return {one["name"]: (one["status"], one["message"]) for one in row["variants"]}


def with_provider(provider):
    one = steps.guidance(SHAPE)
    object.__setattr__(one, "providers", {"theirs": provider})
    return one


def test_what_is_not_installed_is_a_row_that_says_so():
    (row,) = rows(with_provider(Provider("no_such_package", lambda arguments: 1 / 0)))
    message = "no_such_package is not installed (pip install no_such_package)"
    assert statuses(row)["theirs"] == ("cannot run", message)


def test_what_does_not_import_says_why():
    def bind(arguments):
        raise ImportError("it needs a compiler")

    (row,) = rows(with_provider(Provider("torch", bind)))
    assert statuses(row)["theirs"] == ("cannot run", "it needs a compiler")


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.000005, "ok"), (1.01, "WRONG")])
def test_they_are_held_to_the_truth(factor, status):
    """Other libraries are checked by a tolerance of their own."""

    def bind(given):
        return lambda: factor * (given["cond"] + given["omega"] * (given["cond"] - given["uncond"]))

    (row,) = rows(with_provider(Provider("torch", bind, tolerance=1e-5)))
    assert statuses(row)["theirs"][0] == status
    assert bool(row["variants"][-1]["samples"]) == (status == "ok")


@pytest.mark.parametrize("case", steps.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_step_of_diffusers_agrees(case, dtype):
    pytest.importorskip("diffusers")
    (row,) = rows(steps.step(case, SHAPE, dtype))
    assert {"FusedScheduler", "diffusers"} <= statuses(row).keys()
    assert [(name, said) for name, said in statuses(row).items() if said[0] != "ok"] == []


def test_the_guider_of_diffusers_agrees():
    pytest.importorskip("diffusers")
    (row,) = rows(steps.guidance(SHAPE))
    assert [(name, said) for name, said in statuses(row).items() if said[0] != "ok"] == []


@pytest.mark.parametrize(
    "one",
    [energies.samples(kind, 40, 3) for kind in ("energy", "gaussian", "laplace")] + [energies.steps((3, 4, 50))],
    ids=["energy", "gaussian", "laplace", "guided"],
)
def test_every_energy_agrees(one, monkeypatch):
    """geomloss where it is installed; KeOps compiles for half a minute, so it is left to the benchmarks."""
    monkeypatch.setattr(workload.Provider, "why_not", lambda self: "slow" if self.package == "pykeops" else why(self))
    found = rows(one)
    assert [row["kind"].split(" to")[0] for row in found] == ["forward", "forward + backward"]
    for row in found:
        bad = {name: said for name, said in statuses(row).items() if said[0] != "ok"}
        assert all(said[0] == "cannot run" and name in ("geomloss", "KeOps") for name, said in bad.items()), bad


why = Provider.why_not


def test_the_ceiling_of_arithmetic_is_a_matrix_product():
    call, share = timing.product(2 * 64**3, torch.float32, "cpu")
    assert call().shape == (64, 64) and share == 1
    call, share = timing.product(10 * 2**31, torch.float32, "cpu")
    assert 2 * call().shape[0] ** 3 * share == pytest.approx(10 * 2**31)
    row = rows(energies.samples("energy", 40, 3))[0]
    assert len(row["product"]["direct"]) == 1 and row["flops"] == 2 * 40 * 40 * 11


def test_slow_rounds_are_fewer():
    assert len(timing.alternate({"a": lambda: 1.0}, 9, seconds=0.0)["a"]) == timing.LEAST
    assert len(timing.alternate({"a": lambda: 1.0}, 9)["a"]) == 9


def test_peers_bring_their_workloads():
    named = workload.find([], "cpu", [], False, peers=True)
    assert {one.op for one in named} == set(workload.ops())
    assert all(one.providers or one.quick for one in named)
    assert workload.find(["steps"], "cpu", [], True) == [one for one in steps.WORKLOADS if one.quick]


@pytest.fixture
def ran(monkeypatch, tmp_path, capsys):
    """Return a run of two sizes and of samples: the path of its file, and what it printed."""
    small = [steps.guidance(SHAPE), steps.guidance((4, 3, 8, 8)), energies.samples("gaussian", 40, 3)]
    for one in small:
        object.__setattr__(one, "providers", {})
    monkeypatch.setattr(steps, "WORKLOADS", small)
    path = tmp_path / "run.json"
    options = ["steps", "--device", "cpu", "--rounds", "2", "--no-compile", "--json", str(path), "--markdown"]
    assert __main__.main(options) == 0
    return path, capsys.readouterr().out


@pytest.mark.extension
def test_the_short_table_says_what_the_run_says(ran):
    path, said = ran
    run = json.loads(path.read_text())
    assert markdown.block(run, "run.json") in said
    lines = markdown.table(run)
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    row = run["rows"][0]
    middle = row["variants"][0]["ratio"]["direct"][0]
    assert f"| {middle:.2f} [" in lines[2] and f"| eager {timing_of(row, 'eager')}" in lines[2]

    slower = copy.deepcopy(run)  # what loses is a line like any other
    slower["rows"][0]["variants"][0]["ratio"]["direct"] = [0.5, 0.4, 0.6]
    assert "| 0.50 [0.40, 0.60] |" in markdown.table(slower)[2]


def timing_of(row, name):
    from benchmarks.report import seconds

    taken = next(one["samples"]["direct"] for one in row["variants"] if one["name"] == name)
    return seconds(timing.spread(taken)[0])


@pytest.mark.extension
def test_a_run_is_shown_again(ran, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "measure", None)  # nothing is measured
    assert __main__.main(["--show", str(ran[0]), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("<!-- benchmarks: run.json -->")
    pytest.importorskip("matplotlib")
    assert __main__.main(["--show", str(ran[0]), "--plot", str(tmp_path / "pictures")]) == 0
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == {"roofline.png", "sizes.png", "speedup.png", "memory.png"}
    assert min(drawn.values()) > 10_000


TABLES = [
    (page, name, table)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for name, table in re.findall(r"^<!-- benchmarks: (\S+) -->\n(.*?)^<!-- end -->", page.read_text(), re.M | re.S)
]


def test_tables_in_the_docs_are_those_of_committed_runs():
    """Tables on pages are those that `python -m benchmarks --show FILE --markdown` prints."""
    for page, name, table in TABLES:
        run = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        assert markdown.block(run, name) == f"<!-- benchmarks: {name} -->\n{table}<!-- end -->", page.name
