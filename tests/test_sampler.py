"""The sampling loop."""

import functools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import rules, solvers, testing
from lgd_kernels.sampler import sample

OMEGA = torch.tensor([0.5, 1.5, 3.0])
TIMES = torch.linspace(0.95, 0, 9, dtype=torch.float64)


def denoiser(x, t, condition):
    assert t.shape == x.shape[:1]
    return torch.tanh(x * (1 - t.to(x.dtype))[:, None] + condition)


def conditions(generator):
    return testing.sample((3, 1), torch.float32, generator), torch.zeros(3, 1)


def by_hand(x, plan, cond, uncond, omega, seed, rule=None):
    kept = None
    for i, t in enumerate(plan.times):
        t = t.expand(3)
        drawn = {"seed": seed + (i << 32)}
        x, kept = plan.step(i, x, denoiser(x, t, cond), denoiser(x, t, uncond), omega, kept, rule=rule, **drawn)
    return x


@pytest.mark.parametrize("rule", [None, functools.partial(rules.rescale, phi=0.5)], ids=["cfg", "rescale"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_is_the_loop(stochastic, rule, generator):
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan = solvers.dpm_solver_2m(lgd.RectifiedFlow(), TIMES, stochastic=stochastic)
    seen = []
    found = sample(denoiser, x, plan, cond, uncond, OMEGA, rule=rule, seed=7, callback=lambda i, x: seen.append((i, x)))
    assert torch.equal(found, by_hand(x, plan, cond, uncond, OMEGA, 7, rule))
    assert [i for i, _ in seen] == list(range(8)) and torch.equal(seen[-1][1], found)


def test_a_limited_interval_leaves_the_network_out(generator):
    """The same samples, for 3 calls of the unconditional network instead of 8."""
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan = solvers.one_step(lgd.RectifiedFlow(), TIMES)
    inside = (plan.times > 0.3) & (plan.times <= 0.7)
    table = torch.where(inside[:, None], OMEGA, torch.zeros(()))
    calls = []

    def counted(x, t, condition):
        calls.append(condition is uncond)
        return denoiser(x, t, condition)

    found = sample(counted, x, plan, cond, uncond, table)
    assert sum(calls) == int(inside.sum()) == 3 and len(calls) == 11
    expected = x
    for i, t in enumerate(plan.times):
        c, u = (denoiser(expected, t.expand(3), one) for one in (cond, uncond))
        expected, _ = plan.step(i, expected, c, u, table[i])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_plan_and_its_start_are_taken_to_the_data(target, generator):
    """A start of its own for each sample, left on the CPU with the rest of the plan."""
    x = testing.sample((2, 30), torch.float32, generator).to(target.device)
    sigmas = torch.linspace(80, 1, 5)[:, None] * torch.tensor([1.0, 0.5])
    plan = solvers.edm_euler(sigmas, s_churn=1.0)
    assert plan.start.shape == (2,)
    condition = torch.zeros((), device=target.device)
    found, expected = (
        sample(lambda x, t, c: 0 * x + c, x, one, condition, seed=1, impl=target.impl)
        for one in (plan, plan.to(target.device))
    )
    assert torch.equal(found, expected)


def test_a_seed_of_its_own_for_each_sample(generator):
    """Its noise does not depend on its place in the batch; a batch that is split draws what the whole one does."""
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan = solvers.edm_euler(lgd.EDM().from_unit(torch.linspace(1, 0, 7, dtype=torch.float64)), s_churn=2.0)
    assert plan.start > 0
    seeds, order = torch.tensor([3, 4, 5]), [2, 0, 1]
    whole = sample(denoiser, 80 * x, plan, cond, uncond, OMEGA, seed=seeds)
    moved = sample(denoiser, 80 * x[order], plan, cond[order], uncond, OMEGA[order], seed=seeds[order])
    assert torch.equal(whole[order], moved)
    whole = sample(denoiser, 80 * x, plan, cond, uncond, OMEGA, seed=3)
    part = sample(denoiser, 80 * x[1:], plan, cond[1:], uncond[1:], OMEGA[1:], seed=3, first_sample=1)
    assert torch.equal(whole[1:], part)
    with pytest.raises(ValueError, match="the plan adds noise to its first sample"):
        sample(denoiser, x, plan, cond, uncond, OMEGA)


FLOW, EDM = lgd.RectifiedFlow(), lgd.EDM()
SOLVERS = {  # of times in [0, 1]
    "one_step": functools.partial(solvers.one_step, FLOW, churn=0.6),
    "consistency": functools.partial(solvers.consistency, FLOW),
    "edm_euler": lambda times: solvers.edm_euler(EDM.from_unit(times), s_churn=2.0),
    "edm_heun": lambda times: solvers.edm_heun(EDM.from_unit(times)),
    "adams_bashforth": functools.partial(solvers.adams_bashforth),
    "dpm_solver_2m": functools.partial(solvers.dpm_solver_2m, FLOW, first_order=torch.arange(8) == 3),
    "dpm_solver_2m, sde": functools.partial(solvers.dpm_solver_2m, FLOW, stochastic=True),
    "unipc": functools.partial(solvers.unipc, FLOW),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_everything_of_its_own_for_each_sample(solver, generator):
    """Times, omega, the rule's parameter and the seed: a sample ends where it would alone."""
    x, (cond, uncond) = testing.sample((3, 30), torch.float64, generator), conditions(generator)
    times = torch.stack((TIMES, TIMES * 0.9 + 0.05, 0.8 * TIMES**2), 1)  # one of them does not end at the data
    omega, phi = torch.rand(9, 3, generator=generator) * 3, torch.tensor([0.2, 0.5, 0.9])
    seed = torch.tensor([5, 6, 5])
    rescale = lambda phi: functools.partial(rules.rescale, phi=phi)  # noqa: E731
    plan = SOLVERS[solver](times)
    omega = omega[torch.arange(len(plan)) % 9]
    whole = sample(denoiser, x, plan, cond, uncond, omega, rule=rescale(phi), seed=seed)
    for b in range(3):
        alone = SOLVERS[solver](times[:, b])
        w = omega[: len(alone), b : b + 1]
        one = slice(b, b + 1)
        end = sample(denoiser, x[one], alone, cond[one], uncond[one], w, rule=rescale(phi[b]), seed=seed[one])
        torch.testing.assert_close(whole[b], end[0], rtol=1e-12, atol=1e-12)
    kept = torch.zeros_like(x)
    kept = (kept, kept) if plan.deep else kept if plan.remembers else None
    at = torch.tensor([4, 0, 2])  # each at a call of its own, of a run of its own
    found, _ = plan.step(at, x, x + 1, x, 0.7, kept, seed=1)
    for b, i in enumerate(at.tolist()):
        expected, _ = plan.step(i, x, x + 1, x, 0.7, kept, seed=1)
        torch.testing.assert_close(found[b], expected[b], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="`x` has 2 samples, expected 3"):
        plan.step(0, x[:2], x[:2], seed=1)


def test_steps_draw_different_noise():
    plan = solvers.one_step(lgd.EDM(), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), churn=1.0)
    ends = []
    sample(
        lambda x, t, c: 0 * x, torch.zeros(1, 500), plan, torch.zeros(1), seed=1, callback=lambda i, x: ends.append(x)
    )
    first, second = ends[0], ends[1] - plan.table[1, 0, 0] * ends[0]
    assert abs(torch.corrcoef(torch.cat((first, second)))[0, 1]) < 0.2


def test_gradient_of_a_table_of_omegas(generator):
    x, (cond, uncond) = testing.sample((3, 30), torch.float64, generator), conditions(generator)
    plan = solvers.one_step(lgd.RectifiedFlow(), TIMES)
    table = (torch.rand(8, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    call = functools.partial(sample, denoiser, x, plan, cond.double(), uncond.double())
    assert torch.autograd.gradcheck(lambda omega: call(omega)[:, :3], table)


def test_refuses(generator):
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan = solvers.one_step(lgd.RectifiedFlow(), TIMES)
    with pytest.raises(ValueError, match=r"`omega` has shape \[3, 8\], expected \[N, B\] = \[8, 3\]"):
        sample(denoiser, x, plan, cond, uncond, torch.ones(3, 8))
