"""Compare UniPC with diffusers', also at the ends of a run."""

import pytest
import torch
from conftest import dtypes_of
from test_solvers import discrete, each_prediction, made, run

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.sampling import solvers


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


@each_prediction
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(target, prediction, variant):
    """Compare whole runs; diffusers' bh1 is NaN in a step to sigma = 0, ours is not."""
    end = {"bh1": "sigma_min", "bh2": "zero"}[variant]
    scheduler = made("UniPCMultistepScheduler", prediction, solver_type=variant, final_sigmas_type=end)
    schedule, times, levels = discrete(scheduler)
    to = torch.cat((times[:-1], torch.tensor([0]))) if end == "sigma_min" else times
    last = torch.arange(20) == 19  # lower_order_final
    plan = solvers.unipc(schedule, to, prediction=prediction, variant=variant, first_order=last)
    run(plan, levels, scheduler, prediction, target, noisy=False)
    if "float64" in str(dtypes_of(target)):
        scheduler.set_timesteps(20)
        signal, noise = schedule.signal_noise(to)
        scheduler.sigmas = noise / signal  # diffusers' are rounded to float32
        run(plan, levels, scheduler, prediction, target, noisy=False, dtype=torch.float64)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_from_pure_noise_to_the_data(variant, generator):
    """Check the first and the last step, where h is infinite: they are of first order, and bh1 does not correct the
    first."""
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    plan = solvers.unipc(lgd.RectifiedFlow(), times, variant=variant)
    assert plan.table.isfinite().all() and plan.deep and plan.remembers
    assert plan.table[0, 0].tolist() == solvers.one_step(lgd.RectifiedFlow(), times).table[0, 0].tolist() + [0.0]
    assert (plan.table[1, 0, 2] == 0) == (variant == "bh1") and plan.table[1, 0, 4] == 0
    x, kept = testing.sample((3, 5), torch.float64, generator), None
    for i in range(5):
        x, kept = plan.step(i, x, torch.full_like(x, 2.0), kept=kept)
        assert len(kept) == min(i + 1, 2)
    torch.testing.assert_close(x, torch.full_like(x, 2.0), rtol=1e-14, atol=0)
