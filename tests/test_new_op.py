"""Add the op of new_op/ to a copy of the tree: nine files and two lines (docs/design.md). Build it, run its tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extension
ROOT = Path(__file__).parents[1]
NEW = ROOT / "tests" / "new_op"
FILES = {str(path.relative_to(NEW)) for path in NEW.rglob("*.*") if path.is_file() and path.suffix != ".pyc"}
LINES = [  # of lgd_kernels/__init__.py, each before another
    ("from lgd_kernels.runtime.first_use", "from lgd_kernels.ops.scaled.api import scaled\n"),
    ('    "why_not",', '    "scaled",\n'),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of the tree with the new op, built. Of C++ it holds what ops share, and the new op alone."""
    copy = tmp_path_factory.mktemp("tree")
    kept = ["lgd_kernels", "csrc/common", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"]
    for name in [*kept, "python/bindings.cpp", *(f"python/{path.name}" for path in ROOT.glob("python/*.h"))]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.log"))
        else:
            shutil.copy(ROOT / name, copy / name)
    for name in ("guided_energy", "guided_score", "guided_step"):  # their headers, which those of python/ include
        shutil.copytree(ROOT / "csrc" / name, copy / "csrc" / name, ignore=shutil.ignore_patterns("*.cpp", "*.cu"))
    for name in FILES:
        assert not (copy / name).exists()
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(NEW / name, copy / name)
    package = copy / "lgd_kernels/__init__.py"
    for before, line in LINES:
        text = package.read_text()
        assert text.count(before) == 1
        package.write_text(text.replace(before, line + before))
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], copy, NVCC="none", LGD_REQUIRE_EXT="1")
    return copy


def run(command, folder, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


def test_it_takes_nine_files_and_two_lines():
    """docs/design.md lists the files."""
    table = (ROOT / "docs/design.md").read_text().split("| file | what it holds |")[1].split("\n\n")[0]
    named = re.findall(r"`([\w./<>]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    listed = {name if "/" in name else f"csrc/<op>/{name}" for name in named}
    assert {name.replace("<op>", "scaled") for name in listed} == FILES
    assert len(FILES) == 9 and len(LINES) == 2


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_it_passes_its_tests(tree, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    interpret = {"TRITON_INTERPRET": "1"} if impl == "triton" else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_scaled.py"]
    assert "8 passed" in run(command, tree, **interpret)
