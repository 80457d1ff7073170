"""What a figure depends on besides the code: machine, threads, clocks, versions, commit."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import lgd_kernels
from benchmarks import timing
from lgd_kernels.runtime import impls

PEERS = ("diffusers", "geomloss", "pykeops")
ROOT = Path(__file__).parents[1]


def describe(device: str) -> dict:
    cpu, cuda = impls.extension(), impls.cuda_extension()
    changed = said("git", "status", "--porcelain")
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD") or "unknown",
        "dirty": None if changed is None else bool(changed),
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "instruction_set": cpu.instruction_set() if cpu else "",
        "last_level_cache": timing.cache_bytes("cpu"),
        "lgd_kernels": lgd_kernels.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy", *PEERS)},
        "compiler": cpu.compiler if cpu else "",
        "nvcc": cuda.compiler if cuda else "",
    }
    if device == "cuda":
        clocks = said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader")
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "l2_cache": timing.cache_bytes("cuda"),
            "clocks_and_driver": clocks or "unknown",
            "driver": (clocks or "unknown").split(", ")[-1],
        }
    return found


def in_words(environment: dict) -> list[str]:
    """Three lines for the screen."""
    e = environment
    commit = e["commit"][:10] + {True: ", with changes", False: "", None: ""}[e["dirty"]]
    machine = f"{e['cpu']}, {e['instruction_set'] or 'no extension'}, threads {e['threads']}, cores {e['cores']}"
    if e["device"] == "cuda":
        machine = f"{e['gpu']}, L2 {e['l2_cache'] / 1e6:.0f} MB, clocks {e['clocks_and_driver']}; {machine}"
    else:
        machine += f", last cache {e['last_level_cache'] / 1e6:.0f} MB, load {e['load']}"
    built = [f"{name} {e[name]}" for name in ("compiler", "nvcc") if e[name]]
    versions = [f"{name} {e[name]}" for name in ("lgd_kernels", "python", "torch", "triton", "numpy")]
    others = [f"{name} {e[name]}" for name in PEERS if e.get(name, "not installed") != "not installed"]
    if e["device"] == "cpu" and e["load"] + e["threads"] > e["cores"] + 1:
        machine += "\nothers are at work here: fewer --threads give steadier figures"
    return [machine, ", ".join(versions + built), ", ".join([f"commit {commit}", e["date"], *others])]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def said(*command: str) -> str | None:
    """What a command printed, or None where there is no such command or it failed."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def settle_memory() -> bool:
    """Sets glibc's thresholds to where they grow by themselves in a process that lives on: blocks of up to 32 MiB come
    from memory that it has. Else some go back to the system while now this, now that is timed, and to have 4 MB again
    costs ten times as much as to write them."""
    mmap_threshold, trim_threshold, most = -3, -1, 32 * 2**20  # names and sizes of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(mmap_threshold, most) and mallopt(trim_threshold, 2 * most))
