"""Compare gradients of omega through ten steps with autograd of the definitions, for every rule and solver, in float64.

The kernels run `sample`; the reference is a loop of plain PyTorch over the plan's table, with rules by definition. Both
draw the same noise.
"""

import functools

import pytest
import torch
from test_rules import RULES, SHAPE, assert_exact, column

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance.stateful import Momentum
from lgd_kernels.runtime.philox import STREAM_STEP
from lgd_kernels.sampling import solvers
from lgd_kernels.sampling.sampler import sample, seed_of

TIMES = torch.linspace(0.95, 0, 11, dtype=torch.float64)
SIGMAS = lgd.EDM().from_unit(TIMES)
FLOW = lgd.RectifiedFlow()
PLANS = {
    "ddim": lambda: solvers.one_step(FLOW, TIMES),
    "ddpm": lambda: solvers.one_step(FLOW, TIMES, churn=1.0),
    "flow, euler": lambda: solvers.one_step(FLOW, TIMES, prediction="flow"),
    "consistency": lambda: solvers.consistency(FLOW, TIMES),
    "edm_euler": lambda: solvers.edm_euler(SIGMAS, s_churn=2.0),
    "edm_heun": lambda: solvers.edm_heun(SIGMAS, s_churn=2.0),
    "adams_bashforth": lambda: solvers.adams_bashforth(SIGMAS),
    "adams_bashforth, 4": lambda: solvers.adams_bashforth(SIGMAS, order=4),
    "deis": lambda: solvers.deis(FLOW, TIMES, order=3),
    "dpm_solver_2m": lambda: solvers.dpm_solver_2m(FLOW, TIMES),
    "dpm_solver_2m, sde": lambda: solvers.dpm_solver_2m(FLOW, TIMES, stochastic=True),
    "unipc": lambda: solvers.unipc(FLOW, TIMES),
}


def denoiser(x, t, condition):
    return torch.tanh(x / (1 + column(t)) + condition) * 1.5 + 0.2


def meant(x, plan, cond, uncond, omega, defined, seed):
    """Run the plan by its table and the definition of the rule."""
    noise = functools.partial(lgd.philox_normal, SHAPE, stream=STREAM_STEP)
    x = x + plan.start * noise(seed_of(seed, len(plan))).double() if plan.start else x
    kept, *before = [torch.zeros_like(x)] * 4
    for i, t in enumerate(plan.times):
        c, u = (denoiser(x, t.expand(3), one) for one in (cond, uncond))
        g = defined(c, u, column(omega[i])) + 0 * column(omega[i])  # some rules do not use omega
        known = (x, g, kept, noise(seed_of(seed, i)).double(), *before)
        x, *after = (sum(f * one for f, one in zip(row, known, strict=False)) for row in plan.table[i])
        kept, before = after[0] if after else kept, [kept, *before[:-1]]
    return x


def check(plan, rule, defined, generator):
    x, cond, upstream = testing.sample((3, *SHAPE), torch.float64, generator).unbind(0)
    uncond = torch.zeros_like(cond)
    omega = (0.5 + torch.rand(len(plan), 3, generator=generator, dtype=torch.float64)).requires_grad_()
    found = sample(denoiser, x * plan.times.max(), plan, cond, uncond, omega, rule=rule, seed=3)
    expected = meant(x * plan.times.max(), plan, cond, uncond, omega, defined, 3)
    assert_exact(found, expected)
    grads = [torch.autograd.grad(one, omega, upstream)[0] for one in (found, expected)]
    assert_exact(*grads)
    return grads[0]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("by", ["plain", "cfg", "rescale"])
def test_through_every_solver(name, by, generator):
    """Check every solver, also without a rule, where guidance is part of the combine."""
    rule, defined = RULES["cfg" if by == "plain" else by]
    grad = check(PLANS[name](), None if by == "plain" else rule, defined, generator)
    assert (grad != 0).all(1).sum() >= len(grad) - 1  # a consistency step keeps only its noise


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("plan", ["ddim", "dpm_solver_2m, sde"])
def test_through_every_rule(name, plan, generator):
    check(PLANS[plan](), *RULES[name], generator)


def test_through_a_rule_that_remembers(generator):
    """Check that no gradient flows into earlier steps through the state of a rule, as its docstring states."""
    rule, defined = RULES["apg, bounded"]
    running = [torch.zeros(SHAPE, dtype=torch.float64)]

    def remembering(c, u, w):
        d = c - u - 0.5 * running[-1]
        running.append(d.detach())
        return defined(c, c - d, w)

    check(PLANS["unipc"](), Momentum(rule, -0.5), remembering, generator)
