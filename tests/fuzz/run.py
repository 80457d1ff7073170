"""Make many random calls in separate processes: `make fuzz`, or `python -m fuzz.run` with tests/ on the path.

A worker notes each call before it makes it, so that a crash, a hang or an abort is traced to its call.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz import strategies
from fuzz.checks import Fault, check
from fuzz.inputs import Call, Spec, Target

CHUNK = 2000  # calls of one process: a few tens of seconds, of which imports take three
ATTEMPTS = 5  # processes for a chunk, if the earlier ones end early
SNIPPET = """PYTHONPATH=.:tests {python} -X faulthandler - <<'END'
from math import inf, nan
from fuzz.checks import check
from fuzz.inputs import *
print(check({call}))
END"""


class Chunk(NamedTuple):
    """The result of the calls of one process."""

    calls: int
    faults: list[dict]  # what, call, times, known


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the same seed and functions make the same calls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--functions", default="", help="only these, separated by commas")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a process of up to 2000 calls")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options)
    began, found, known, done = time.time(), {}, collections.Counter(), 0
    sizes = [min(CHUNK, options.calls - at) for at in range(0, options.calls, CHUNK)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:

        def chunk(number: int, size: int) -> Chunk:
            done, faults = 0, []
            for attempt in range(ATTEMPTS):  # if a process ended early, make the remaining calls with another seed
                note = Path(folder, f"{number}-{attempt}")
                command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.run", "--functions", options.functions]
                command += ["--worker", str(note), "--calls", str(size - done)]
                command += ["--seed", str(1_000_003 * options.seed + 100_000 * attempt + number)]
                one = watched(command, note, options.timeout)
                done, faults = done + one.calls, faults + one.faults
                if done >= size:
                    break
            return Chunk(done, faults)

        for one in pool.map(chunk, itertools.count(), sizes):
            done += one.calls
            for fault in one.faults:
                if fault["known"]:
                    known[fault["what"]] += fault["times"]
                    continue
                key = tuple(fault["key"])
                fault["times"] += found[key]["times"] if key in found else 0
                found[key] = min(fault, found.get(key, fault), key=lambda one: len(one["call"])) | {
                    "times": fault["times"]
                }
            print(f"{done} calls, {len(found)} faults, {time.time() - began:.0f} s", flush=True)
    for what, times in known.items():
        print(f"\nknown, {times} times: {what}")
    for fault in found.values():
        print(
            f"\n{fault['times']} times: {fault['what']}\n" + SNIPPET.format(python=sys.executable, call=fault["call"])
        )
    print(f"\n{done} calls of seed {options.seed} in {time.time() - began:.0f} s: {len(found)} faults")
    return 1 if found else 0


def watched(command: list[str], note: Path, timeout: float) -> Chunk:
    """Run a worker. If it crashes or hangs, the fault belongs to the call that it noted last."""
    here = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here))), "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
        if ended.returncode == 0:
            return Chunk(**json.loads(ended.stdout.splitlines()[-1]))
        what, said = f"the process ended with {ended.returncode}", ended.stderr
    except subprocess.TimeoutExpired as error:
        what, said = f"no end within {timeout:g} s", (error.stderr or b"").decode(errors="replace")
    count, _, call = note.read_text().partition(" ") if note.exists() else ("0", "", "")
    lines = "\n".join(line for line in said.splitlines() if not line.startswith("Extension modules"))[:4000]
    name = call.partition("(")[2].partition(",")[0].strip("'")
    fault = {"what": f"{name}: {what}\n{lines}", "call": call, "key": (name, what), "times": 1, "known": False}
    return Chunk(int(count), [fault])


def work(options) -> int:
    """Run the calls of a worker, and print a Chunk as JSON."""
    names = tuple(filter(None, options.functions.split(",")))
    note = os.open(options.worker, os.O_CREAT | os.O_WRONLY)
    found: dict[tuple, dict] = {}
    calls = 0

    @seed(options.seed)
    @settings(max_examples=options.calls, phases=[Phase.generate], database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategies.calls(names))
    def explore(call):
        nonlocal calls
        noted = f"{calls} {call!r}".encode()
        os.pwrite(note, noted, 0)
        os.ftruncate(note, len(noted))
        calls += 1
        fault = check(call)
        if fault is not None:
            one = found.setdefault(fault.key, {"call": call, "fault": fault, "times": 0})
            one["times"] += 1

    explore()
    faults = []
    for key, one in found.items():
        if not one["fault"].known:
            one["call"], one["fault"] = simplified(one["call"], key)
        faults.append({"what": str(one["fault"]), "call": repr(one["call"]), "key": key, "times": one["times"],
                       "known": one["fault"].known})  # fmt: skip
    print(json.dumps({"calls": calls, "faults": faults}))
    return 0


def simplified(call: Call, key) -> tuple[Call, Fault]:
    """Return the simplest call found with this fault: leave out or simplify one thing after another."""
    found = call, check(call)
    for _ in range(3):  # one simplification may make another possible
        before = found
        for candidate in plainer(found[0]):
            fault = check(candidate(found[0]))
            if fault is not None and fault.key == key:
                found = candidate(found[0]), fault
        if found == before:
            break
    return found


def plainer(call: Call):
    """Yield functions that simplify a call, by one change each."""
    yield lambda call: replace(call, around="")
    for name in call.arguments:
        yield lambda call, name=name: replace(call, arguments={k: v for k, v in call.arguments.items() if k != name})
        for field in ("special", "kind", "layout", "seed", "dtype", "rescaled", "ends", "stays", "schedule"):
            yield lambda call, name=name, field=field: replace(
                call, arguments={k: plain(v, field) if k == name else v for k, v in call.arguments.items()}
            )


def plain(value, field: str):
    """Return the value with the default of this field, in every description in it."""
    if isinstance(value, tuple):
        return tuple(plain(one, field) for one in value)
    if isinstance(value, Target):
        return replace(value, x0=plain(value.x0, field), seed=plain(value.seed, field))
    defaults = {one.name: one.default for one in fields(value)} if isinstance(value, Spec) else {}
    return replace(value, **{field: defaults[field]}) if defaults.get(field, MISSING) is not MISSING else value


if __name__ == "__main__":
    sys.exit(main())
