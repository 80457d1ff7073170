"""Run the tests of the Triton kernels in Triton's interpreter, file by file, on any machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNS_TRITON = re.compile(r"^def test_\w+\([^)]*\btarget\b|^@pytest\.mark\.triton", re.MULTILINE)
FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if RUNS_TRITON.search(path.read_text())]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_triton_passes_its_tests_in_the_interpreter(path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", "-p", "no:cacheprovider", "-p", "no:xdist", path]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) > 0, run.stdout[-2000:]
