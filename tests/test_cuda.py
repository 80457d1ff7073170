"""Run the CUDA kernels on the CPU (simulated.py), in two orders of their threads, and check the simulator."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated
import torch
from conftest import SIMULATED, WITH_CUDA

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime import impls

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(bool(simulated.missing()), reason=simulated.missing())
outside = pytest.mark.skipif(bool(SIMULATED), reason="this is the simulator's process")


def pass_their_tests(order, **environment):
    """Assert that the kernels of a process of its own pass the tests of their ops."""
    files = [TESTS / f"{name}.py" for name in [*WITH_CUDA, "test_cuda"]]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "simulated", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "SIMULATED_CUDA": order, **environment}
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    ran = set(re.findall(r"(test_\w+\.py)::\S.* PASSED", run.stdout))
    assert ran == {path.name for path in files}, run.stdout[-2000:]


@outside
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_kernels_pass_their_tests(order):
    pass_their_tests(order)


@outside
def test_every_op_with_cuda_is_tested_so():
    with_cuda = {op for op in impls.ops() if "cuda" in impls._implementations(op)}
    assert with_cuda == {"guided_energy", "guided_score", "guided_step"}
    assert {f"test_{op}" for op in with_cuda} <= set(WITH_CUDA)


def results():
    """Return loss, gradients and samples of every kernel: rows that fill vectors and those that do not."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype, row in ((torch.float32, 24), (torch.float32, 19), (torch.bfloat16, 2056)):
        x, c, u = (testing.sample((3, row), dtype, generator).requires_grad_() for _ in range(3))
        omega = torch.rand(3, generator=generator, requires_grad=True)
        drawn = dict(churn=0.5, seed=1, impl="cuda")
        outputs = [
            lgd.guided_score(c, u, omega, impl="cuda"),
            lgd.guided_step(x, c, u, omega, testing.step_levels(3), **drawn),
        ]
        for m, k in ((1, 1), (2, 2), (4, 1), (4, 4), (5, 6)):
            particles = [testing.sample((3, m, row), dtype, generator).requires_grad_() for _ in range(3)]
            y = testing.sample((3, k, row), dtype, generator)
            lam = 0.0 if m == 1 else 1.0
            outputs.append(lgd.guided_energy(*particles, omega, testing.step_levels(3), y, lam=lam, **drawn))
            found += torch.autograd.grad(outputs[-1].sum(), particles, retain_graph=True)
        found += outputs
        found += torch.autograd.grad(sum(one.float().square().sum() for one in outputs), (x, c, u, omega))
    return [one.detach() for one in found]


@pytest.mark.simulated
def test_bits_do_not_depend_on_the_order_of_threads():
    library = impls.cuda_extension().__file__
    expected = results()
    try:
        for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
            simulated.use_order(library, order, seed)
            assert all(map(torch.equal, results(), expected)), order
    finally:
        simulated.use_order(library, SIMULATED)


@pytest.fixture(scope="module")
def misuse():
    """Return a function that launches a kernel of misuse.cpp: it returns (error, output)."""
    units = simulated.units(simulated.CUDA / name for name in ("misuse.cpp", "simulator.cpp"))
    path = simulated.library("misuse.so", units, list((simulated.ROOT / "csrc/common").glob("*.cuh")))
    function = ctypes.CDLL(str(path)).misuse
    function.restype = ctypes.c_char_p

    def launch(which, order="forward"):
        simulated.use_order(str(path), order)
        out = torch.zeros(3 * 64, dtype=torch.int32)
        error = function(which, ctypes.c_void_p(out.data_ptr()))
        return error and error.decode(), out

    return launch


@outside
@pytest.mark.parametrize("order", simulated.ORDERS)
def test_a_kernel_by_hand(misuse, order):
    error, out = misuse(0, order)
    assert error is None
    assert torch.equal(out.view(3, 64), (torch.arange(3)[:, None] + (torch.arange(64) ^ 1)).int())


@outside
def test_shared_memory_is_not_zero(misuse):
    """Without a barrier, the threads that run before the one that writes read 0xFFFFFFFF."""
    assert misuse(1, "forward")[1][:32].tolist() == 32 * [1]
    assert misuse(1, "reverse")[1][:32].tolist() == [1] + 31 * [-1]


@outside
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (2, r"different_barriers: threads of a block wait at different barriers: \S+misuse.cpp:\d+ and \S+:\d+"),
        (3, r"ended_lane: deadlock in block 0: a thread waits at \S+misuse.cpp:\d+ for threads that do not come"),
        (4, r"different_shuffles: lanes of a warp shuffle at different places: \S+:\d+ and \S+:\d+"),
        (5, r"part_of_a_warp: a shuffle of part of a warp: \S+misuse.cpp:\d+"),
        (6, r"much_shared_memory: more than 48 KiB of shared memory"),
        (7, r"right: invalid configuration: 2147483648 blocks of 64 threads"),
        (8, r"right: invalid configuration: 1 blocks of 1025 threads"),
    ],
)
def test_mistakes_are_errors(misuse, which, message):
    assert re.fullmatch(message, misuse(which)[0])
    assert misuse(0)[0] is None  # the next launch is well
