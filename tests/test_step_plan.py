"""Test a step of a plan: its index, its storage, its gradients, its fast path, its errors."""

import functools
import itertools

import pytest
import torch
from conftest import dtypes_of

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules
from lgd_kernels.runtime.levels import Levels
from lgd_kernels.sampling import solvers

BATCH, OMEGA = 3, torch.tensor([0.5, 1.5, 3.0])


def plan_of(stochastic=False):
    times = torch.linspace(0.95, 0, 11, dtype=torch.float64)
    return solvers.dpm_solver_2m(lgd.RectifiedFlow(), times, stochastic=stochastic)


def ten_steps(omega, generator, impl=None, rule=None):
    """Return a stochastic run of second order; the kernel draws z."""
    x, condition = torch.randn(2, BATCH, 30, generator=generator, dtype=torch.float64).unbind(0)
    kept = None
    for i in range(10):
        cond, uncond = torch.tanh(x + condition), torch.tanh(x)
        x, kept = plan_of(True).step(i, x, cond, uncond, omega, kept, seed=i, rule=rule, impl=impl)
    return x


@pytest.mark.parametrize("rule", [None, functools.partial(rules.rescale, phi=0.6)], ids=["cfg", "rescale"])
def test_gradient_of_omega_through_ten_steps(rule):
    grads = []
    for impl in ("cpu", "reference"):
        omega = OMEGA.double().requires_grad_()
        end = ten_steps(omega, torch.Generator().manual_seed(4), impl, rule)
        grads.append(torch.autograd.grad(end.square().sum(), omega)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)  # implementations draw noise that differs by 1e-6
    shifted = [
        ten_steps(OMEGA.double() + s * 1e-4, torch.Generator().manual_seed(4), "cpu", rule).square().flatten(1).sum(1)
        for s in (1, -1)
    ]
    torch.testing.assert_close(grads[0], (shifted[0] - shifted[1]) / 2e-4, rtol=1e-4, atol=1e-4)


def test_the_index_may_be_a_tensor(target, generator):
    x, c, u, kept = testing.sample((4, BATCH, 50), torch.float32, generator).to(target.device).unbind(0)
    plan, omega = plan_of().to(target.device), OMEGA.to(target.device)
    for i in (1, 4):
        at = torch.tensor(i, device=target.device)
        found = plan.step(at, x, c, u, omega, kept, impl=target.impl)
        for f, e in zip(found, plan.step(i, x, c, u, omega, kept, impl=target.impl), strict=True):
            assert torch.equal(f, e)


def test_the_index_of_a_deep_plan(target, generator):
    """Check an index 0-dim or `[B]`; the older part of the history is passed on without a write."""
    x, c, u, *kept = testing.sample((5, BATCH, 50), torch.float32, generator).to(target.device).unbind(0)
    plan = solvers.unipc(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11)).to(target.device)
    omega, kept = OMEGA.to(target.device), tuple(kept)
    found, after = plan.step(torch.tensor([4, 1, 9], device=target.device), x, c, u, omega, kept, impl=target.impl)
    assert after[1] is kept[0]
    for b, i in enumerate((4, 1, 9)):
        for at in (i, torch.tensor(i, device=target.device)):
            alone, newest = plan.step(at, x, c, u, omega, kept, impl=target.impl)
            assert torch.equal(alone[b], found[b]) and torch.equal(newest[0][b], after[0][b])


def test_half_storage(target, generator):
    for dtype in dtypes_of(target):
        x, c, u, kept = testing.sample((4, BATCH, 50), dtype, generator).to(target.device).unbind(0)
        found, _ = plan_of().to(target.device).step(3, x, c, u, OMEGA.to(target.device), kept, impl=target.impl)
        wide = [one.double().cpu() for one in (x, c, u)]
        truth, _ = plan_of().step(3, *wide, OMEGA.double(), kept.double().cpu())
        testing.assert_elementwise(found, truth.to(dtype), truth, slack=1e-6)


def test_levels_are_those_of_the_step(generator):
    """Compare one_step with guided_step on the same levels, for each step, with and without a rule."""
    times = torch.tensor([1.0, 0.6, 0.1, 0.0], dtype=torch.float64)
    x, c, u = testing.sample((3, BATCH, 50), torch.float64, generator).unbind(0)
    plan = solvers.one_step(lgd.RectifiedFlow(), times, prediction="flow", churn=0.5)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        levels = lgd.RectifiedFlow().levels(t.expand(BATCH), s.expand(BATCH))
        assert isinstance(levels, Levels)
        for rule in (None, rules.apg):
            expected = lgd.guided_step(x, c, u, OMEGA.double(), levels, prediction="flow", churn=0.5, seed=i, rule=rule)
            found, kept = plan.step(i, x, c, u, OMEGA.double(), seed=i, rule=rule)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            assert kept is None


def test_refuses(generator):
    x = testing.sample((BATCH, 5), torch.float32, generator)
    with pytest.raises(ValueError, match="`kept` is None in step 1, expected what the step before returned"):
        plan_of().step(1, x, x)
    deep = solvers.unipc(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11))
    with pytest.raises(ValueError, match="`kept` is what one step returned in step 2"):
        deep.step(2, x, x, kept=x)
    with pytest.raises(ValueError, match="`variant` is 'bh3', expected bh1 or bh2"):
        solvers.unipc(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11), variant="bh3")
    with pytest.raises(ValueError, match="step 0 adds noise but there is none; pass seed"):
        plan_of(True).step(0, x, x)
    with pytest.raises(ValueError, match="`noise` and `seed` were both given"):
        plan_of(True).step(0, x, x, noise=x, seed=1)
    with pytest.raises(ValueError, match=r"one_step: `times` rises at times\[1\], from 0.1 to 0.5"):
        solvers.one_step(lgd.RectifiedFlow(), torch.tensor([0.1, 0.5]))


@pytest.mark.parametrize("omega", [0.7, OMEGA, "table"], ids=["number", "[B]", "table"])
def test_the_short_way_is_the_general_one(target, omega, generator):
    """Check that an index as an int, with coefficients computed once for the run, and as a tensor give the same, for
    each kind of omega."""
    x, c, u, kept, z = testing.sample((5, BATCH, 50), torch.float32, generator).to(target.device).unbind(0)
    if isinstance(omega, str):
        omega = testing.omegas(BATCH, generator)["table"]
    plan, omega = plan_of(stochastic=True).to(target.device), testing.moved(omega, target.device)
    for i in (1, 4, 1):
        for w, uncond, noise in ((omega, u, z), (0.25, u, z), (0.0, None, z)):
            at = torch.tensor(i, device=target.device)
            short = plan.step(i, x, c, uncond, w, kept, noise=noise, impl=target.impl)
            general = plan.step(at, x, c, uncond, w, kept, noise=noise, impl=target.impl)
            for f, e in zip(short, general, strict=True):
                assert torch.equal(f, e)


def test_the_short_way_lends_itself_to_gradients(generator):
    """Check gradients after a first step without any, in inference mode; and vmap and jvp, which do not take the fast
    path."""
    x, c, u, kept = testing.sample((4, BATCH, 50), torch.float64, generator).unbind(0)
    plan, omega = plan_of(), OMEGA.double()
    with torch.inference_mode():
        expected = plan.step(2, x, c, u, omega, kept)[0].clone()
    leaves = [one.clone().requires_grad_() for one in (x, c, u, omega, kept)]
    found = plan.step(2, *leaves)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda *given: plan.step(2, *given), leaves)
    _, slope = torch.func.jvp(lambda w: plan.step(2, x, c, u, w, kept)[0], (omega,), (torch.ones_like(omega),))
    torch.testing.assert_close(slope, plan.step(2, x * 0, c - u, None, 0.0, kept * 0)[0])
    each = torch.vmap(lambda one: plan.step(2, one, c, u, omega, kept)[0])(torch.stack((x, x + 1)))
    torch.testing.assert_close(each[0], expected)


def test_the_short_way_names_what_it_was_given():
    plan, x = plan_of(), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"StepPlan.step: `uncond` has shape \[3, 5\], expected \[3, 4\] like `x`"):
        plan.step(0, x, x, torch.ones(3, 5), 1.0)
    with pytest.raises(ValueError, match=r"StepPlan.step: `omega` has shape \[2\], expected \[B\] = \[3\]"):
        plan.step(0, x, x, x, torch.ones(2))
    with pytest.raises(TypeError, match="StepPlan.step: `kept` has dtype torch.int64"):
        plan.step(1, x, x, x, 1.0, torch.ones(3, 4, dtype=torch.int64))


def test_the_short_way_lays_out_no_batch(generator):
    """Check that the kept coefficients have the size of the table, and are the same for every batch size."""
    plan = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 301))
    for batch in (2, 20000):
        x, c, u = testing.sample((3, batch, 2), torch.float32, generator).unbind(0)
        for w in (0.5, 0.5, 1.5, torch.full((batch,), 2.0)):
            short = plan.step(7, x, c, u, w)[0]
            assert torch.equal(short, plan.step(torch.tensor(7), x, c, u, w)[0])
    (kept,) = plan._rows.values()
    tensors = *kept.run, kept.guidance, *(kept.kept[1] or ())
    assert sum(one.untyped_storage().nbytes() for one in tensors[:3]) <= 2 * plan.table.untyped_storage().nbytes()
    assert all(one.shape[0] == 1 for one in tensors[3:])


def test_the_short_way_sees_a_table_that_changed(generator):
    """Check a table that was changed in place, in inference mode or not."""
    x, c, u = testing.sample((3, BATCH, 50), torch.float32, generator).unbind(0)
    for mode in (False, True):
        with torch.inference_mode(mode):
            plan = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11))
            before = plan.step(2, x, c, u, 0.5)[0]
            assert torch.equal(before, plan.step(torch.tensor(2), x, c, u, 0.5)[0])
    plan = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11))
    plan.step(2, x, c, u, 0.5)
    plan.table.mul_(2)
    torch.testing.assert_close(plan.step(2, x, c, u, 0.5)[0], 2 * before)


def test_an_infinite_omega_is_so_in_its_column_alone(generator):
    x = testing.sample((BATCH, 5), torch.float32, generator)
    infinite = torch.full((BATCH,), torch.inf)
    for at in (1, torch.tensor(1)):
        for omega in (torch.inf, torch.inf, infinite):
            found = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11)).step(at, x, x + 1, x, omega)[0]
            assert found.isposinf().all()


def test_one_rule_for_omega():
    """Check that an int and a tensor as index accept the same omega: a number or [B]."""
    plan, x = plan_of(), torch.ones(3, 4)
    for at in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match=r"StepPlan.step: `omega` has shape \[\], expected \[B\] = \[3\]"):
            plan.step(at, x, x, x, torch.tensor(1.0))


def test_no_more_is_kept_than_a_plan_remembers():
    x = torch.ones(3, 4)
    deep = solvers.unipc(lgd.RectifiedFlow(), torch.linspace(0.95, 0, 11))
    for at in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="`kept` is a tuple of 3, expected at most two, the newest first"):
            deep.step(at, x, x, kept=(x, x, x))
        with pytest.raises(ValueError, match="`kept` is a tuple of 2, expected at most one: this plan is not `deep`"):
            plan_of().step(at, x, x, kept=(x, x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_by_an_int_compiles_whole(device, generator):
    x, c, u, kept = testing.sample((4, BATCH, 50), torch.float32, generator).to(device).unbind(0)
    plan, omega = plan_of().to(device, torch.float32), OMEGA.to(device)
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(lambda *given: plan.step(2, *given), fullgraph=True, backend=backend)
    for found, expected in zip(compiled(x, c, u, omega, kept), plan.step(2, x, c, u, omega, kept), strict=True):
        torch.testing.assert_close(found, expected)
