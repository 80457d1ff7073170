"""Rules whose programs C++ runs for each sample, in one call, and rules that cannot be recorded."""

import functools
import itertools

import pytest
import torch
from test_rules import OMEGA, RULES, pair

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules, run
from lgd_kernels.guidance.rules import Guidance

READ = ("cc", "cu", "cd", "uu", "ud", "dd", "c", "u", "d")
SIZES = [(1, 3), (5, 7), (64, 1000), (2, 40001), (3, 300000)]  # the last do not stay in the cache


@pytest.mark.extension
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_in_one_call_as_in_three(shape, generator, monkeypatch):
    """Give what rules give on tensors, whatever the size, and the same bits from one thread and two."""
    c, u, x, z = (testing.sample(shape, torch.float32, generator) for _ in range(4))
    u, omega = 0.5 * c + u, torch.linspace(0.5, 4, shape[0])
    t = torch.linspace(0.5, 0.9, shape[0])
    levels = lgd.RectifiedFlow().levels(t, t - 0.3)
    phi = torch.linspace(0.1, 0.9, shape[0])
    rule = functools.partial(rules.rescale, phi=phi, rule=functools.partial(rules.apg, eta=0.3, radius=20.0))
    calls = [
        functools.partial(lgd.guided_score, c, u, omega, rule=rule),
        functools.partial(lgd.guided_step, x, c, u, omega, levels, rule=rules.tcfg, churn=0.5, seed=3, prediction="v"),
        functools.partial(lgd.guided_step, x, c, u, 2.5, levels, rule=rules.mambo_g, churn=phi, noise=z),
    ]
    found, threads = [call() for call in calls], torch.get_num_threads()
    torch.set_num_threads(2)
    assert all(torch.equal(call(), one) for call, one in zip(calls, found, strict=True))
    torch.set_num_threads(1)
    assert all(torch.equal(call(), one) for call, one in zip(calls, found, strict=True))
    torch.set_num_threads(threads)
    monkeypatch.setattr("lgd_kernels.guidance.run._in_one_call", lambda *_: None)
    for call, one in zip(calls, found, strict=True):
        torch.testing.assert_close(one, call(), rtol=2e-6, atol=1e-5)


@pytest.mark.extension
@pytest.mark.parametrize("size", [5, 1031, 5000])
def test_moments_that_a_rule_reads_and_no_others(size, generator):
    """Read each alone, two at a time and all: some sets have a loop of their own, and the others take a larger one."""
    c, u = testing.sample((2, 3, size), torch.float32, generator).unbind(0)
    d = c.double() - u.double()
    of = dict(zip("cud", (c.double(), u.double(), d), strict=True))
    sums = {name: of[name[0]] * (of[name[1]] if len(name) > 1 else 1) for name in READ}
    for names in (*itertools.combinations(READ, 1), *itertools.combinations(READ, 2), READ):

        def rule(m, omega, names=names):
            return Guidance(sum((n + 1) * getattr(m, name) for n, name in enumerate(names)), 0.0)

        terms = sum((n + 1) * sums[name].abs().sum(1) for n, name in enumerate(names))
        expected = sum((n + 1) * sums[name].sum(1) for n, name in enumerate(names))
        found = lgd.guided_score(c, u, 1.0, rule=rule) / c
        assert ((found.double() - expected[:, None]).abs() <= 1e-6 * terms[:, None]).all(), names


@pytest.mark.extension
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_recorded(name, generator, monkeypatch):
    """Fail where a rule falls back on tensors: that would be as right, and slower."""

    def refuse(*_, **__):
        raise AssertionError("went over tensors")

    monkeypatch.setattr("lgd_kernels.guidance.run.combine", refuse)
    c, u = pair(generator)
    lgd.guided_score(c, u, OMEGA, rule=RULES[name][0])
    if name == "cfg_zero_star":
        zero = torch.tensor([True, False, True])
        found = lgd.guided_score(c, u, OMEGA, rule=functools.partial(RULES[name][0], zero=zero))
        assert found.flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.extension
def test_what_cannot_be_recorded_runs_on_tensors(generator):
    """Run decisions, functions that are not in the list, numbers that need a gradient; an error is the rule's own."""
    c, u = pair(generator)
    expected = lgd.guided_score(c, u, OMEGA)

    def decides(m, omega):
        return Guidance(1.0, omega if (m.dd > 0).all() else 0.0)

    def computes(m, omega):
        return Guidance(torch.tanh(m.dd) / torch.tanh(m.dd), omega)

    for rule in (decides, computes):
        torch.testing.assert_close(lgd.guided_score(c, u, OMEGA, rule=rule), expected, rtol=1e-12, atol=1e-12)
    phi = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    lgd.guided_score(c, u, OMEGA, rule=functools.partial(rules.rescale, phi=phi)).sum().backward()
    assert phi.grad.all()
    with pytest.raises(ZeroDivisionError):
        lgd.guided_score(c, u, OMEGA, rule=lambda m, omega: 1 / 0)


@pytest.mark.extension
def test_programs_are_cached_and_their_arguments_are_not(generator, monkeypatch):
    """Record a rule of the package once for each kind of call; its numbers are those of each call, and so is whatever a
    user's rule reads."""
    c, u, x = (testing.sample((4, 50), torch.float32, generator) for _ in range(3))
    apg, weaker = rules.apg, functools.partial(rules.apg, eta=0.5)
    scale = 1.0

    def own(m, omega):
        return Guidance(1.0, scale * omega)

    shifts = (0.1, 0.2)

    def step(omega, shift, rule, **options):
        t = torch.linspace(0.5, 0.9, 4)
        return lgd.guided_step(x, c, u, omega, lgd.RectifiedFlow().levels(t, t - shift), rule=rule, **options)

    def every():
        omegas = (1.5, 3.0, torch.linspace(0, 1, 4), torch.linspace(1, 2, 4))
        found = [lgd.guided_score(c, u, omega, rule=rule) for omega in omegas for rule in (apg, weaker, own)]
        return found + [
            step(omega, shift, rule, **options)
            for omega in (1.5, omegas[2])
            for shift in shifts
            for rule in (apg, weaker, own)
            for options in ({}, {"churn": 0.3, "seed": 1}, {"churn": torch.linspace(0.1, 1, 4), "seed": 2})
        ]

    first = every()
    assert all(torch.equal(one, other) for one, other in zip(every(), first, strict=True))
    monkeypatch.setattr("lgd_kernels.guidance.run._known", lambda _: None)
    assert all(torch.equal(one, other) for one, other in zip(every(), first, strict=True))
    monkeypatch.undo()
    scale = 2.0
    assert torch.equal(lgd.guided_score(c, u, 0.75, rule=own), first[2])


@pytest.mark.extension
def test_omega_and_churn_may_be_one_number(generator):
    """Give one object as both: it has two places in the program, whichever call came first."""
    c, u, x = (testing.sample((2, 50), torch.float32, generator) for _ in range(3))
    t = torch.tensor([0.5, 0.9])
    levels, one = lgd.RectifiedFlow().levels(t, t - 0.3), 0.5
    for omegas in ((2.0, one), (one, 2.0)):
        run._PROGRAMS.clear()
        for omega in omegas:
            found = lgd.guided_step(x, c, u, omega, levels, rule=rules.apg, churn=one, seed=3)
            exact = lgd.guided_step(x, c, u, omega, levels, rule=rules.apg, churn=one, seed=3, impl="reference")
            torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-5)
