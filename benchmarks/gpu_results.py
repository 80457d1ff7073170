"""The file that `make gpu` writes, and what counts as a problem in it. No torch is imported here.

Every process of a run appends lines of JSON to one file, each in one write and after a line break, so that a process
that is killed loses at most its own last line. `merged` makes one result of the lines, at any time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

SCHEMA = 1


def append(path: Path, **record: object) -> None:
    """Append a line to the file of a run."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"\n{json.dumps(record)}\n".encode())
    finally:
        os.close(file)


def merged(path: Path) -> dict:
    """Return the result of a run so far, from its lines or, in a `.json`, as it was written at the end."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    result: dict = {"schema": SCHEMA, "dry": False, "stand_ins": [], "environment": {}, "phases": {}, "torn": 0}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            result["torn"] += 1
            continue
        if "phase" not in record:
            result |= {name: value for name, value in record.items() if name != "phases"}
            for key, about in record.get("phases", {}).items():
                empty = {"tests": {}, "rows": {}, "said": [], "problems": []}
                result["phases"][key] = about | {"status": "did not begin", "seconds": None} | empty
        elif record["phase"] in result["phases"]:
            _add(result["phases"][record["phase"]], record)
    return result | {"problems": problems(result)}


def _add(phase: dict, record: dict) -> None:
    about = {name: value for name, value in record.items() if name != "phase"}
    if "test" in about:
        phase["tests"][about.pop("test")] = about
    elif "row" in about:
        phase["rows"][about.pop("row")] = about.pop("data", about)
    elif "collected" in about:
        phase.setdefault("collected", {})[about["of"]] = about["collected"]
    elif "problem" in about:
        phase["problems"].append(about["problem"])
    elif "said" in about:
        phase["said"].append(about["said"])
    else:
        phase.update(about)


def write(result: dict, path: Path) -> None:
    """Write a result as one JSON; a reader finds the old file or the new one, never half of it."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def problems(result: dict) -> list[str]:
    """Return everything that is wrong, by name."""
    found = [f"{key}: {line}" for key, phase in result["phases"].items() for line in problems_of_phase(phase)]
    return found or ([] if result["phases"] else ["nothing was run"])


def problems_of_phase(phase: dict) -> list[str]:
    """Return what is wrong in a phase. One that runs until a stop may be cut, and then lacks nothing."""
    cut = phase["status"] in ("cut", "running")
    found = [] if phase["status"] == "ended" or (phase["open"] and cut) else [f"{phase['name']}: {phase['status']}"]
    if phase.get("why") and found:
        found[0] += f": {phase['why']}"
    found += phase["problems"]
    found += problems_of_tests(phase["tests"], phase["open"] and cut)
    left = ("planned", "started") if phase["open"] and cut else ()
    found += problems_of_rows({name: row for name, row in phase["rows"].items() if row.get("status") not in left})
    if phase["status"] == "ended":
        found += [f"no {what} ran" for what in phase["wants"] if not phase[what]]
    return found


def problems_of_tests(tests: dict[str, dict], open_: bool = False) -> list[str]:
    """A test that was skipped has shown nothing, nor has one that did not end."""
    said = {"failed": "failed", "skipped": "skipped", "started": "did not end"}
    return [
        f"test {said[one['outcome']]}: {name}: {one.get('message', '')}".removesuffix(": ")
        for name, one in tests.items()
        if one["outcome"] in said and not (open_ and one["outcome"] == "started")
    ]


def problems_of_rows(rows: dict[str, dict]) -> list[str]:
    """Our own variants must all have been timed, and right; a baseline may be unable to run, but not be wrong."""
    found, said = [], {"planned": "did not begin", "started": "did not end", "failed": "failed"}
    for name, row in rows.items():
        if "variants" not in row:
            found.append(f"row {said[row['status']]}: {name}: {row.get('message', '')}".removesuffix(": "))
            continue
        found += [
            f"row {name}, {one['name']}: {one['status']}: {one['message']}"
            for one in row["variants"]
            if one["status"] != "ok" and (one["ours"] or one["status"] == "WRONG")
        ]
    return found


def summary(result: dict, path: Path) -> str:
    """Return a line for each phase, and the problems."""
    lines = ["", f"{result['environment'].get('gpu', 'no GPU')}{' (a dry run)' if result['dry'] else ''}; {path}"]
    for key, phase in result["phases"].items():
        taken = "-" if phase["seconds"] is None else f"{phase['seconds']:.0f}"
        passed = sum(one["outcome"] == "passed" for one in phase["tests"].values())
        wanted = sum(phase.get("collected", {}).values())
        timed = sum("variants" in row for row in phase["rows"].values())
        counts = [f"{passed} of {wanted} tests passed"] if wanted else []
        counts += [f"{timed} of {len(phase['rows'])} rows timed"] if phase["rows"] else []
        about = "; ".join([phase["status"], *counts, *phase["said"]])
        lines.append(f"{key} {phase['name']:34} {taken:>4} of {phase['planned']} s: {about}")
    lines += [f"PROBLEM: {problem}" for problem in result["problems"]]
    return "\n".join([*lines, f"problems: {len(result['problems'])}"])
