"""The Triton kernels on this machine, whatever it has: their tests again, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
def test_triton_passes_its_tests_in_the_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "triton",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent),
    ]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    passed = int(run.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 100, run.stdout[-2000:]
