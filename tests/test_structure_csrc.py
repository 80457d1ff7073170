"""Check the rules of docs/design.md for csrc/ and python/ against the tree."""

import re
from pathlib import Path

import pytest
from test_structure import BINDING_FILES, KERNEL_FILES, OPS, ROOT, code_of, included


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_csrc_knows_neither_python_nor_torch(path):
    """A file compiles in half a second, and one build serves every torch."""
    for name in included(path):
        assert not re.search(r"torch|ATen|c10|pybind11|Python\.h", name), name
        if "/" in name or name.endswith((".h", ".cuh")):
            assert (path.parent / name).resolve().is_relative_to(ROOT / "csrc"), f"{name} lies outside csrc/"


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_csrc_ops_include_no_other(path):
    others = set(OPS) - {path.parent.name}
    assert [name for name in included(path) if others & set(Path(name).parts)] == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_csrc_allocates_nothing(path):
    """torch allocates all memory, so kernels have no errors to report."""
    words = r"\bnew\b|\b(m|c|re)alloc\b|\balloca\b|\bstd::(vector|string|map|function|(make_)?(unique|shared)(_ptr)?)\b"
    assert [match.group() for match in re.finditer(words, code_of(path))] == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_csrc_starts_no_threads(path):
    """python/ starts threads, and cuts the work so that their number changes no bit. `omp simd` is allowed."""
    pragmas = re.findall(r"#pragma\s+omp\s+([^\n]*)", code_of(path))
    assert [pragma for pragma in pragmas if not re.match(r"(declare )?simd\b", pragma)] == []
    assert not {"omp.h", "thread", "mutex", "atomic", "future"} & set(included(path))


def test_threads_are_started_in_one_place():
    """parallel.h keeps exceptions inside a parallel region and polls for Ctrl-C."""
    starts = [
        path.name
        for path in BINDING_FILES
        if re.search(r"#pragma\s+omp\s+parallel|std::(thread|async)\b", code_of(path))
    ]
    assert starts == ["parallel.h"]


def test_every_source_is_built():
    """setup.py takes csrc/*/*_cpu.cpp and python/*.cpp, csrc/*/*_cuda.cu and python/cuda/*.cpp; a source of any other
    name would be left out without a word."""
    sources = [path for path in KERNEL_FILES if path.suffix in (".cpp", ".cu")]
    assert [path.name for path in sources if not path.name.endswith(("_cpu.cpp", "_cuda.cu"))] == []
    assert all(path.parent.parent == ROOT / "csrc" for path in sources)
    assert {path.parent for path in BINDING_FILES} == {ROOT / "python", ROOT / "python" / "cuda"}
