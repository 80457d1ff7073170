"""python -m benchmarks: verifies, then times; a mismatch makes the exit status 1. A slower run does not."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

import torch

from benchmarks import environment, markdown, report
from benchmarks.measure import FAILURES, measure
from benchmarks.workload import COMPARED, find, kinds, ops
from lgd_kernels.runtime import impls

PEERS_SECONDS = 3.0  # of a row's rounds, so that the whole table beside all others takes less than ten minutes


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parsed.add_argument
    names = f"{', '.join(ops())}, which are all if none is named; or beside other libraries {', '.join(COMPARED)}"
    about = f"files of workloads: {names}; or `host [op ...]`: what the host pays for a GPU call, without a GPU"
    add("ops", nargs="*", metavar="workload", help=about)
    add("--peers", action="store_true", help="beside other libraries: diffusers, geomloss, KeOps")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--impl",
        nargs="+",
        default=[],
        choices=impls.NAMES,
        help="implementations of ours (those meant for the device)",
    )
    add("--dtype", nargs="+", default=[], help="float32, bfloat16, ...")
    add("--threads", type=int, help="of torch and of our kernels")
    add("--rounds", type=int, help="samples of each variant, taken in turn (15; 7 with --quick)")
    add("--quick", action="store_true", help="fewer workloads and rounds")
    add("--no-compile", action="store_true", help="without the torch.compile baselines")
    add("--json", type=Path, metavar="FILE", help="write everything, with every sample")
    add("--plot", type=Path, metavar="FILE", help="write a picture, time against bytes; into a FOLDER: all pictures")
    add("--markdown", action="store_true", help="print the short table of docs/benchmarks.md")
    add("--show", type=Path, metavar="FILE", help="measure nothing: --plot, --markdown or --compare an earlier --json")
    add("--compare", type=Path, metavar="OLD", help="against an older --json: ratios of the same run only")
    add("--list", action="store_true", help="what would be measured")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, talks
    options = parser().parse_args(arguments)
    if options.show:
        run = json.loads(options.show.read_text())
        show(options, run, options.show.name)
        return 0
    if options.ops[:1] == ["host"]:
        from benchmarks import host

        return host.main(options.ops[1:], options.rounds or 15)
    there = [*ops(), *COMPARED]
    if unknown := set(options.ops) - set(there):
        parser().error(f"unknown workload: {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no GPU here")
    if options.threads:
        torch.set_num_threads(options.threads)
    workloads = find(options.ops, options.device, options.dtype, options.quick, options.peers)
    if options.list:
        for one in workloads:
            what = "; ".join(kind.name for kind in kinds(one))
            print(f"{one.op} {report.compact(one.shape)} {str(one.dtype)[6:]}, {one.case}: {what}")
        return 0
    run = {"environment": environment.describe(options.device), "rows": []}
    print("\n".join(environment.in_words(run["environment"])), end="\n\n")
    print(report.LEGEND, report.heading(), sep="\n\n", flush=True)
    limit = PEERS_SECONDS if options.peers else math.inf
    rounds = options.rounds or (7 if options.quick else 15)
    # CUDA graphs are captured on a side stream, and what they capture must have been made on the same one
    stream = torch.cuda.stream(torch.cuda.Stream()) if options.device == "cuda" else contextlib.nullcontext()
    with stream:
        for one in workloads:
            for row in measure(
                one, options.device, options.impl, rounds, not options.no_compile, min(limit, one.seconds)
            ):
                run["rows"].append(row)
                print(report.table(row), flush=True)
            write(options.json, run)  # as far as it got, should something stop it
    show(options, run, options.json.name if options.json else "")
    failed = [one for row in run["rows"] for one in row["variants"] if one["status"] in FAILURES]
    if failed:
        print(f"{len(failed)} wrong or failed: not timed", file=sys.stderr)
    return 1 if failed or not run["rows"] else 0


def show(options, run: dict, name: str) -> None:
    """What was asked for besides figures on the screen."""
    if options.plot and options.plot.suffix:
        from benchmarks import plot

        print(f"picture: {plot.roofline(run, options.plot)}")
    elif options.plot:
        from benchmarks import pictures

        print("\n".join(f"picture: {path}" for path in pictures.every(run, options.plot)))
    if options.markdown:
        print(markdown.block(run, name))
    if options.compare:
        print("\n".join(report.compare(json.loads(options.compare.read_text()), run)))


def write(path: Path | None, run: dict) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    environment.settle_memory()
    sys.exit(main())
