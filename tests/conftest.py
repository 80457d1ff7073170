"""Choose where tests run. A `target` is an implementation on a device: Triton runs in its interpreter or on a GPU, CUDA
in a simulator or on a GPU."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from lgd_kernels import testing
from lgd_kernels.runtime import impls

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIMULATED = os.environ.get("SIMULATED_CUDA")  # the order of threads, or unset
TRANSLATED = os.environ.get("SIMULATED_PTX") == "1"  # as nvcc compiles the kernels
if SIMULATED:
    import ptx
    import simulated

    kernels = ptx.extension() if TRANSLATED else os.environ.get("SIMULATED_CUDA_MODULE")
    simulated.use_order(simulated.install(kernels).__file__, SIMULATED)


class Target(NamedTuple):
    impl: str
    device: str


collect_ignore = ["new_op"]  # its tests run in a copy of the tree, in test_new_op.py
TARGETS = [
    pytest.param(Target("cpu", "cpu"), id="cpu"),
    pytest.param(Target("triton", "cpu"), id="triton-interpreted", marks=pytest.mark.triton),
    pytest.param(Target("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param(Target("cuda", "cpu"), id="cuda-simulated", marks=pytest.mark.simulated),
    pytest.param(Target("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
]
# The files that test ops with CUDA kernels.
WITH_CUDA = [
    f"test_{name}"
    for name in ("guided_energy", "guided_energy_autograd", "guided_energy_safety", "guided_score", "guided_step",
                 "guided_step_autograd", "large", "omega_table")
]  # fmt: skip


def dtypes_of(target: Target) -> list[torch.dtype]:
    """Return the storage types that a target takes."""
    return [dtype for dtype in testing.DTYPES if target.impl == "cpu" or dtype != torch.float64]


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        with_cuda = metafunc.module.__name__ in WITH_CUDA
        targets = [target for target in TARGETS if with_cuda or target.values[0].impl != "cuda"]
        metafunc.parametrize("target", targets)


def pytest_collection_modifyitems(config, items):
    """Deselect slow tests, and those that test_interpreter.py and test_cuda.py run in other processes; mark skips."""
    runs = {"triton": INTERPRETED, "simulated": SIMULATED, "slow": "slow" in config.option.markexpr}  # -m slow
    left_out = [item for item in items if any(item.get_closest_marker(name) and not runs[name] for name in runs)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    unbuilt = impls.extension_error() if os.environ.get("LGD_REQUIRE_EXT") != "1" else ""
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params.values()
        runs_cpu = any(value == "cpu" or getattr(value, "impl", None) == "cpu" for value in parameters or ())
        if unbuilt and (runs_cpu or item.get_closest_marker("extension")):
            item.add_marker(pytest.mark.skip(reason=unbuilt))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20251001)


@pytest.fixture
def poisoned():
    """Fill fresh memory with NaN and yield what was filled, by address.

    A test asserts that its results are among them (`address`), so that it fails if an op allocates by a function that
    is not poisoned.
    """
    with testing.poisoned() as filled:
        yield filled
    assert filled, "the test uses `poisoned`, but nothing that it ran allocated memory by a poisoned function"


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


@pytest.fixture(autouse=True)
def same_threads_after():
    """Restore the number of threads after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def assert_ended(run) -> None:
    """Assert that a run of torchrun ended well. gloo's threads now and then abort a process that is done and about to
    exit; the caller checks what the process wrote."""
    assert run.returncode == 0 or "terminate called without an active exception" in run.stderr, run.stderr
