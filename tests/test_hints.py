"""Test that following the hint in an error message works."""

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules
from lgd_kernels.learn import Frozen, draw, marginal_loss
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.sampling import solvers
from lgd_kernels.sampling.log_prob import step_with_log_prob
from lgd_kernels.sampling.sampler import sample

FLOW = lgd.RectifiedFlow()
C, U, X = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
LEVELS = testing.step_levels(3)
PX = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))  # particles
WEIGHTS = torch.ones(3)
PLAN = solvers.one_step(FLOW, torch.linspace(0.9, 0, 4), churn=0.5)
STILL = solvers.dpm_solver_2m(FLOW, torch.linspace(0.9, 0, 4))
CHURNED = solvers.edm_euler(torch.linspace(80, 0, 4), s_churn=1.0)
KNOTS = torch.linspace(0, 1, 4)
TABLE = lgd.OmegaTable(torch.rand(3, 4, 4), KNOTS, KNOTS)
GROUP = torch.zeros(3, dtype=torch.int64)


def score(omega=0.5, cond=C, uncond=U, **options):
    return lgd.guided_score(cond, uncond, omega, **options)


def step(levels=LEVELS, omega=0.5, x=X, **options):
    return lgd.guided_step(x, C, U, omega, levels, **options)


def energy(x=PX, cond=PX, uncond=PX, target=None, **options):
    return lgd.guided_energy(
        x, cond, uncond, 0.5, LEVELS, lgd.Renoise(C, 4, 0) if target is None else target, **options
    )


def mixed(**options):
    return lgd.combine((C, U), torch.ones(3, 2), **options)


def mmd(x=C, y=U, **options):
    return lgd.energy_mmd(x, y, **options)


def learned(m=1, **options):
    frozen = Frozen(lambda x, t, c: x, FLOW, null=0)
    particles = draw(frozen, C[:1], GROUP[:1], torch.zeros(1), torch.ones(1), m, seed=0)
    return marginal_loss(particles, options.pop("omega", torch.ones(1)), targets=3, **options)


def run(plan=STILL, **options):
    return sample(lambda x, t, c: x, X, plan, C, U, **options)


HALF, WHOLE = LEVELS.to(torch.float16), torch.ones(3, dtype=torch.int64)
GRAD = LEVELS._replace(gap=LEVELS.gap.clone().requires_grad_())
ALONE = C[:1]
CASES = {  # a call that is refused, the hint, and the same call with the hint followed
    "without guidance": (lambda: score(uncond=None), "pass cond again", lambda: score(uncond=C)),
    "without guidance, step": (
        lambda: lgd.guided_step(X, C, None, 0.5, LEVELS),
        "pass cond again",
        lambda: lgd.guided_step(X, C, C, 0.5, LEVELS),
    ),
    "sparse": (lambda: score(cond=C.to_sparse()), ".to_dense()", lambda: score(cond=C.to_sparse().to_dense())),
    "broadcast": (lambda: score(uncond=U[:1]), "expand it", lambda: score(uncond=U[:1].expand(3, 5))),
    "0-dim": (
        lambda: score(cond=C[0, 0], uncond=U[0, 0]),
        "unsqueeze(0)",
        lambda: score(cond=C[0, 0].unsqueeze(0), uncond=U[0, 0].unsqueeze(0)),
    ),
    "omega column": (lambda: score(WEIGHTS[:, None]), "omega.flatten()", lambda: score(WEIGHTS[:, None].flatten())),
    "omega 0-dim": (lambda: score(torch.tensor(2.0)), "omega.expand(3)", lambda: score(torch.tensor(2.0).expand(3))),
    "omega of one": (lambda: score(WEIGHTS[:1]), "omega.expand(3)", lambda: score(WEIGHTS[:1].expand(3))),
    "omega [1, 1]": (
        lambda: score(WEIGHTS[:1, None]),
        "omega.flatten().expand(3)",
        lambda: score(WEIGHTS[:1, None].flatten().expand(3)),
    ),
    "omega integers": (lambda: score(WHOLE), ".float()", lambda: score(WHOLE.float())),
    "a table": (
        lambda: score(TABLE),
        "OmegaTable.at(c, s, t)",
        lambda: score(TABLE.at(GROUP, 0 * WEIGHTS, WEIGHTS)),
    ),
    "a table elsewhere": (
        lambda: TABLE.to("meta").at(GROUP, 0 * WEIGHTS, WEIGHTS),
        "table.to(...) moves the table",
        lambda: TABLE.to("cpu").at(GROUP, 0 * WEIGHTS, WEIGHTS),
    ),
    "a lookup elsewhere": (
        lambda: score(TABLE.at(GROUP, 0 * WEIGHTS, WEIGHTS).to("meta")),
        ".to(...) moves it",
        lambda: score(TABLE.at(GROUP, 0 * WEIGHTS, WEIGHTS).to("cpu")),
    ),
    "levels elsewhere": (lambda: step(LEVELS.to("meta")), ".to(...) moves it", lambda: step(LEVELS.to("cpu"))),
    "levels as a tuple": (lambda: step(tuple(LEVELS)), "levels(t, s)", lambda: step(FLOW.levels(WEIGHTS, WEIGHTS / 2))),
    "levels exchanged": (
        lambda: step(lgd.Levels(*LEVELS[2:4], *LEVELS[:2], -LEVELS[4])),
        "levels(t, s) takes t first",
        lambda: step(FLOW.levels(WEIGHTS, WEIGHTS / 2)),
    ),
    "levels of integers": (
        lambda: step(lgd.Levels(*(level.long() for level in LEVELS))),
        ".float()",
        lambda: step(lgd.Levels(*(level.long().float() for level in LEVELS))),
    ),
    "levels with a gradient": (
        lambda: step(GRAD),
        "pass levels.gap.detach()",
        lambda: step(GRAD._replace(gap=GRAD.gap.detach())),
    ),
    "eps from noise": (
        lambda: step(FLOW.levels(WEIGHTS, WEIGHTS / 2), prediction="eps"),
        "start below t = 1",
        lambda: step(FLOW.levels(0.99 * WEIGHTS, WEIGHTS / 2), prediction="eps"),
    ),
    "churn with a gradient": (
        lambda: step(churn=WEIGHTS.clone().requires_grad_(), seed=0),
        "pass churn.detach()",
        lambda: step(churn=WEIGHTS.clone().requires_grad_().detach(), seed=0),
    ),
    "no noise": (lambda: step(churn=1.0), "pass seed=...", lambda: step(churn=1.0, seed=0)),
    "no noise either": (lambda: step(churn=1.0), "or noise=...", lambda: step(churn=1.0, noise=X)),
    "a seed under vmap": (
        lambda: torch.vmap(lambda x: step(x=x, churn=1.0, seed=0))(X[None]),
        "pass noise=...",
        lambda: torch.vmap(lambda x: step(x=x, churn=1.0, noise=x))(X[None]),
    ),
    "a seed under vmap, combine": (
        lambda: torch.vmap(lambda x: lgd.combine((x,), torch.ones(3, 1), noise_scale=1.0, seed=0))(X[None]),
        "pass the noise as one of the tensors",
        lambda: torch.vmap(lambda x: lgd.combine((x, U), torch.ones(3, 2)))(X[None]),
    ),
    "an implementation under vmap": (
        lambda: torch.vmap(lambda x: step(x=x, impl="cpu"))(X[None]),
        "impl=None takes the reference",
        lambda: torch.vmap(lambda x: step(x=x, impl=None))(X[None]),
    ),
    "an implementation": (lambda: step(impl="cuda"), "impl=None chooses", lambda: step(impl=None)),
    "source": (lambda: mixed(source=WHOLE.int()), "source.long()", lambda: mixed(source=WHOLE.int().long())),
    "coefficients": (
        lambda: lgd.combine((C,), torch.ones(3, 1).int()),
        ".float()",
        lambda: lgd.combine((C,), torch.ones(3, 1).int().float()),
    ),
    "constant": (lambda: mixed(constant=WHOLE), ".float()", lambda: mixed(constant=WHOLE.float())),
    "written": (lambda: mixed(written=1), "or moments=True", lambda: mixed(written=1, moments=True)),
    "seed": (lambda: mixed(seed=0), "noise_scale=1.0", lambda: mixed(seed=0, noise_scale=1.0)),
    "noise_scale": (lambda: mixed(noise_scale=1.0), "seed=...", lambda: mixed(noise_scale=1.0, seed=0)),
    "one particle": (
        lambda: energy(*[C[:, 0]] * 3, target=lgd.Renoise(C[:, 0], 4, 0), lam=0.0),
        ".unsqueeze(1)",
        lambda: energy(*[C[:, 0].unsqueeze(1)] * 3, target=lgd.Renoise(C[:, 0], 4, 0), lam=0.0),
    ),
    "a target without particles": (
        lambda: energy(target=C[:, 0]),
        "target.unsqueeze(1)",
        lambda: energy(*[PX[..., 0]] * 3, target=C[:, 0].unsqueeze(1)),
    ),
    "a target of another kind": (
        lambda: energy(target=3),
        "or Renoise or Expected",
        lambda: energy(target=lgd.Renoise(C, 3, 0)),
    ),
    "alone": (lambda: energy(*[PX[:, :1]] * 3), "pass two or more particles", lambda: energy(*[PX[:, :2]] * 3)),
    "alone, lam": (lambda: energy(*[PX[:, :1]] * 3), "lam=0", lambda: energy(*[PX[:, :1]] * 3, lam=0)),
    "alone, biased": (
        lambda: energy(*[PX[:, :1]] * 3),
        "unbiased=False",
        lambda: energy(*[PX[:, :1]] * 3, unbiased=False),
    ),
    "expected": (
        lambda: energy(target=lgd.Expected(C)),
        "pass beta=2, lam=0",
        lambda: energy(target=lgd.Expected(C), beta=2, lam=0),
    ),
    "not expected": (
        lambda: energy(target=lgd.Expected(C)),
        "or Renoise(x0, particles, seed)",
        lambda: energy(target=lgd.Renoise(C, 4, 0)),
    ),
    "curve": (
        lambda: lgd.guided_energy_curve(PX, PX, PX, LEVELS, lgd.Expected(C)),
        "pass Renoise(x0, particles, seed)",
        lambda: lgd.guided_energy_curve(PX, PX, PX, LEVELS, lgd.Renoise(C, 4, 0)),
    ),
    "one sample": (lambda: mmd(ALONE), "two or more", lambda: mmd(C[:2])),
    "one sample, lam": (lambda: mmd(ALONE), "lam=0", lambda: mmd(ALONE, lam=0)),
    "one sample, biased": (lambda: mmd(ALONE), "unbiased=False", lambda: mmd(ALONE, unbiased=False)),
    "one y": (lambda: mmd(y=ALONE), "target_term=False", lambda: mmd(y=ALONE, target_term=False)),
    "one x and one y": (lambda: mmd(ALONE, ALONE), "unbiased=False", lambda: mmd(ALONE, ALONE, unbiased=False)),
    "not batched": (lambda: mmd(C[:, 0], U[:, 0], batched=True), "batched=False", lambda: mmd(C[:, 0], U[:, 0])),
    "batched": (lambda: mmd(PX[:0], PX[:0]), "batched=True", lambda: mmd(PX[:0], PX[:0], batched=True)),
    "beta and a kernel": (
        lambda: mmd(beta=1.5, kernel=lgd.Gaussian(1.0)),
        "leave out one of them",
        lambda: mmd(kernel=lgd.Gaussian(1.0)),
    ),
    "beta and a kernel, the other": (
        lambda: mmd(beta=1.5, kernel=lgd.Gaussian(1.0)),
        "kernel=Energy(1.5)",
        lambda: mmd(kernel=lgd.Energy(1.5)),
    ),
    "weights with a gradient": (
        lambda: mmd(x_weights=WEIGHTS.clone().requires_grad_()),
        "pass x_weights.detach()",
        lambda: mmd(x_weights=WEIGHTS.clone().requires_grad_().detach()),
    ),
    "numbers for times": (
        lambda: FLOW.levels(0.5, 0.25),
        "torch.full((B,), t)",
        lambda: FLOW.levels(torch.full((3,), 0.5), 0.25),
    ),
    "half times": (
        lambda: FLOW.levels(WEIGHTS.half(), 0.25),
        "t.float()",
        lambda: FLOW.levels(WEIGHTS.half().float(), 0.25),
    ),
    "steps as floats": (
        lambda: lgd.Discrete.ddpm().levels(9 * WEIGHTS, -WEIGHTS),
        "t.long()",
        lambda: lgd.Discrete.ddpm().levels((9 * WEIGHTS).long(), -WEIGHTS.long()),
    ),
    "a short table": (lambda: lgd.Discrete.ddpm(10), "20 steps or more", lambda: lgd.Discrete.ddpm(20)),
    "times with a gradient": (
        lambda: TABLE.at(GROUP, 0 * WEIGHTS, WEIGHTS.clone().requires_grad_()),
        "pass t.detach()",
        lambda: TABLE.at(GROUP, 0 * WEIGHTS, WEIGHTS.clone().requires_grad_().detach()),
    ),
    "s and t": (
        lambda: TABLE.at(GROUP, WEIGHTS, 0 * WEIGHTS),
        "s=..., t=...",
        lambda: TABLE.at(GROUP, t=WEIGHTS, s=0 * WEIGHTS),
    ),
    "embeddings to bake": (
        lambda: OmegaNetwork(FLOW, embedding=5).bake(KNOTS, KNOTS),
        "the embeddings to tabulate, [C, 5]",
        lambda: OmegaNetwork(FLOW, embedding=5).bake(KNOTS, KNOTS, C),
    ),
    "no density": (
        lambda: step_with_log_prob(X, C, U, 0.5, LEVELS, churn=0.0, seed=0),
        "churn=1.0",
        lambda: step_with_log_prob(X, C, U, 0.5, LEVELS, churn=1.0, seed=0),
    ),
    "a rule with x": (
        lambda: score(rule=lambda m, w: rules.Guidance(1.0, w, 1.0)),
        "guided_step takes it",
        lambda: step(rule=lambda m, w: rules.Guidance(1.0, w, 1.0)),
    ),
    "a plan draws": (lambda: PLAN.step(0, X, C), "pass seed=...", lambda: PLAN.step(0, X, C, seed=0)),
    "a plan draws, noise": (lambda: PLAN.step(0, X, C), "or noise=...", lambda: PLAN.step(0, X, C, noise=X)),
    "a plan starts": (lambda: run(CHURNED), "pass seed=...", lambda: run(CHURNED, seed=0)),
    "omega of a run": (
        lambda: run(omega=torch.ones(3, 3, 1)[..., 0].repeat(2, 1)),
        "or [B], or a number",
        lambda: run(omega=WEIGHTS),
    ),
    "c of a run": (lambda: run(omega=TABLE), "pass condition=...", lambda: run(omega=TABLE, condition=GROUP)),
    "alone in a group": (lambda: learned(), "draw two or more", lambda: learned(2)),
    "alone in a group, biased": (lambda: learned(), "unbiased=False", lambda: learned(unbiased=False)),
    "omega of a group": (lambda: learned(2, omega="x"), "expected a float", lambda: learned(2, omega=0.5)),
    "in training": (
        lambda: Frozen(torch.nn.Dropout(), FLOW, null=0),
        "denoiser.eval()",
        lambda: Frozen(torch.nn.Dropout().eval(), FLOW, null=0),
    ),
    "null": (
        lambda: Frozen(lambda x, t, c: x, FLOW, null=0).null_like(C),
        "pass the null embedding",
        lambda: Frozen(lambda x, t, c: x, FLOW, null=torch.zeros(5)).null_like(C),
    ),
}

WITHOUT = {  # no hint could work
    "omega": (lambda: score(torch.ones(5)), "omega."),
    "omega [2, 1]": (lambda: score(torch.ones(2, 1)), "omega."),
    "no particles": (lambda: energy(*[PX[:, :0]] * 3), "unsqueeze"),
    "x": (lambda: energy(x=lgd.Renoise(C, 2, 0)), "or Renoise"),
    "a sample": (lambda: mmd(C[0, 0], U[0, 0]), "batched="),
    "a batched sample": (lambda: mmd(C[0, 0], U[0, 0], batched=True), "batched="),
    "no samples": (lambda: mmd(C[:0, :0], U[:0, :0]), "batched="),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hint_works(case):
    refused, hint, followed = CASES[case]
    with pytest.raises((TypeError, ValueError)) as error:
        refused()
    assert hint in str(error.value)
    followed()


@pytest.mark.parametrize("case", WITHOUT)
def test_no_hint_that_would_not_work(case):
    refused, hint = WITHOUT[case]
    with pytest.raises((TypeError, ValueError), match="expected") as error:
        refused()
    assert hint not in str(error.value)
