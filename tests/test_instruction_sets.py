"""Test older processors: AVX2 gives the bits of AVX-512; the baseline gives the same noise, and the rest within the
budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgd_kernels.runtime import impls

TESTS = Path(__file__).parent
pytestmark = pytest.mark.extension
# With slopes, in float32, this one begins its roots with an instruction that AVX-512 alone has (roots_cpu.cpp).
ROOTS = "energy_mmd", "Energy(beta=1.0)", ("float32", "bfloat16", "float16")


def begins_roots(name: str) -> bool:
    return name.startswith(ROOTS[0]) and ROOTS[1] in name and name.endswith(ROOTS[2])


def need(instruction_set: str) -> None:
    """Skip if this build or this processor has no other instruction set."""
    here = impls.extension().instruction_set().split()[0]
    order = ["x86-64", "x86-64-v3", "x86-64-v4"]
    if here not in order:
        pytest.skip(f"the extension is compiled for one instruction set: {here}")
    if order.index(here) < order.index(instruction_set):
        pytest.skip(f"this processor has {here}, not {instruction_set}")


def environment(instruction_set: str) -> dict:
    return os.environ | {
        "LGD_INSTRUCTION_SET": instruction_set,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS.parent),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return (digests, tensors) of every op by instruction set, each from a process of its own."""
    found = {}

    def of(instruction_set: str):
        need(instruction_set)
        if instruction_set not in found:
            file = tmp_path_factory.mktemp("results") / "tensors.pt"
            command = [sys.executable, TESTS / "instruction_sets.py", file]
            ended = subprocess.run(command, capture_output=True, text=True, env=environment(instruction_set))
            assert ended.returncode == 0, ended.stderr
            digests = json.loads(ended.stdout)
            assert digests.pop("instruction set").split()[0] == instruction_set
            found[instruction_set] = digests, torch.load(file)
        return found[instruction_set]

    return of


def test_avx2_has_the_bits_of_avx512(results):
    ours, theirs = results("x86-64-v4")[0], results("x86-64-v3")[0]
    assert len(ours) > 200 and ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and not begins_roots(name)] == []


@pytest.mark.parametrize("older", ["x86-64-v3", "x86-64"])
def test_older_sets_differ_by_rounding(older, results):
    """Results differ only by whether a product is rounded before it is added: single elements by one rounding of the
    storage, sums of a gradient by a few of float32."""
    need("x86-64-v3")
    newest = results("x86-64-v4" if "v4" in impls.extension().instruction_set() else "x86-64-v3")[1]
    for name, tensors in results(older)[1].items():
        if name == "instruction set":
            continue
        for found, expected in zip(tensors, newest[name], strict=True):
            scale, eps = max(1.0, expected.double().abs().max().item()), torch.finfo(expected.dtype).eps
            limit = scale * (2 * eps + (1e-13 if "float64" in name and "Renoise" not in name else 1e-5))
            assert (found.double() - expected.double()).abs().max().item() <= limit, name


def test_every_set_draws_the_same_noise(results):
    digests = [results(one)[0] for one in ("x86-64", "x86-64-v3")]
    noise = [name for name in digests[0] if name.startswith("noise")]
    assert len(noise) == 3 and all(digests[0][name] == digests[1][name] for name in noise)


OPS = (*impls.ops(), "philox", "omega_table", "rules")


@pytest.mark.slow
@pytest.mark.parametrize("older", ["x86-64-v3", "x86-64"])
@pytest.mark.parametrize("op", OPS)
def test_older_sets_pass_the_tests_of_every_op(op, older):
    """The baseline stays within the error budget."""
    need(older)
    command = [sys.executable, "-m", "pytest", "-q", "-x", TESTS / f"test_{op}.py"]
    ended = subprocess.run(command, cwd=TESTS.parent, env=environment(older), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:]
