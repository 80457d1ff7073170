"""What the programs of a Triton kernel do together: grids that CUDA takes, and one owner for each element written."""

import sys
from unittest import mock

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.guided_energy.structs import EnergyCall, EnergyOptions, GuidedEnergy
from lgd_kernels.runtime import impls

pytest.importorskip("triton")
MOST = 2**31 - 1, 2**16 - 1, 2**16 - 1  # programs along x, y and z

CALLS = {
    "guided_score": lambda x, c, u, omega, levels: lgd.guided_score(c, u, omega, impl="triton"),
    "guided_step": lambda x, c, u, omega, levels: lgd.guided_step(
        x, c, u, omega, levels, churn=1.0, seed=3, impl="triton"
    ),
    "combine": lambda x, c, u, omega, levels: lgd.combine((x, c, u), omega[:, None] * torch.ones(3), impl="triton"),
    "moments": lambda x, c, u, omega, levels: lgd.moments((c, u), columns=(0, (0, 1)), impl="triton").dots,
    "dynamic_threshold": lambda x, c, u, omega, levels: lgd.dynamic_threshold(c, impl="triton"),
    "energy_mmd": lambda x, c, u, omega, levels: lgd.energy_mmd(c, u, impl="triton"),
    "energy_mmd, wide": lambda x, c, u, omega, levels: lgd.energy_mmd(
        c.repeat(1, 3), u.repeat(1, 3), precision="product", impl="triton"
    ),
    "guided_energy": lambda x, c, u, omega, levels: lgd.guided_energy(
        *(one.unflatten(1, (6, -1)) for one in (x, c, u)), omega, levels, x.unflatten(1, (6, -1)).detach() + 1,
        impl="triton",
    ),
}  # fmt: skip


@pytest.mark.triton
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("row", [24, 2052])
def test_each_element_is_written_by_one_program(call, row, generator, monkeypatch):
    """No two programs of a launch write the same address, so the order of programs cannot change a result."""
    from triton.runtime import interpreter

    builder, launched = interpreter.interpreter_builder, []
    store = interpreter.InterpreterBuilder.create_masked_store

    def recorded(self, pointers, value, mask, cache_policy):
        owners, program = launched[-1], self.grid_idx
        for address in pointers.data[mask.data].flatten().tolist():
            assert owners.setdefault(address, program) == program, f"programs {owners[address]} and {program}"
        return store(self, pointers, value, mask, cache_policy)

    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        launched.append({})
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(builder), "create_masked_store", recorded)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    x, c, u = (testing.sample((5, row), torch.float32, generator).requires_grad_() for _ in range(3))
    omega = torch.rand(5, generator=generator, requires_grad=True)
    output = CALLS[call](x, c, u, omega, testing.step_levels(5))
    leaves = [one for one in (x, c, u, omega) if output.requires_grad]
    if leaves:
        torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
    assert launched and all(launched)


@pytest.mark.triton
@pytest.mark.parametrize(("m", "k"), [(16, 16), (9, 14), (20, 6)])
def test_more_meetings_than_a_grid_has_along_y(m, k, generator, monkeypatch):
    """Programs go on along z; the last of them have nothing to do."""
    import triton.language as tl

    from lgd_kernels.ops.guided_energy import triton

    x, c, u, y = (testing.sample((2, count, 64), torch.float32, generator) for count in (m, m, m, k))
    arguments = x, c, u, torch.tensor([0.5, 1.0]), testing.step_levels(2), y
    expected = lgd.guided_energy(*arguments, impl="triton")
    monkeypatch.setattr(triton, "COLUMN", tl.constexpr(5))
    assert torch.equal(lgd.guided_energy(*arguments, impl="triton"), expected)


class Grids(list):
    """Stands for `launch`, and keeps the grids."""

    def __call__(self, kernel, grid, *args, **kwargs):
        self.append(grid)


@pytest.fixture
def grids():
    """Record launches instead of making them. Tensors have a shape and no memory (device "meta")."""
    found = Grids()
    modules = [f"lgd_kernels.ops.{op}.triton" for op in impls.ops()]
    for name in modules:
        __import__(name)
    launching = [one for name, one in sys.modules.items() if name.startswith("lgd_kernels.ops.") and ".triton" in name]
    with torch.device("meta"):
        patches = [mock.patch.object(one, "launch", found) for one in launching if hasattr(one, "launch")]
        for patch in patches:
            patch.start()
        yield found
        for patch in patches:
            patch.stop()


def assert_launchable(grids):
    assert grids
    for grid in grids:
        assert all(0 < count <= most for count, most in zip(grid, MOST, strict=False)), grid


@pytest.mark.skipif(impls.triton_interpreted(), reason="nothing is interpreted")
def test_grids_of_many_particles(grids):
    from lgd_kernels.ops.guided_energy import triton

    m = 2000  # 250,000 groups of pairs
    x, levels = torch.empty(1, m, 64), lgd.Levels(*(torch.empty(1) for _ in range(5)))
    call = EnergyCall(GuidedEnergy.of(x, x, x, 1.0, levels, x), EnergyOptions(1.75, 1.0, True))
    outputs = torch.empty(1), torch.empty(1), torch.empty(1, 2 * m * m + m + 3 * m * (m - 1) // 2, dtype=torch.float64)
    triton.forward(outputs, call)
    assert_launchable(grids)


@pytest.mark.skipif(impls.triton_interpreted(), reason="nothing is interpreted")
@pytest.mark.parametrize("shape", [(2**20, 2), (3, 2**30), (2**16, 2**14)])
def test_grids_of_large_data(grids, shape):
    from lgd_kernels.ops.guided_score import triton
    from lgd_kernels.ops.guided_score.structs import GuidedScore
    from lgd_kernels.runtime.arguments import Omega

    x = torch.empty(shape)
    triton.forward(x, GuidedScore(x, x, Omega(None, 1.0, [])))
    assert_launchable(grids)
