"""What the demos' command lines share."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from pathlib import Path

import torch

THREADS = "threads of PyTorch (default: its own choice)"


def parser(name: str, doc: str, seeds: int, threads: str = THREADS) -> argparse.ArgumentParser:
    """With the options that every demo has; `seeds` is the default of --seeds, `threads` what --threads does."""
    found = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=doc.splitlines()[0])
    found.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for report and metrics")
    found.add_argument("--seeds", type=int, default=seeds, help=f"how many seeds, from 0 (default {seeds})")
    found.add_argument("--threads", type=int, help=threads)
    found.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    return found


def parsed(options: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options, checked."""
    args = options.parse_args(argv)
    if args.seeds < 1 or (args.threads is not None and args.threads < 1):
        options.error("--seeds and --threads are at least 1")
    return args


def lacks(*packages: str) -> bool:
    """Whether a package of the demos is missing, which is then said on stderr."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {' and '.join(missing)}: pip install 'lgd_kernels[demo]'", file=sys.stderr)
    return bool(missing)


def versions() -> dict:
    """Of what the figures depend on."""
    import matplotlib
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "matplotlib": matplotlib.__version__,
        "threads": torch.get_num_threads(),
    }
