"""Test the sampling loop."""

import dataclasses
import functools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules
from lgd_kernels.omega.forms import Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import TableModule
from lgd_kernels.sampling import solvers
from lgd_kernels.sampling.sampler import sample

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


KNOTS = torch.linspace(0, 1, 5)
LABELS = torch.tensor([3, 0, 2])
STEPS = {  # (s, t) of every call, by hand, for sigmas or times 4, 2, 1, 0
    "one_step": (lambda times: solvers.one_step(lgd.EDM(), times, churn=1.0), [(2, 4), (1, 2), (0, 1)]),
    "one_step, to": (
        lambda times: solvers.one_step(lgd.EDM(), times[:-1], to=times[:-1] / 4),
        [(1, 4), (0.5, 2), (0.25, 1)],
    ),
    "consistency": (lambda times: solvers.consistency(lgd.EDM(), times), [(2, 4), (1, 2), (0, 1)]),
    "edm_euler": (solvers.edm_euler, [(2, 4), (1, 2), (0, 1)]),
    "edm_euler, churn": (
        lambda times: solvers.edm_euler(times, s_churn=0.75, s_tmax=2.0),  # gamma = 1/4
        [(2, 4), (1, 2.5), (0, 1.25)],
    ),
    "edm_euler, before": (lambda times: solvers.edm_euler(times, s_churn=0.75, after=False), [(2, 4), (1, 2), (0, 1)]),
    "edm_heun": (solvers.edm_heun, [(2, 4), (1, 2), (1, 2), (0, 1), (0, 1)]),
    "edm_heun, not to 0": (lambda times: solvers.edm_heun(times[:-1]), [(2, 4), (1, 2), (1, 2), (0, 1)]),
    "edm_heun, churn": (
        lambda times: solvers.edm_heun(times, s_churn=0.75),
        [(2, 5), (1, 2), (1, 2.5), (0, 1), (0, 1.25)],
    ),
    "adams_bashforth": (solvers.adams_bashforth, [(2, 4), (1, 2), (0, 1)]),
    "dpm_solver_2m": (lambda times: solvers.dpm_solver_2m(lgd.EDM(), times), [(2, 4), (1, 2), (0, 1)]),
    "deis": (lambda times: solvers.deis(lgd.EDM(), times), [(2, 4), (1, 2), (0, 1)]),
    "unipc": (lambda times: solvers.unipc(lgd.EDM(), times), [(2, 4), (1, 2), (0, 1)]),
}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each sample"])
@pytest.mark.parametrize("solver", STEPS)
def test_a_function_is_asked_for_every_step(solver, own, generator):
    """Check that a function of omega is called once, before the loop, with the times of every call by hand, and that
    the samples are those of the same weights as a table `[N, B]`."""
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    make, by_hand = STEPS[solver]
    times = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    plan = make(times[:, None].expand(4, 3) if own else times)
    s, t = (torch.tensor(one, dtype=torch.float64)[:, None].expand(-1, 3) for one in zip(*by_hand, strict=True))
    calls = []

    def omega(c, s, t):
        calls.append((c, s, t))
        return c + s + 2 * t

    found = sample(denoiser, x, plan, cond, uncond, omega, condition=LABELS, seed=1)
    ((c, *asked),) = calls
    assert torch.equal(c, LABELS.repeat(len(plan)))
    torch.testing.assert_close(torch.stack(asked), torch.stack((s.flatten(), t.flatten())), rtol=1e-12, atol=0)
    assert torch.equal(found, sample(denoiser, x, plan, cond, uncond, LABELS + s + 2 * t, seed=1))


def labelled(x, t, c):
    return torch.tanh(x * (1 - t.to(x.dtype))[:, None] + c[:, None] / 10)


OMEGAS = {
    "table": lgd.OmegaTable(3 * torch.rand(10, 5, 5, generator=torch.Generator().manual_seed(0)), KNOTS, KNOTS),
    "learned": TableModule(lgd.OmegaTable(torch.rand(10, 5, 5), KNOTS, KNOTS)).requires_grad_(False),
    "network": OmegaNetwork(lgd.RectifiedFlow(), classes=10).requires_grad_(False),
    "interval": Interval(1.5, 0.3, 0.7).requires_grad_(False),
}


@pytest.mark.parametrize("name", OMEGAS)
def test_c_is_cond_where_that_is_labels(name, generator):
    x, omega = testing.sample((3, 30), torch.float32, generator), OMEGAS[name]
    plan = solvers.dpm_solver_2m(lgd.RectifiedFlow(), TIMES)
    found = sample(labelled, x, plan, LABELS, torch.full((3,), 10), omega)
    expected, kept = x, None
    for i in range(8):
        t, s = TIMES[i].expand(3), TIMES[i + 1].expand(3)
        cond, uncond = labelled(expected, t, LABELS), labelled(expected, t, torch.full((3,), 10))
        expected, kept = plan.step(i, expected, cond, uncond, omega(LABELS, s, t), kept)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_c_where_cond_is_no_label(generator):
    """Check the default c: a vector for a network of embeddings, None where omega does not depend on c."""
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan = solvers.one_step(lgd.RectifiedFlow(), TIMES)
    run = functools.partial(sample, denoiser, x, plan, cond, uncond)
    vectors = OmegaNetwork(lgd.RectifiedFlow(), embedding=1).requires_grad_(False)
    assert torch.equal(run(vectors), run(vectors, condition=cond))
    assert torch.equal(run(Constant(0.5).requires_grad_(False)), run(torch.full((8, 3), 0.5)))
    one = lgd.OmegaTable(torch.full((1, 5, 5), 0.5), KNOTS, KNOTS)
    assert torch.equal(run(one), run(torch.full((8, 3), 0.5)))
    labels = torch.tensor([5, 6, 7])  # for the denoiser; a table with one condition needs none
    found = sample(labelled, x, plan, labels, 0 * labels, one)
    assert torch.equal(found, sample(labelled, x, plan, labels, 0 * labels, torch.full((8, 3), 0.5)))
    for omega in (OMEGAS["table"], OMEGAS["learned"]):
        with pytest.raises(
            TypeError, match=r"`cond` is torch.float32 \[3, 1\], .*; pass condition=..., integers \[B\]"
        ):
            run(omega)
        assert run(omega, condition=LABELS).isfinite().all()  # the remedy
    with pytest.raises(TypeError, match="`cond` is a dict, which does not say what c is in .* of the OmegaNetwork"):
        sample(lambda x, t, c: x, x, plan, {}, {}, OMEGAS["network"])


def test_an_omega_of_0_leaves_the_network_out(generator):
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan, calls = solvers.one_step(lgd.RectifiedFlow(), TIMES), []
    counted = lambda x, t, c: calls.append(c is uncond) or denoiser(x, t, c)  # noqa: E731
    sample(counted, x, plan, cond, uncond, Interval(2.0, 0.3, 0.7).requires_grad_(False))
    assert sum(calls) == int(((plan.times > 0.3) & (plan.times <= 0.7)).sum()) == 3 and len(calls) == 11


def test_gradient_of_a_table_that_was_looked_up(generator):
    x, (cond, uncond) = testing.sample((3, 30), torch.float64, generator), conditions(generator)
    plan = solvers.one_step(lgd.RectifiedFlow(), TIMES)
    values = torch.rand(4, 5, 5, generator=generator, dtype=torch.float64).requires_grad_()
    table = lgd.OmegaTable(values, KNOTS, KNOTS)
    run = functools.partial(sample, denoiser, x, plan, cond.double(), uncond.double())
    (found,) = torch.autograd.grad(run(table, condition=LABELS).sum(), values)
    ends = TIMES[1:, None].expand(8, 3).flatten()
    rows = table(LABELS.repeat(8), ends, TIMES[:-1, None].expand(8, 3).flatten()).view(8, 3)
    (expected,) = torch.autograd.grad(run(rows).sum(), values)
    assert torch.equal(found, expected) and expected.abs().sum() > 0


def test_refuses_functions(generator):
    x, (cond, uncond) = testing.sample((3, 30), torch.float32, generator), conditions(generator)
    plan = solvers.one_step(lgd.RectifiedFlow(), TIMES)
    run = functools.partial(sample, denoiser, x, plan, cond, uncond)
    with pytest.raises(ValueError, match=r"`condition` is \[2\], expected a tensor \[B\] or \[B, E\] with B = 3"):
        run(OMEGAS["table"], condition=LABELS[:2])
    with pytest.raises(ValueError, match=r"`condition` is a int, expected a tensor"):
        run(OMEGAS["table"], condition=3)
    with pytest.raises(ValueError, match=r"`omega` returned \[8, 3\], expected a tensor \[24\]"):
        run(lambda c, s, t: torch.ones(8, 3))
    with pytest.raises(ValueError, match=r"`omega` returned a float, expected a tensor"):
        run(lambda c, s, t: 0.5)
    by_hand = solvers.StepPlan(plan.times, plan.table)
    with pytest.raises(ValueError, match=r"`plan.ends` is None.*replace\(plan, ends=...\) sets them"):
        sample(denoiser, x, by_hand, cond, uncond, OMEGAS["table"], condition=LABELS)
    again = sample(denoiser, x, dataclasses.replace(by_hand, ends=plan.ends), cond, uncond, OMEGAS["interval"])
    assert torch.equal(again, run(OMEGAS["interval"]))


def test_a_limited_interval_leaves_the_network_out(generator):
    """Check that the samples are the same with 3 calls of the unconditional network instead of 8."""
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
    """Check that a plan on the CPU, with a start for each sample, moves to the device of the data."""
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
    """Check that the noise of a seed `[B]` does not depend on the place in the batch, and that the parts of a split
    batch draw what the whole batch draws."""
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
    "deis": functools.partial(solvers.deis, FLOW, order=3),
    "unipc": functools.partial(solvers.unipc, FLOW),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_everything_of_its_own_for_each_sample(solver, generator):
    """Check that a sample with its own times, omega, rule parameter and seed ends where it would alone."""
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
    kept = (torch.zeros_like(x),) * plan.depth
    at = torch.tensor([4, 0, 2])  # each with its own call
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
