"""Rows of `make gpu`, verified and timed one by one: `python -m benchmarks.gpu_rows core --record FILE --phase c`.

Every row is a line of the file as soon as it is timed. An error that leaves the GPU unusable ends the process, and
another one goes on with the next workload.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch

from benchmarks import environment, gpu_calls, host, workload
from benchmarks.gpu_results import append
from benchmarks.measure import measure
from benchmarks.report import name_of

ROUNDS = 15
SECONDS = 1.0  # of a row's rounds
GUIDED = "guided_step", "guided_energy", "guided_score"


def chosen(names: str, dry: bool) -> list[workload.Workload]:
    """Return the rows that matter most ("core"), or all others, of the guided ops ("guided") or of the rest."""
    if names == "core":
        return gpu_calls.rows(gpu_calls.TINY) if dry else gpu_calls.rows()
    ops = GUIDED if names == "guided" else [op for op in workload.ops() if op not in GUIDED]
    return [host.host_workload(op) for op in ops[:1]] if dry else workload.find([*ops], "cuda", [], quick=False)


def rows_of(one: workload.Workload) -> list[str]:
    """Return the names of the rows of a workload."""
    about = {"op": one.op, "case": one.case, "shape": one.shape, "dtype": str(one.dtype).removeprefix("torch.")}
    return [name_of(about | {"kind": kind.name}) for kind in workload.kinds(one)]


def usable(device: str) -> bool:
    """Return whether the GPU still works: after an illegal access, for one, it fails every call of a process."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_rows", description=__doc__)
    parser.add_argument("names", choices=("core", "guided", "others"))
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--phase", required=True)
    parser.add_argument("--impl", nargs="+", required=True)
    parser.add_argument("--compile", action="store_true", help="beside torch.compile")
    parser.add_argument("--first", type=int, default=0, help="the first workload that is measured")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, with stand-ins")
    options = parser.parse_args()
    workloads = chosen(options.names, options.dry)
    with contextlib.ExitStack() as stack:
        if options.dry:
            from benchmarks import gpu_dry

            workloads = gpu_dry.few(workloads) if options.names == "core" else workloads
            stack.enter_context(gpu_dry.stand_ins("cuda" in options.impl))
        else:
            # CUDA graphs are captured on a side stream, and what they capture must have been made on the same one
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        return rows(workloads, options)


def rows(workloads: list[workload.Workload], options: argparse.Namespace) -> int:
    """Append every row, and first the names of all."""
    device = "cpu" if options.dry else "cuda"
    rounds = 2 if options.dry else ROUNDS

    def add(name: str, **about: object) -> None:
        append(options.record, phase=options.phase, row=name, **about)

    if not options.first:
        for name in (name for one in workloads for name in rows_of(one)):
            add(name, status="planned")
    for number, one in enumerate(workloads[options.first :], options.first):
        impls = [impl for impl in options.impl if impl in gpu_calls.implementations(one.op)]
        left = rows_of(one)
        try:
            add(left[0], status="started")
            for row in measure(one, device, impls, rounds, options.compile, min(SECONDS, one.seconds)):
                add(left.pop(0), data=row)
                if left:
                    add(left[0], status="started")
        except Exception as error:
            for name in left:
                add(name, status="failed", message=f"{type(error).__name__}: {error}".split("\n")[0])
        if not usable(device):
            again = [*sys.argv[1:], "--first", str(number + 1)]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_rows", *again])
    return 0


if __name__ == "__main__":
    environment.settle_memory()
    sys.exit(main())
