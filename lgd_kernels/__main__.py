"""Run `python -m lgd_kernels info` and `learn`; also the console script `lgd_kernels`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path
from types import ModuleType

USAGE = """usage: python -m lgd_kernels info            what was built, what runs here, and why the rest does not
       python -m lgd_kernels learn           learn omega for a model and data of your own (--help for options)
       python -m lgd_kernels --version"""


def info() -> int:
    """Print versions, builds, devices, and whether each implementation of each op runs, or every reason why not."""
    import torch

    import lgd_kernels
    from lgd_kernels.runtime import impls

    print(f"lgd_kernels {lgd_kernels.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("  " + ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lines below print the same
        extension, cuda = impls.extension(), impls.cuda_extension()
    print(f"  C++ extension: {_described(extension) if extension else impls.extension_error()}")
    _print_build("_C", extension)
    print(f"  CUDA extension: {f'built by nvcc {cuda.compiler}' if cuda else impls.cuda_extension_error()}")
    _print_build("_C_cuda", cuda)

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        print(f"  cuda:{index}: {name}, compute capability {major}.{minor}")
    if len(devices) == 1:
        print("  no CUDA or ROCm device")

    for op in impls.ops():
        print(f"\n{op}")
        for device in devices:
            chosen = impls.available_impls(op, device)[0]
            for impl in impls.NAMES:
                reasons = impls.why_not(op, impl, device=device)
                runs = "yes, the automatic choice" if impl == chosen else "yes"
                print(f"  {impl:9} on {device:4}  {'no: ' + '; '.join(reasons) if reasons else runs}")
    return 0


def _described(extension: ModuleType) -> str:
    """Describe the C++ extension in a line."""
    import torch

    threads = f"OpenMP, {torch.get_num_threads()} threads" if extension.openmp else "one thread"
    return f"built by {extension.compiler}, runs as {extension.instruction_set()}, {threads}"


def _print_build(name: str, extension: ModuleType | None) -> None:
    """Print the path of an extension from elsewhere, whether it is stale, and setup.py's note."""
    from lgd_kernels.runtime import builds

    if extension and extension.__file__:
        path = Path(extension.__file__)
        if path.resolve().parent != builds.PACKAGE:
            print(f"    loaded from {path}")
        if stale := builds.stale(path):
            print(f"    {stale}")
        note = builds.note(name, path.parent)
    else:
        note = builds.note(name)
    for line in note.splitlines():
        print(f"    {line}")


def main(arguments: list[str]) -> int:
    """Run a command. Return the exit status; 2 for an unknown command."""
    match arguments:
        case ["--version" | "-V"]:
            import lgd_kernels

            print(f"lgd_kernels {lgd_kernels.__version__}")
            return 0
        case ["info"]:
            return info()
        case ["learn", *options]:
            from lgd_kernels.learn import command

            return command.main(options)
        case [] | ["-h"] | ["--help"]:
            print(USAGE)
            return 0
    print(f"unknown command: {' '.join(arguments)}\n{USAGE}", file=sys.stderr)
    return 2


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def command() -> int:
    """Run `main` as the console script, and end without a message if a pipe closes (`... info | head -1`)."""
    try:
        status = main(sys.argv[1:])
        if sys.stdout is not None:  # None where it was closed: `... info >&-`
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        try:
            print(flush=True)  # fails again if the closed pipe is stdout
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes into it
            return 141  # the status of a program that SIGPIPE ended
        raise


if __name__ == "__main__":
    sys.exit(command())
