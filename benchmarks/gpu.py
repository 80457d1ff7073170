"""`make gpu`: on a machine with a GPU, runs phases in the order of what matters, each within its own limit.

Uses the Python that runs it, and installs nothing. Every result is on disk as soon as it is there, in `gpu.jsonl` in
$OUT or runs/, and the whole in `gpu.json` after each phase (gpu_results.py). Exit status 1, and every reason by name,
if there is no GPU, an extension is missing, a test failed or was skipped, or a row was wrong or did not run.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import gpu_phases
from benchmarks.gpu_build import ROOT
from benchmarks.gpu_phases import DRY, TOTAL, Phase, Step
from benchmarks.gpu_results import SCHEMA, append, merged, summary, write

DESCRIBE = 60  # seconds to import torch and to ask for versions
LOG = 8000  # characters of a log, from its end, that a result keeps
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def main(arguments: list[str] | None = None) -> int:
    keys = "abcdefg"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--phases", default=",".join(keys), metavar="c,d", help="some of a to g")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, with stand-ins: no measurement")
    parser.add_argument("--count", action="store_true", help="only count what the calls of phase d compile")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print a .jsonl or .json, with a table")
    options = parser.parse_args(arguments)
    if options.count:
        from benchmarks.gpu_checks import counted

        print(counted())
        return 0
    if options.show:
        return show(options.show)
    chosen = options.phases.split(",")
    if unknown := set(chosen) - set(keys):
        parser.error(f"unknown phases: {', '.join(sorted(unknown))}; there are {', '.join(keys)}")
    return run([key for key in keys if key in chosen], options.dry)


def run(chosen: list[str], dry: bool) -> int:
    """Run phases, and print what became of them."""
    began, slack = time.monotonic(), DRY if dry else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that commands are killed, too
    folder = Path(os.environ.get("OUT") or ROOT / "runs").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["gpu", *(["dry"] if dry else []), *([] if len(chosen) == 7 else chosen)]
    record = folder / f"{'-'.join(parts)}.jsonl"
    record.unlink(missing_ok=True)
    phases = {key: phase for key, phase in gpu_phases.phases(record, dry).items() if key in chosen}
    about = {
        key: {"name": phase.name, "planned": phase.seconds, "open": phase.open, "wants": list(phase.wants)}
        for key, phase in phases.items()
    }
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    append(record, schema=SCHEMA, dry=dry, date=date, limit=slack * TOTAL, phases=about)
    if dry:
        from benchmarks.gpu_dry import STAND_INS

        append(record, stand_ins=STAND_INS)
    describe = [sys.executable, "-m", "benchmarks.gpu_build", "describe", "--record", str(record)]
    if execute([[*describe, *(["--dry"] if dry else [])]], slack * DESCRIBE, dict(os.environ)) != [0]:
        return 1
    capability = merged(record)["environment"].get("capability", "")
    built = gpu_phases.built(dry)
    for key, phase in phases.items():
        if phase.needs_build and not built:
            append(record, phase=key, status="not run", why="it needs the build", seconds=0)
        else:
            status = run_phase(key, phase, record, capability, slack * TOTAL - (time.monotonic() - began))
            built = status == "ended" if key == "a" else built
        write(merged(record), record.with_suffix(".json"))
    result = merged(record)
    print(summary(result, record.with_suffix(".json")))
    return 1 if result["problems"] else 0


def run_phase(key: str, phase: Phase, record: Path, capability: str, left: float) -> str:
    """Run the steps of a phase, and append what became of it."""
    left = left if phase.open else min(phase.seconds, left)
    print(f"== {key} {phase.name} (at most {left:.0f} s)", flush=True)
    start, planned, failures = time.monotonic(), 0.0, []
    append(record, phase=key, status="running")
    for step in phase.steps:
        planned += step.seconds
        limit = (left if step is phase.steps[-1] else min(planned, left)) - (time.monotonic() - start)
        before = time.monotonic()
        statuses = execute([step.command, *step.beside], limit, gpu_phases.environment(step, capability))
        append(record, phase=key, said=f"{step.name} {time.monotonic() - before:.1f} s")
        for name, log in step.logs.items():
            if log.is_file():
                append(record, phase=key, **{name: log.read_text(errors="replace")[-LOG:]})
        failures += what_happened(step, statuses, limit)
    status = "ended" if not failures else "cut" if all("cut" in one for one in failures) else "failed"
    seconds = round(time.monotonic() - start, 1)
    append(record, phase=key, status=status, seconds=seconds, why="; ".join(failures))
    print(f"== {key} {phase.name}: {status}, {seconds:.1f} s", flush=True)
    return status


def what_happened(step: Step, statuses: list[int | None], limit: float) -> list[str]:
    """Return what went wrong in a step."""
    said = {None: f"cut after {max(limit, 0):.0f} s", 9: "exit status 9: the sanitizer found errors"}
    return [f"{step.name}: {said.get(one, f'exit status {one}')}" for one in statuses if one != 0]


def execute(commands: list[list[str]], limit: float, environment: dict[str, str]) -> list[int | None]:
    """Run commands at the same time. Return their exit statuses, None for one that was cut or never began.

    Each has a process group of its own, which is killed in the end, whatever happens. It dies with this process."""
    if limit <= 0:
        return [None] * len(commands)
    end, running = time.monotonic() + limit, []
    statuses: list[int | None] = []
    try:
        for command in commands:
            try:
                running.append(subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=own_group))
            except OSError as error:
                print(f"make gpu: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
                statuses.append(127)
        for process in running:
            try:
                statuses.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(None)
    finally:
        for process in running:
            kill(process)
    return statuses


def own_group() -> None:
    """Give a command a process group, and let it die with its parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill(process: subprocess.Popen) -> None:
    """Kill what is left of a command's process group; do not wait long for what the system does not let go."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        print(f"make gpu: process {process.pid} does not end", file=sys.stderr)


def show(path: Path) -> int:
    """Print a result: its summary and, of a measurement, its table."""
    result = merged(path)
    print(summary(result, path))
    if not result["dry"]:
        from benchmarks.gpu_table import table

        print("\n".join(["", *table(result)]))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
