"""Run `make gpu` dry, on the CPU; kill it in the middle; and judge results that are made up."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import simulated
from conftest import WITH_CUDA

from benchmarks import gpu, gpu_build, gpu_phases, gpu_results, gpu_rows, gpu_table, measure

ROOT = Path(__file__).parents[1]
can_run_dry = pytest.mark.skipif(bool(simulated.missing()), reason=simulated.missing())
DRY = [sys.executable, "-m", "benchmarks.gpu", "--dry"]


def environment(folder):
    return os.environ | {"OUT": str(folder), "OMP_NUM_THREADS": "1"}


@can_run_dry
def test_a_dry_run_ends_every_phase(tmp_path):
    pytest.importorskip("triton")
    run = subprocess.run(DRY, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    result = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert result == gpu_results.merged(tmp_path / "gpu-dry.jsonl") and not result["torn"]
    assert result["schema"] == 1 and result["dry"] and result["stand_ins"] and result["problems"] == []
    assert {"commit", "torch", "triton", "nvcc"} <= result["environment"].keys()
    assert [*result["phases"]] == [*"abcdefg"]
    for key, phase in result["phases"].items():
        assert phase["status"] == "ended" and 0 < phase["seconds"] and 0 < phase["planned"], key
        assert bool(phase["tests"]) == (key in "bdg") and bool(phase["rows"]) == (key in "cdeg")
        assert {one["outcome"] for one in phase["tests"].values()} <= {"passed"}
        for row in phase["rows"].values():
            assert {"direct", "graph", "host"} == row["copy"].keys()
            assert [one["status"] for one in row["variants"] if one["ours"]]
    beside = next(iter(result["phases"]["e"]["rows"].values()))
    assert {"cuda", "triton", "eager", "compiled"} <= {one["name"] for one in beside["variants"]}
    with pytest.raises(ValueError, match="dry run"):
        gpu_table.table(result)


@can_run_dry
def test_a_killed_run_leaves_what_ran(tmp_path):
    """SIGKILL to the process group as soon as a row is there: its commands die, and the file is read."""
    command = [*DRY, "--phases", "e,g"]  # the interpreter takes seconds for the other rows
    process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), start_new_session=True)
    record, end = tmp_path / "gpu-dry-e-g.jsonl", time.monotonic() + 300
    while not timed(record) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    while commands_with(record) and time.monotonic() < end:
        time.sleep(0.02)
    result = gpu_results.merged(record)
    phase = result["phases"]["e"]
    assert phase["status"] == "running" and result["phases"]["g"]["status"] == "did not begin"
    assert 1 <= len(timed(record)) < len(phase["rows"])
    said = "\n".join(result["problems"])
    assert "e: rows beside torch.compile: running" in said and "g: other rows and tests: did not begin" in said
    assert "e: row did not begin: guided_" in said
    assert "did not begin" in gpu_results.summary(result, record)


def timed(record):
    """Return the names of the rows of phase e that are timed."""
    rows = gpu_results.merged(record)["phases"].get("e", {"rows": {}})["rows"]
    return [name for name, row in rows.items() if "variants" in row]


def commands_with(record):
    """Return the processes that append to a file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] * (str(record).encode() in path.read_bytes())
        except OSError:
            pass
    return found


def test_a_command_is_killed_with_its_group(tmp_path):
    """What it started does not go on after its limit; other commands of the step have the same limit."""
    late = tmp_path / "late"
    shell = ["sh", "-c", f"(sleep 4; touch {late}) & sleep 60"]
    assert gpu.execute([shell, [*shell], ["true"], ["false"]], 2, dict(os.environ)) == [None, None, 0, 1]
    assert gpu.execute([["a command that is not there"]], 5, dict(os.environ)) == [127]
    assert gpu.execute([["true"]], 0, dict(os.environ)) == [None]
    time.sleep(3)
    assert not late.exists()


def test_a_log_is_kept(tmp_path):
    record, log = tmp_path / "gpu.jsonl", tmp_path / "gpu.memcheck.log"
    started(record)
    command = ["sh", "-c", f"echo ERROR SUMMARY: 2 errors > {log}; exit 9"]
    phase = gpu_phases.Phase("f", [gpu_phases.Step("memcheck", command, 20, logs={"memcheck": log})])
    assert gpu.run_phase("c", phase, record, "9.0", 100) == "failed"
    found = gpu_results.merged(record)
    assert found["phases"]["c"]["memcheck"] == "ERROR SUMMARY: 2 errors\n"
    assert found["problems"] == ["c: rows: failed: memcheck: exit status 9: the sanitizer found errors"]


def test_says_so_where_there_is_no_gpu(tmp_path):
    blind = environment(tmp_path) | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*DRY[:3], "--phases", "c"], cwd=ROOT, env=blind, capture_output=True, text=True)
    assert run.returncode == 1 and "there is no GPU here" in run.stderr


def test_limits():
    """The phases that matter end within 440 s, all within 560 s, whatever happens in one of them."""
    phases = gpu_phases.phases(Path("gpu.jsonl"), False)
    assert sum(phases[key].seconds for key in "abcdef") <= 440
    assert sum(phase.seconds for phase in phases.values()) <= gpu_phases.TOTAL <= 560
    assert [key for key, phase in phases.items() if phase.needs_build] == ["b", "c", "f"]
    assert [key for key, phase in phases.items() if phase.open] == ["g"]


def test_every_file_of_tests_is_there():
    assert {f"test_{name}" for name in gpu_phases.GUIDED} == set(WITH_CUDA) - {"test_large"}
    for name in (*gpu_phases.GUIDED, *gpu_phases.OTHERS):
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


def test_what_needs_the_build_says_so(tmp_path, monkeypatch, capsys):
    """After a build that failed, or without one, CUDA phases do not run; the others do."""
    monkeypatch.setenv("OUT", str(tmp_path))
    ran = []

    def execute(commands, limit, environment):
        ran.append(commands[0])
        return [int("build" in commands[0])]

    monkeypatch.setattr(gpu, "execute", execute)
    assert gpu.run([*"abcd"], False) == 1
    phases = json.loads((tmp_path / "gpu-a-b-c-d.json").read_text())["phases"]
    assert [phase["status"] for phase in phases.values()] == ["failed", "not run", "not run", "ended"]
    assert len(ran) == 1 + 1 + 2
    assert "PROBLEM: c: CUDA, rows: not run: it needs the build" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--phases", "a,x"])
    assert "unknown phases: x; there are a, b" in capsys.readouterr().err


def test_versions_of_what_the_build_needs(monkeypatch):
    assert [line.split(">=")[0] for line in gpu_build.requirements()] == ["setuptools", "pybind11"]
    assert gpu_build.lacking(gpu_build.requirements()) == []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "70.9.1")
    assert gpu_build.lacking(["setuptools>=77", "pybind11>=2.13"]) == [
        "setuptools is 70.9.1; the build needs setuptools>=77 (pyproject.toml)"
    ]
    monkeypatch.undo()
    assert gpu_build.lacking(["not-there>=1"]) == ["not-there is not installed; the build needs not-there>=1"]


def started(path, **phase):
    """Begin a file with one phase."""
    about = {"name": "rows", "planned": 9, "open": False, "wants": []} | phase
    gpu_results.append(path, schema=1, dry=False, date="2026-12-01T10:00:00", phases={"c": about})


def test_a_torn_line_costs_no_other(tmp_path):
    record = tmp_path / "gpu.jsonl"
    assert gpu_results.merged(record)["problems"] == ["nothing was run"]
    started(record)
    with record.open("a") as file:
        file.write('{"phase": "c", "test": "t::a", "outc')
    gpu_results.append(record, phase="c", status="ended", seconds=1.0, why="")
    result = gpu_results.merged(record)
    assert result["torn"] == 1 and result["problems"] == []


def test_a_skip_is_a_problem(tmp_path):
    """So are a test that did not end, and a phase without tests; one that runs until a stop may be cut."""
    for open_, status in ((False, "failed"), (True, "cut")):
        record = tmp_path / f"{status}.jsonl"
        started(record, open=open_, wants=["tests"])
        for name, outcome in (("a", "passed"), ("b", "failed"), ("d", "skipped"), ("e", "started")):
            gpu_results.append(record, phase="c", test=f"t::{name}", outcome=outcome, message="m")
        gpu_results.append(record, phase="c", status=status, seconds=9, why="tests: exit status 1")
        found = ["c: rows: failed: tests: exit status 1"] if status == "failed" else []
        found += ["c: test failed: t::b: m", "c: test skipped: t::d: m"]
        found += ["c: test did not end: t::e: m"] if status == "failed" else []
        assert gpu_results.merged(record)["problems"] == found
    started(tmp_path / "none.jsonl", wants=["tests", "rows"])
    gpu_results.append(tmp_path / "none.jsonl", phase="c", status="ended", seconds=9)
    assert gpu_results.merged(tmp_path / "none.jsonl")["problems"] == ["c: no tests ran", "c: no rows ran"]


def made_up_row():
    samples = {"copy": {"direct": [1e-4] * 3}, "cuda": {"direct": [2e-4] * 3, "graph": "no"}}
    samples["eager"] = {"direct": [4e-4] * 3}
    variants = [{"name": name, "ours": name == "cuda", "same_work": True, "status": "ok"} for name in ("cuda", "eager")]
    row = {"op": "guided_step", "shape": [4, 8], "dtype": "float32", "case": "x0", "kind": "forward"}
    return row | measure.compared(samples, variants)


def test_every_row_of_ours_is_wanted():
    """A baseline may be unable to run, but not be wrong."""
    row = {"variants": []}
    for ours in (True, False):
        for status in ("ok", "WRONG", "cannot run"):
            row["variants"].append({"name": "n", "ours": ours, "status": status, "message": "m"})
    found = gpu_results.problems_of_rows({"r": row, "q": {"status": "failed", "message": "why"}})
    assert found == ["row r, n: WRONG: m", "row r, n: cannot run: m", "row r, n: WRONG: m", "row failed: q: why"]


def test_the_table(tmp_path, capsys):
    record = tmp_path / "gpu.jsonl"
    started(record)
    gpu_results.append(record, environment={"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "nvcc": "13"})
    gpu_results.append(record, phase="c", row="r", data=made_up_row())
    gpu_results.append(record, phase="c", status="ended", seconds=1.0)
    gpu_results.write(gpu_results.merged(record), tmp_path / "gpu.json")
    assert gpu.main(["--show", str(tmp_path / "gpu.json")]) == 0
    said = capsys.readouterr().out
    assert "2026-12-01, commit unknown, G; driver 1, torch 2, triton 3, nvcc 13." in said
    assert "| `guided_step` x0 | [4,8] f32 | cuda | 200 us | 50 % | - | - | eager | 2.00 [2.00, 2.00] |" in said


def test_rows_go_on_in_a_process_of_their_own(tmp_path, monkeypatch):
    """After an error that leaves the GPU unusable the next workload begins in a new process."""
    monkeypatch.setattr(gpu_rows, "measure", lambda *given: 1 / 0)
    monkeypatch.setattr(gpu_rows, "usable", lambda device: False)
    again = []
    monkeypatch.setattr(os, "execv", lambda path, command: again.append(command[-2:]))
    record = tmp_path / "gpu.jsonl"
    started(record)
    options = Namespace(record=record, phase="c", impl=["cuda"], compile=False, dry=True, first=0)
    gpu_rows.rows(gpu_rows.chosen("core", True)[:2], options)
    assert again == [["--first", "1"], ["--first", "2"]]
    assert [row["message"] for row in gpu_results.merged(record)["phases"]["c"]["rows"].values()] == [
        "ZeroDivisionError: division by zero"
    ] * 2


def test_the_plugin_says_why(tmp_path):
    """A failure, a skip, an error outside a test, a worker that crashes, and a file that cannot be collected; other
    implementations' tests are left out."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken():\n    yield\n    raise OSError('left open')\n"
        "@pytest.mark.parametrize('impl', ['cuda', 'cpu'])\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_it(impl, n, request):\n"
        "    if n == 1:\n        assert n == 2, 'not two'\n"
        "    if n == 2:\n        pytest.skip('no reason')\n"
        "    if n == 3:\n        request.getfixturevalue('broken')\n"
    )
    (tmp_path / "test_crash.py").write_text(
        "import os, pytest\n@pytest.mark.parametrize('impl', ['cuda'])\ndef test_it(impl):\n    os._exit(3)\n"
    )
    (tmp_path / "test_unread.py").write_text("import nothing_of_this_name\n")
    record = tmp_path / "gpu.jsonl"
    started(record)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider", "-n", "1"]
    command += ["--continue-on-collection-errors", "--record", str(record), "--phase", "c", "--impl", "cuda"]
    subprocess.run([*command, "--rootdir", str(tmp_path), str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
    phase = gpu_results.merged(record)["phases"]["c"]
    found = {name.split("/")[-1]: (one["outcome"], one["message"]) for name, one in phase["tests"].items()}
    assert found == {
        "test_unread.py": ("failed", "E   ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        "test_crash.py::test_it[cuda]": ("failed", "worker 'gw0' crashed while running 'test_crash.py::test_it[cuda]'"),
        "test_some.py::test_it[0-cuda]": ("passed", ""),
        "test_some.py::test_it[1-cuda]": ("failed", "AssertionError: not two"),
        "test_some.py::test_it[2-cuda]": ("skipped", "Skipped: no reason"),
        "test_some.py::test_it[3-cuda]": ("failed", "OSError: left open"),
    }
    assert [*phase["collected"].values()] == [5]


def test_a_python_without_torch_is_told():
    script = (
        "import sys; sys.modules['torch'] = None; from benchmarks import gpu_build as b; sys.exit(b.describe(0, 0))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "has no torch; GPU_PYTHON=" in run.stderr and "Traceback" not in run.stderr
