"""Run the tests of the Triton kernels in Triton's interpreter, in a few processes, on any machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNS_TRITON = re.compile(r"^def test_\w+\([^)]*\btarget\b|^@pytest\.mark\.triton", re.MULTILINE)
FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if RUNS_TRITON.search(path.read_text())]
PROCESSES = 8  # of several files each: starting one takes seconds


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.parametrize(
    "files", [FILES[first::PROCESSES] for first in range(PROCESSES)], ids=lambda files: files[0].stem
)
def test_triton_passes_its_tests_in_the_interpreter(files):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "triton", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    ran = set(re.findall(r"(test_\w+\.py)::\S.* PASSED", run.stdout))
    assert ran == {path.name for path in files}, run.stdout[-2000:]
