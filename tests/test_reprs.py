"""Test how tables, plans, lookups, levels and schedules print, and that they move between devices."""

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.omega.table import TableModule
from lgd_kernels.sampling import solvers

LARGE = lgd.RectifiedFlow().levels(torch.rand(5000) / 2 + 0.5, torch.rand(5000) / 2)
ENDS = [torch.linspace(0, 1, 64)] * 2
TABLE = lgd.OmegaTable(torch.rand(10, 64, 64), *ENDS)
LOOKUP = TABLE.at(torch.arange(10), torch.zeros(10), torch.ones(10))
PLAN = solvers.unipc(lgd.RectifiedFlow(), torch.linspace(0.9, 0, 51))
EVERY_SAMPLE = solvers.edm_heun(torch.linspace(80, 0, 51)[:, None].expand(51, 7), s_churn=1.0)
REPRS = {
    "table": (TABLE, "OmegaTable(values [10, 64, 64] float32 on cpu, s_knots 0 to 1, t_knots 0 to 1)"),
    "table elsewhere": (
        TABLE.to("meta"),
        "OmegaTable(values [10, 64, 64] float32 on meta, s_knots [64], t_knots [64])",
    ),
    "lookup": (
        LOOKUP,
        "OmegaLookup(c=[0, 1, 2, 3, ...], s=[0, 0, 0, 0, ...], t=[1, 1, 1, 1, ...], "
        "values [10, 64, 64] float32 on cpu)",
    ),
    "plan": (PLAN, "StepPlan(50 calls, times 0.9 to 0.018, table [50, 2, 5] float32 on cpu)"),
    "plan of samples": (EVERY_SAMPLE, "StepPlan(99 calls, times [99, 7], table [99, 7, 2, 4] float32 on cpu)"),
    "plan elsewhere": (PLAN.to("meta"), "StepPlan(50 calls, times [50], table [50, 2, 5] float32 on meta)"),
    "levels": (
        lgd.RectifiedFlow().levels(torch.tensor([0.75]), torch.tensor([0.25])),
        "Levels(signal_t=[0.25], noise_t=[0.75], signal_s=[0.75], noise_s=[0.25], gap=[0.5])",
    ),
    "discrete": (lgd.Discrete(torch.linspace(0.9, 0.1, 99)), "Discrete(99 steps, alphas_cumprod 0.9 to 0.1, float32)"),
    "expected": (lgd.Expected(torch.zeros(9, 3)), "Expected(x0 [9, 3] float32 on cpu)"),
    "renoise": (
        lgd.Renoise(torch.zeros(9, 3), particles=4, seed=torch.arange(9)),
        "Renoise(x0 [9, 3] float32 on cpu, particles=4, seed=[0, 1, 2, 3, ...])",
    ),
    "edm": (lgd.EDM(), "EDM(sigma_min=0.002, sigma_max=80.0, rho=7.0)"),
}


@pytest.mark.parametrize("case", REPRS)
def test_a_repr_is_one_line(case):
    value, expected = REPRS[case]
    assert repr(value) == str(value) == expected


def test_a_repr_of_many_samples_is_one_line():
    for value in (LARGE, LARGE.to("meta"), LOOKUP.to("meta")):
        assert len(repr(value)) < 300 and "\n" not in repr(value)


def test_a_repr_in_a_transform():
    seen = []
    schedule = lgd.RectifiedFlow()
    torch.vmap(lambda t: seen.append(repr(schedule.levels(t, t / 2))) or t)(torch.rand(2, 3))
    assert seen[0].startswith("Levels(signal_t=a tensor of shape [3], ")


def test_tables_levels_and_lookups_move():
    """Check that all tensors move, and that a table keeps its attributes."""
    table = lgd.OmegaTable(
        torch.rand(1, 2, 2, requires_grad=True), *[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 2
    )
    table.note = "kept"
    half = table.to(torch.float16)
    assert (half.values.dtype, half.s_knots.dtype, half.note) == (torch.float16, torch.float64, "kept")
    half.values.sum().backward()
    assert table.values.grad.tolist() == [[[1, 1], [1, 1]]]
    with pytest.raises(TypeError, match="OmegaTable.to: the dtype is torch.int64, expected float32"):
        table.to(torch.int64)
    levels = LARGE.to("cpu", torch.float64)
    assert type(levels) is lgd.Levels and all(level.dtype == torch.float64 for level in levels)
    for moved in (table.to("meta").at(None, *torch.zeros(2, 3, device="meta")), LOOKUP.to("meta"), LARGE.to("meta")):
        assert all(tensor.device.type == "meta" for tensor in moved)
    assert all(tensor.device.type == "meta" for tensor in (PLAN.to("meta").ends, table.to("meta").t_knots))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_table_module_in_another_dtype_keeps_its_knots(dtype):
    """Check the dtype of knots, which would round to equal values in half precision."""
    module = TableModule(TABLE).to(dtype)
    assert module.values.dtype == dtype and torch.equal(module.s_knots.float(), TABLE.s_knots)
    found = module(torch.arange(10), torch.full((10,), 0.25), torch.full((10,), 0.75))
    assert torch.equal(found, TABLE.to(dtype)(torch.arange(10), torch.full((10,), 0.25), torch.full((10,), 0.75)))
    assert module.table().t_knots.dtype in (torch.float32, torch.float64)
    assert module.to("meta").s_knots.device.type == "meta"
