"""Parse the options that the studies share, check for their packages, and write their results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

THREADS = "threads of PyTorch (default: PyTorch's own choice)"
PACKAGES = ("sklearn", "matplotlib", "jinja2")


def parser(name: str, doc: str, seeds: int, threads: str = THREADS) -> argparse.ArgumentParser:
    """Return a parser with the options of every study.

    Args:
        name: of the study.
        doc: a text whose first line describes the study.
        seeds: the default of --seeds.
        threads: what --threads does.
    """
    found = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=doc.splitlines()[0])
    found.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for the report and the metrics")
    found.add_argument("--seeds", type=int, default=seeds, help=f"how many seeds, from 0 (default {seeds})")
    found.add_argument("--threads", type=int, help=threads)
    found.add_argument("--quick", action="store_true", help="take seconds instead of minutes; the figures mean nothing")
    return found


def parsed(options: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Return the options. Exit with status 2 for an invalid one."""
    args = options.parse_args(argv)
    if args.seeds < 1 or (args.threads is not None and args.threads < 1):
        options.error("--seeds and --threads must be 1 or more")
    return args


def lacks_packages() -> bool:
    """Return whether a package of the studies is missing; if so, name it on stderr."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the examples need {' and '.join(missing)}: pip install -e '.[examples]'", file=sys.stderr)
    return bool(missing)


def versions() -> dict[str, str | int]:
    """Return the versions and the thread count that the figures depend on."""
    import matplotlib
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "matplotlib": matplotlib.__version__,
        "threads": torch.get_num_threads(),
    }


def write(out: Path, metrics: dict[str, Any], page: str) -> None:
    """Write metrics.json and report.html into a folder."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "report.html").write_text(page, encoding="utf-8")
