"""Test calls that end early, by Ctrl-C or without memory, in separate processes, which they may end."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.extension

HEAD = """
import os, resource, signal, sys, threading, time
import torch
import lgd_kernels as lgd

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
"""


def run(script, *arguments):
    """Return what a process that runs the script prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HEAD + textwrap.dedent(script), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert found.returncode == 0, f"exit status {found.returncode}: {found.stderr[-2000:]}"
    return found.stdout.split()


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_call(threads):
    """Uninterrupted, each call takes three seconds or more; afterwards the same function works as before."""
    script = """
        x, y = torch.randn(2, 100_000, 2)
        batch = torch.randn(2, 2, 70_000, 2)
        few = torch.randn(2, 64, 1_500_000)
        particles, targets = torch.randn(3, 1, 150, 120_000), torch.randn(1, 150, 120_000)
        levels = lgd.RectifiedFlow().levels(torch.tensor([0.8]), torch.tensor([0.5]))
        omega = torch.tensor([1.5], requires_grad=True)
        beginning = lambda: float(lgd.energy_mmd(x[:500], y[:500], beta=1.5))
        want = beginning()
        for call in (
            lambda: lgd.energy_mmd(x.requires_grad_(), y, beta=1.5),
            lambda: lgd.energy_mmd(*batch, beta=1.5, batched=True),
            lambda: [lgd.energy_mmd(few[0].requires_grad_(), few[1], precision="direct") for _ in range(3)],
            lambda: [lgd.guided_energy(*particles, omega, levels, targets) for _ in range(5)],
        ):
            sent = []
            def interrupt():
                time.sleep(0.5)
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=interrupt).start()
            try:
                call()
                print("ended", end=" ")
                time.sleep(1)
            except KeyboardInterrupt:
                print(time.monotonic() - sent[0], end=" ")
            assert beginning() == want
    """
    waits = [float(one) for one in run(script, threads)]
    assert len(waits) == 4 and max(waits) < 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process as Linux has them")
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_is_missing_is_an_error(threads):
    """The same holds in threads of a parallel region, where an uncaught exception would end the process."""
    script = """
        x, y = torch.randn(2, 2, 1_000_000, 4), torch.randn(2, 2, 3, 4)
        want = lgd.energy_mmd(x[0, :, :1000], y[0], batched=True)  # and the threads are there
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 2**23
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            lgd.energy_mmd(x[0], y[0], batched=True, lam=0.0)
        except MemoryError:
            print("MemoryError")
        assert torch.equal(lgd.energy_mmd(x[0, :, :1000], y[0], batched=True), want)
    """
    assert run(script, threads) == ["MemoryError"]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB")
def test_memory_follows_the_data_of_a_few_long_samples():
    """Two sets of two samples of 4 million elements: 61 MiB, and gradients of as much. In tiles of 64 it was 6 GB."""
    script = """
        x, y = torch.randn(2, 2, 4_000_000)
        used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lgd.energy_mmd(x[:, :20_000], y[:, :20_000])
        before = used()
        loss = lgd.energy_mmd(x.requires_grad_(), y.requires_grad_())
        print(used() - before)
    """
    assert float(run(script, 1)[0]) < 150


def test_a_term_without_weight_is_not_waited_for():
    """An infinite coefficient returns too: nothing checks the arguments of the binding."""
    script = """
        from lgd_kernels.ops.energy_mmd.structs import EnergyMmd, MmdKernel
        from lgd_kernels.runtime import impls
        x, y = torch.randn(1, 70, 2).double(), torch.randn(1, 150, 2).double()
        loss, d_x, d_y = torch.zeros(1).double(), torch.empty_like(x), torch.empty_like(y)
        for factor in (1e200, 1e-200, float("inf"), float("nan"), 0.0):
            p, q = (torch.full(one.shape[:2], factor, dtype=torch.float64) for one in (x, y))
            for lam in (0.0, 1.0):
                call = EnergyMmd(x, y, p, q, MmdKernel("energy", [1.0]), lam, True, True, True, None, [True, True])
                impls.extension().energy_mmd((loss, d_x, d_y), call, 2)
                print("returned")
    """
    assert run(script, 2) == 10 * ["returned"]
