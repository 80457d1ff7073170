"""Every rule of rules.py against its definition, in float64 and through the kernels."""

import functools
import math

import pytest
import torch
from conftest import address, dtypes_of

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules, weights
from lgd_kernels.guidance.rules import Guidance
from lgd_kernels.guidance.stateful import Feedback, Momentum
from lgd_kernels.runtime.levels import step_coefficients, x0_coefficients

SHAPE = 3, 4, 5, 6
OMEGA = torch.tensor([0.5, 2.0, 6.5], dtype=torch.float64)


def column(value):
    return value.view(-1, 1, 1, 1) if isinstance(value, torch.Tensor) and value.ndim else value


def norm(tensor):
    return column(tensor.flatten(1).norm(dim=1))


def dot(a, b):
    return column((a * b).flatten(1).sum(1))


def std(tensor):
    return column(tensor.flatten(1).std(1))


def apg(c, u, w, eta=0.0, radius=math.inf):
    d = c - u
    if radius < math.inf:
        d = d * (radius / norm(d)).clamp(max=1)
    unit = c / norm(c)
    along = dot(d, unit) * unit
    return c + w * (d - along + eta * along)


def rescaled(c, g, phi):
    return phi * g * std(c) / std(g) + (1 - phi) * g


def zero_star(c, u, w):
    q = dot(c, u) / (dot(u, u) + 1e-8)
    return q * u + (1 + w) * (c - q * u)


def tcfg(c, u, w):
    both = torch.stack((u.flatten(1), c.flatten(1)), 1)
    v = torch.linalg.svd(both, full_matrices=False).Vh[:, 0].view_as(c)
    projected = dot(u, v) * v
    return projected + (1 + w) * (c - projected)


def beta_cfg(c, u, w, progress, a, b, gamma):
    density = math.gamma(a + b) / math.gamma(a) / math.gamma(b) * progress ** (a - 1) * (1 - progress) ** (b - 1)
    return u + (1 + w) * density * (c - u) / norm(c - u) ** gamma


T = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
RULES = {  # the rule, and what it means: (c, u, omega) -> g
    "cfg": (rules.cfg, lambda c, u, w: u + (1 + w) * (c - u)),
    "interval": (
        functools.partial(rules.interval, t=T, low=0.2, high=0.5),
        lambda c, u, w: torch.where(column(torch.tensor([False, True, False])), c + w * (c - u), c),
    ),
    "rescale": (
        functools.partial(rules.rescale, phi=0.7),
        lambda c, u, w: rescaled(c, c + w * (c - u), 0.7),
    ),
    "apg": (rules.apg, apg),
    "apg, bounded": (
        functools.partial(rules.apg, eta=0.3, radius=5.0),
        functools.partial(apg, eta=0.3, radius=5.0),
    ),
    "apg, rescaled": (
        functools.partial(rules.rescale, phi=0.4, rule=functools.partial(rules.apg, eta=0.5)),
        lambda c, u, w: rescaled(c, apg(c, u, w, 0.5), 0.4),
    ),
    "cfg_zero_star": (rules.cfg_zero_star, zero_star),
    "cfg_zero_star, first step": (functools.partial(rules.cfg_zero_star, zero=True), lambda c, u, w: 0 * c),
    "tcfg": (rules.tcfg, tcfg),
    "mambo_g": (
        functools.partial(rules.mambo_g, alpha=0.8),
        lambda c, u, w: c + w * torch.exp(-0.8 * norm(c - u) / norm(u)) * (c - u),
    ),
    "beta_cfg": (
        functools.partial(rules.beta_cfg, progress=0.3, a=2.0, b=1.5, gamma=0.7),
        functools.partial(beta_cfg, progress=0.3, a=2.0, b=1.5, gamma=0.7),
    ),
}
each_rule = pytest.mark.parametrize("name", RULES)


def assert_exact(found, expected, terms=None):
    """Compare to 1e-12 of the largest value; a sum, to that of the sum of its absolute terms."""
    error = (found - expected).abs()
    limit = 1e-12 * (expected.abs().max() if terms is None else terms) + 1e-300
    assert bool((error <= limit).all()), f"error {error.max():.3g}, allowed {torch.as_tensor(limit).min():.3g}"


def pair(generator, dtype=torch.float64):
    """Return c and u that agree by half, with a mean, so that a rule that ignores the mean fails."""
    c, z = (testing.sample(SHAPE, torch.float64, generator) for _ in range(2))
    return (c + 0.3).to(dtype), (0.7 * c + 0.5 * z - 0.2).to(dtype)


@each_rule
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("closeness", [None, 1e-4], ids=["apart", "close"])
def test_is_its_definition(name, impl, closeness, generator):
    """Compare also where u lies within 1e-4 of c, as late in a run."""
    rule, defined = RULES[name]
    c, u = pair(generator)
    u = u if closeness is None else c + closeness * u
    assert_exact(lgd.guided_score(c, u, OMEGA, rule=rule, impl=impl), defined(c, u, column(OMEGA)))


@each_rule
def test_by_every_implementation(target, name, generator):
    """Compare within the storage type: the coefficients are those of the rounded data."""
    rule, defined = RULES[name]
    for dtype in dtypes_of(target):
        c, u = pair(generator, dtype)
        found = lgd.guided_score(c.to(target.device), u.to(target.device), OMEGA.to(target.device), rule=rule,
                                 impl=target.impl).cpu()  # fmt: skip
        truth = defined(c.double(), u.double(), column(OMEGA))
        testing.assert_elementwise(found, truth.to(dtype), truth, slack=2e-6 * truth.abs().max().item())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_rule_sees_a_small_difference(target, stored, generator):
    """Give ||D||^2 to 1e-6 where D is 1e-4 of c, however the rule runs: this rule returns it."""
    c = testing.sample((3, 5000), torch.float32, generator).to(stored).float()
    u = (c.double() + 1e-4 * testing.sample((3, 5000), torch.float64, generator)).to(stored)
    exact = (c.double() - u.double()).square().sum(1)
    assert exact.min() > 0
    c, u = c.to(target.device), u.to(target.device)
    for omega in (1.0, torch.ones(3, device=target.device, requires_grad=True)):  # in one call, and on tensors
        found = lgd.guided_score(c, u, omega, rule=lambda m, omega: Guidance(m.dd, 0.0 * omega), impl=target.impl)
        found = (found / c).detach().cpu().double().median(1).values
        assert ((found - exact) / exact).abs().max() < 1e-6
    seen, levels = [], testing.moved(testing.step_levels(3), target.device)
    rule = lambda m, omega: seen.append(m.dd) or Guidance(1.0, omega)  # noqa: E731
    lgd.guided_step(c, c, u, 1.0, levels, prediction="flow", rule=rule, rule_space="x0", impl=target.impl)
    beta = x0_coefficients(testing.promoted(testing.step_levels(3)), "flow")[1]
    assert ((seen[0].cpu() - beta**2 * exact) / (beta**2 * exact)).abs().max() < 1e-6


@each_rule
def test_omega_0_is_conditional_only(name, generator):
    """Expect c at omega = 0, except from rules that change c itself."""
    if name in ("cfg_zero_star, first step", "beta_cfg"):
        return
    c, u = pair(generator)
    torch.testing.assert_close(lgd.guided_score(c, u, 0.0, rule=RULES[name][0]), c, rtol=0, atol=1e-13)


@each_rule
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("closeness", [None, 1e-4], ids=["apart", "close"])
def test_gradients_are_those_of_the_definition(name, impl, closeness, generator):
    """Compare gradients to c, u and omega with autograd of the definition."""
    rule, defined = RULES[name]
    c, u = pair(generator)
    u = u if closeness is None else c + closeness * u
    inputs = [tensor.clone().requires_grad_() for tensor in (c, u, OMEGA)]
    upstream = testing.sample(SHAPE, torch.float64, generator)
    guided = lgd.guided_score(*inputs, rule=rule, impl=impl)
    found = torch.autograd.grad(guided, inputs, upstream, materialize_grads=True)
    expected = torch.autograd.grad(
        defined(*inputs[:2], column(inputs[2])), inputs, upstream, materialize_grads=True, allow_unused=True
    )
    terms = None, None, (upstream.abs() * (c.abs() + u.abs())).flatten(1).sum(1)
    for f, e, size in zip(found, expected, terms, strict=True):
        assert_exact(f, e, size)


def test_gradcheck_twice(generator):
    c, u = (torch.randn(2, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    rule = functools.partial(rules.rescale, phi=0.5, rule=functools.partial(rules.apg, eta=0.3))
    call = functools.partial(lgd.guided_score, rule=rule)
    inputs = c, u, OMEGA[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


PREDICTIONS = ("x0", "eps", "v", "flow")


def step_problem(generator):
    c, u = pair(generator)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    return testing.sample(SHAPE, torch.float64, generator), c, u, lgd.RectifiedFlow().levels(t, t - 0.25)


def to_x0(x, p, levels, prediction):
    a, n = column(levels.signal_t), column(levels.noise_t)
    return {
        "x0": p,
        "eps": (x - n * p) / a,
        "v": a * x / (a * a + n * n) - n * p / torch.sqrt(a * a + n * n),
        "flow": (x - n * p) / (a + n),
    }[prediction]


@each_rule
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", ["prediction", "x0"])
def test_steps(name, prediction, space, generator):
    """Compare with the step from the rule's g, in its space."""
    rule, defined = RULES[name]
    x, c, u, levels = step_problem(generator)
    if space == "x0":
        c0, u0 = (to_x0(x, p, levels, prediction) for p in (c, u))
        g, kind = defined(c0, u0, column(OMEGA)), "x0"
    else:
        g, kind = defined(c, u, column(OMEGA)), prediction
    z = testing.sample(SHAPE, torch.float64, generator)
    options = dict(churn=0.6, noise=z)
    expected = lgd.guided_step(x, g, g, 0.0, levels, prediction=kind, **options)
    found = lgd.guided_step(x, c, u, OMEGA, levels, prediction=prediction, rule=rule, rule_space=space, **options)
    assert_exact(found, expected)


@pytest.mark.extension
@each_rule
def test_reads_no_stale_memory(name, generator, poisoned):
    """Write into fresh memory, in one call of the extension."""
    c, u = (one.float() for one in pair(generator))
    found = lgd.guided_score(c, u, OMEGA.float(), rule=RULES[name][0])
    assert address(found) in poisoned
    expected = lgd.guided_score(c, u, OMEGA.float(), rule=RULES[name][0], impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_steps_draw_the_same_noise(target, generator):
    x, c, u, levels = (testing.promoted(value) for value in step_problem(generator))
    x, c, u = (tensor.float().to(target.device) for tensor in (x, c, u))
    levels, omega = testing.moved(levels, target.device), OMEGA.float().to(target.device)
    options = dict(churn=0.7, seed=11, first_sample=5, impl=target.impl)
    found = lgd.guided_step(x, c, u, omega, levels, rule=rules.cfg, **options)
    torch.testing.assert_close(found, lgd.guided_step(x, c, u, omega, levels, **options), rtol=1e-6, atol=4e-6)


def test_the_space_matters(generator):
    x, c, u, levels = step_problem(generator)
    call = functools.partial(lgd.guided_step, x, c, u, OMEGA, levels, prediction="eps")
    in_eps, in_x0 = (call(rule=rules.apg, rule_space=space) for space in ("prediction", "x0"))
    assert (in_eps - in_x0).norm() > 0.05 * in_eps.norm()
    linear = [call(rule=rules.cfg, rule_space=space) for space in ("prediction", "x0")]
    assert_exact(*linear)


def test_temperature(generator):
    """Turn a Gaussian of variance s0^2 into one of variance s0^2 / k, exactly."""
    x, _, u, levels = step_problem(generator)
    a, n, s0, k = column(levels.signal_t), column(levels.noise_t), 0.8, 3.0
    exact = a * s0**2 / (a**2 * s0**2 + n**2) * x  # E[x0 | x] for x0 ~ N(0, s0^2)
    sharp = a * (s0**2 / k) / (a**2 * s0**2 / k + n**2) * x  # and for N(0, s0^2 / k)
    rule = functools.partial(rules.temperature, levels=levels, k=k, data_scale=s0)
    found = lgd.guided_step(x, exact, u, 0.0, levels, rule=rule)
    assert_exact(found, lgd.guided_step(x, sharp, sharp, 0.0, levels))
    with pytest.raises(ValueError, match="`rule` reads x"):
        lgd.guided_score(exact, u, 0.0, rule=rule)


@pytest.mark.parametrize("churn", [0.0, 0.5])
def test_cfg_plus_plus(churn, generator):
    """Renoise with u: x_s = signal_s (u0 + lam (c0 - u0)) + noise_s z(u), in DDIM's form at churn 0."""
    x, c, u, levels = step_problem(generator)
    omega = weights.cfg_plus_plus(levels, 0.6, churn)
    found = lgd.guided_step(x, c, u, omega, levels, churn=churn, noise=torch.zeros_like(x))
    a, b, _ = (column(value) for value in step_coefficients(levels, "x0", churn))
    expected = a * x + b * u + column(levels.signal_s) * 0.6 * (c - u)
    assert_exact(found, expected)
    t = torch.linspace(0.2, 1, x.shape[0], dtype=torch.float64)
    stays = lgd.RectifiedFlow().levels(t, t)
    assert torch.equal(lgd.guided_step(x, c, u, weights.cfg_plus_plus(stays, 0.6, churn), stays), x)


def test_more_predictions(generator):
    u, c1, c2 = (testing.sample(SHAPE, torch.float64, generator) for _ in range(3))
    both = torch.stack((OMEGA, 0.5 * OMEGA), 1)
    found = lgd.combine((u, c1, c2), weights.composable(both), columns=(0, (1, 0), (2, 0)))
    expected = u + column(OMEGA) * (c1 - u) + 0.5 * column(OMEGA) * (c2 - u)
    assert_exact(found, expected)
    found = lgd.combine((c1, u, c2), weights.perturbed(OMEGA, OMEGA + 1), columns=(0, (0, 1), (0, 2)))
    expected = c1 + column(OMEGA) * (c1 - u) + column(OMEGA + 1) * (c1 - c2)
    assert_exact(found, expected)


def test_momentum_remembers(generator):
    rule = Momentum(functools.partial(rules.apg, eta=0.2, radius=9.0), -0.5)
    running = torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(3):
        c, u = pair(generator)
        running = c - u - 0.5 * running
        expected = apg(c, c - running, column(OMEGA), 0.2, 9.0)
        assert_exact(lgd.guided_score(c, u, OMEGA, rule=rule), expected)
    x, c, u, levels = step_problem(generator)
    rule.reset()
    found = lgd.guided_step(x, c, u, OMEGA, levels, prediction="eps", rule=rule)
    g = apg(c, u, column(OMEGA), 0.2, 9.0)
    assert_exact(found, lgd.guided_step(x, g, g, 0.0, levels, prediction="eps"))
    with pytest.raises(ValueError, match="`rule` keeps a difference"):
        lgd.guided_step(x, c, u, OMEGA, levels, prediction="eps", rule=rule, rule_space="x0")


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_feedback(prediction, generator):
    """Compute the log ratio by its definition, in x0 space, through four steps, the last to s = 0."""
    x, c, u, _ = step_problem(generator)
    feedback, pi, log_ratio = Feedback(3, pi=0.7, tau=0.1, delta=0.05), 0.7, torch.zeros(3, dtype=torch.float64)
    low = math.log(0.3 * 10 / 9)
    times = torch.tensor([0.9, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64)
    for t, s in zip(times, times[1:], strict=False):
        levels = lgd.RectifiedFlow().levels(t.expand(3), s.expand(3))
        w = log_ratio.exp() / (log_ratio.exp() - (1 - pi))
        assert_exact(feedback.omega, w - 1, terms=w)
        assert (w > 1).all()
        options = dict(prediction=prediction, churn=1.0, noise=testing.sample(SHAPE, torch.float64, generator))
        x_s = lgd.guided_step(x, c, u, feedback.omega, levels, **options)
        feedback.update(x_s, x, c, u, levels, prediction)
        a, b, v = (column(value) for value in step_coefficients(levels, "x0", 1.0))
        c0, u0 = (to_x0(x, p, levels, prediction) for p in (c, u))
        if s > 0:
            d = c0 - u0
            moved = (2 * b * dot(x_s - a * x - b * c0, d) + b**2 * dot(d, d)) / (2 * v**2)
            log_ratio = (log_ratio + 0.1 * moved.flatten() + 0.05).clamp(low, 3)
        x = x_s
    assert_exact(feedback.log_ratio, log_ratio)


def test_a_rule_of_ones_own_takes_a_few_lines(generator):
    """Guide by a fixed length: no kernel, nothing registered, differentiable."""

    def unit_guidance(m, omega, *, length):
        """c + omega length D / ||D||"""
        return Guidance(1.0, omega * length / torch.sqrt(m.dd))

    c, u = pair(generator)
    omega = OMEGA.clone().requires_grad_()
    found = lgd.guided_score(c, u, omega, rule=functools.partial(unit_guidance, length=2.0))
    assert_exact(found, c + 2 * column(OMEGA) * (c - u) / norm(c - u))
    found.sum().backward()
    assert omega.grad.all()


def test_a_rule_that_asks_for_no_moments_reads_none(generator, monkeypatch):
    from lgd_kernels.ops.moments import op

    def refuse(*_):
        raise AssertionError("a pass too many")

    monkeypatch.setattr(op, "moments", refuse)
    c, u = pair(generator)
    lgd.guided_score(c, u, OMEGA, rule=rules.cfg, impl="reference")
    with pytest.raises(AssertionError, match="a pass too many"):
        lgd.guided_score(c, u, OMEGA, rule=rules.apg, impl="reference")


def test_looked_up_and_plain_omegas(generator):
    c, u = pair(generator)
    for omega in testing.omegas(3, generator).values():
        expected = lgd.guided_score(c, u, omega)
        assert_exact(lgd.guided_score(c, u, omega, rule=rules.cfg), expected)


def test_compiles_in_one_graph(generator):
    c, u = pair(generator, torch.float32)
    call = functools.partial(lgd.guided_score, rule=functools.partial(rules.rescale, phi=0.7, rule=rules.apg))
    omega = OMEGA.float().requires_grad_()
    compiled = torch.compile(call, fullgraph=True)
    found, expected = compiled(c, u, omega), call(c, u, omega)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(one.square().sum(), omega)[0] for one in (found, expected)]
    torch.testing.assert_close(*grads)


def test_refuses(generator):
    x, c, u, levels = step_problem(generator)
    with pytest.raises(TypeError, match="`rule` is a str, expected a function"):
        lgd.guided_score(c, u, 1.0, rule="apg")
    with pytest.raises(TypeError, match="`rule` returned a Tensor, expected Guidance"):
        lgd.guided_score(c, u, 1.0, rule=lambda m, omega: omega)
    with pytest.raises(ValueError, match="`rule_space` is 'eps', expected one of prediction, x0"):
        lgd.guided_step(x, c, u, 1.0, levels, rule=rules.cfg, rule_space="eps")
    with pytest.raises(ValueError, match="no 'cuda' implementation"):
        lgd.guided_score(c, u, 1.0, rule=rules.apg, impl="cuda")
    with pytest.raises(ValueError, match="`pi` is 1.5"):
        Feedback(2, pi=1.5)
    with pytest.raises(ValueError, match="`w_max` is 1"):
        Feedback(2, pi=0.5, w_max=1)
