"""`make gpu`: on a machine with a GPU, builds in place, runs the GPU tests and every benchmark, and writes one JSON.

Uses the Python that runs it, and installs nothing. Exit status 1, and every reason in words, if there is no GPU, an
extension is missing, a test failed or was skipped, or a benchmark row was wrong or did not run. The JSON goes to
$OUT/gpu.json, or to runs/gpu.json; it is written after each phase, so what ran is kept if something stops the rest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

from benchmarks.report import name_of

ROOT = Path(__file__).parents[1]
LIMIT = 470  # seconds for everything
LIMITS = {"build": 120, "tests": 240, "benchmarks on the GPU": 300, "benchmarks on the CPU": 60}


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: there is no GPU here that torch {torch.__version__} sees; nothing was run", file=sys.stderr)
        return 1
    folder = Path(os.environ.get("OUT") or ROOT / "runs")
    folder.mkdir(parents=True, exist_ok=True)
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    scratch = {name: folder / f"gpu-{name}" for name in ("tests.xml", "cuda.json", "cpu.json")}
    for path in scratch.values():
        path.unlink(missing_ok=True)
    benchmarks = [sys.executable, "-m", "benchmarks", "--device"]
    commands = {
        "build": [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"],
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={scratch['tests.xml']}"],
        "benchmarks on the GPU": [*benchmarks, "cuda", "--json", scratch["cuda.json"], "--plot", folder / "gpu.png"],
        "benchmarks on the CPU": [*benchmarks, "cpu", "--quick", "--json", scratch["cpu.json"]],
    }
    build = {"LGD_CUDA_ARCH": capability, "LGD_REQUIRE_EXT": "1"}
    result = {"gpu": torch.cuda.get_device_name(), "seconds": {}, "problems": []}
    start, began = time.monotonic(), time.time()
    for phase, command in commands.items():
        left = LIMIT - (time.monotonic() - start)
        seconds, problem = run(phase, command, min(LIMITS[phase], left), build)
        result["seconds"][phase] = round(seconds, 1)
        result["problems"] += problem
        if phase == "build":
            result["problems"] += missing_extensions(began)
        if phase == "tests":
            result["tests"] = count(scratch["tests.xml"])
            result["problems"] += problems_of_tests(result["tests"])
        if phase.startswith("benchmarks"):
            device = "cuda" if phase.endswith("GPU") else "cpu"
            result[device] = read(scratch[f"{device}.json"])
            result["problems"] += problems_of_rows(result[device]["rows"], device)
        (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        if phase == "build" and result["problems"]:
            break
    for path in scratch.values():
        path.unlink(missing_ok=True)
    print(summary(result, folder / "gpu.json"))
    return 1 if result["problems"] else 0


def run(phase: str, command: list, limit: float, environment: dict[str, str]) -> tuple[float, list[str]]:
    """(seconds, what went wrong)"""
    print(f"== {phase} (at most {limit:.0f} s)", flush=True)
    start, status = time.monotonic(), None
    if limit > 0:
        try:
            status = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            pass
    seconds = time.monotonic() - start
    print(f"== {phase}: {seconds:.1f} s", flush=True)
    if status is None:
        return seconds, [f"{phase}: stopped after {seconds:.0f} s"]
    return seconds, [f"{phase}: exit status {status}"] if status else []


def missing_extensions(since: float) -> list[str]:
    """setuptools lets an optional extension fail, and one of an earlier build would stand in for it."""
    importlib.invalidate_caches()
    specs = {name: importlib.util.find_spec(f"lgd_kernels.{name}") for name in ("_C", "_C_cuda")}
    return [
        f"build: lgd_kernels.{name} was not built"
        for name, spec in specs.items()
        if spec is None or os.stat(spec.origin).st_mtime < since - 1
    ]


def count(path: Path) -> dict:
    """What pytest's report says: counts, and why tests were skipped or failed."""
    cases = list(xml.etree.ElementTree.parse(path).getroot().iter("testcase")) if path.is_file() else []
    found = {"run": len(cases), "passed": 0, "failed": [], "skipped": []}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if bad is None:
            found["passed"] += 1
        else:
            reason = (bad.get("message") or "").split("\n")[0]
            found["skipped" if bad.tag == "skipped" else "failed"].append(f"{name}: {reason}")
    return found


def problems_of_tests(tests: dict) -> list[str]:
    """A test that was skipped has shown nothing, and neither have no tests at all."""
    found = [f"test {what}: {line}" for what in ("failed", "skipped") for line in tests[what]]
    return found or ([] if tests["run"] else ["tests: none was run"])


def problems_of_rows(rows: list[dict], device: str) -> list[str]:
    """Our own variants must all have been timed, and right; a baseline may be unable to run, but not be wrong."""
    found = [
        f"{device}: {name_of(row)}, {one['name']}: {one['status']}: {one['message']}"
        for row in rows
        for one in row["variants"]
        if one["status"] != "ok" and (one["ours"] or one["status"] == "WRONG")
    ]
    return found or ([] if rows else [f"{device}: no benchmark row"])


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def summary(result: dict, path: Path) -> str:
    tests = result.get("tests", {"run": 0, "passed": 0, "failed": [], "skipped": []})
    rows = {device: len(result.get(device, {"rows": []})["rows"]) for device in ("cuda", "cpu")}
    return "\n".join([
        "", f"{result['gpu']}: " + ", ".join(f"{phase} {taken} s" for phase, taken in result["seconds"].items()),
        f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped; "
        f"benchmark rows: {rows['cuda']} on the GPU, {rows['cpu']} on the CPU; all in {path}",
        *(f"PROBLEM: {problem}" for problem in result["problems"]), "problems: " + str(len(result["problems"])),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
