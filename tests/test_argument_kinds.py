"""Arguments of the wrong type: every public function raises the error of its checks."""

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import metrics
from lgd_kernels.guidance import rules
from lgd_kernels.guidance.stateful import Feedback
from lgd_kernels.learn import fit, losses, marginal, objective, particles, reward
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.sampling import log_prob, sampler, solvers

BAD = {
    "str": "x", "None": None, "list": [1], "float": 1.5, "bool": True, "int": 2, "tensor": torch.ones(2), "dict": {},
    "object": object(),
}  # fmt: skip
x, xp = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
x = x[:, 0].contiguous()
FLOW = lgd.RectifiedFlow()
S, T, W, INDEX = torch.full((3,), 0.3), torch.full((3,), 0.8), torch.full((3,), 0.5), torch.tensor([0, 1, 0])
L = FLOW.levels(T, S)
PLAN = solvers.one_step(FLOW, torch.linspace(1, 0, 4))
KNOTS, KNOTS_T = torch.linspace(0, 0.5, 3), torch.linspace(0.6, 1, 3)
TABLE = lgd.OmegaTable(torch.ones(2, 3, 3), KNOTS, KNOTS_T)
FROZEN = Frozen(lambda x, t, c: x * 0.5, FLOW, null=0)
DRAWN = particles.draw(FROZEN, x, INDEX, S, T, seed=1)
CURVE = particles.curve(DRAWN)
CALLS = {
    "philox shape": lambda bad: lgd.philox_normal(bad, 1),
    "philox shape el": lambda bad: lgd.philox_normal((bad, 3), 1),
    "philox seed": lambda bad: lgd.philox_normal((2, 3), bad),
    "philox stream": lambda bad: lgd.philox_normal((2, 3), 1, stream=bad),
    "philox first": lambda bad: lgd.philox_normal((2, 3), 1, first_sample=bad),
    "combine tensors": lambda bad: lgd.combine(bad, torch.ones(3, 1)),
    "combine tensors el": lambda bad: lgd.combine([bad], torch.ones(3, 1)),
    "combine coef": lambda bad: lgd.combine([x], bad),
    "combine columns": lambda bad: lgd.combine([x], torch.ones(3, 1), columns=bad),
    "combine column": lambda bad: lgd.combine([x], torch.ones(3, 1), columns=[bad]),
    "combine constant": lambda bad: lgd.combine([x], torch.ones(3, 1), constant=bad),
    "combine noise_scale": lambda bad: lgd.combine([x], torch.ones(3, 1), noise_scale=bad, seed=1),
    "combine seed": lambda bad: lgd.combine([x], torch.ones(3, 1), noise_scale=1.0, seed=bad),
    "combine first": lambda bad: lgd.combine([x], torch.ones(3, 1), noise_scale=1.0, seed=1, first_sample=bad),
    "combine source": lambda bad: lgd.combine([x], torch.ones(3, 1), source=bad),
    "combine clamp": lambda bad: lgd.combine([x], torch.ones(3, 1), clamp=bad),
    "combine moments": lambda bad: lgd.combine([x], torch.ones(3, 1), moments=bad),
    "combine written": lambda bad: lgd.combine([x], torch.ones(3, 1), moments=True, written=bad),
    "combine wide": lambda bad: lgd.combine([x], torch.ones(3, 1), moments=True, wide=bad),
    "combine impl": lambda bad: lgd.combine([x], torch.ones(3, 1), impl=bad),
    "moments tensors": lambda bad: lgd.moments(bad),
    "moments columns": lambda bad: lgd.moments([x], columns=bad),
    "score cond": lambda bad: lgd.guided_score(bad, x, 1.0),
    "score omega": lambda bad: lgd.guided_score(x, x, bad),
    "score rule": lambda bad: lgd.guided_score(x, x, 1.0, rule=bad),
    "score impl": lambda bad: lgd.guided_score(x, x, 1.0, impl=bad),
    "step levels": lambda bad: lgd.guided_step(x, x, x, 1.0, bad),
    "step level": lambda bad: lgd.guided_step(x, x, x, 1.0, L._replace(gap=bad)),
    "step prediction": lambda bad: lgd.guided_step(x, x, x, 1.0, L, prediction=bad),
    "step churn": lambda bad: lgd.guided_step(x, x, x, 1.0, L, churn=bad, seed=1),
    "step noise": lambda bad: lgd.guided_step(x, x, x, 1.0, L, churn=1.0, noise=bad),
    "step seed": lambda bad: lgd.guided_step(x, x, x, 1.0, L, churn=1.0, seed=bad),
    "step rule": lambda bad: lgd.guided_step(x, x, x, 1.0, L, rule=bad),
    "step rule_space": lambda bad: lgd.guided_step(x, x, x, 1.0, L, rule=rules.apg, rule_space=bad),
    "dt x": lambda bad: lgd.dynamic_threshold(bad),
    "dt q": lambda bad: lgd.dynamic_threshold(x, quantile=bad),
    "dt max": lambda bad: lgd.dynamic_threshold(x, max_value=bad),
    "mmd x": lambda bad: lgd.energy_mmd(bad, x),
    "mmd y": lambda bad: lgd.energy_mmd(x, bad),
    "mmd beta": lambda bad: lgd.energy_mmd(x, x, beta=bad),
    "mmd lam": lambda bad: lgd.energy_mmd(x, x, lam=bad),
    "mmd unbiased": lambda bad: lgd.energy_mmd(x, x, unbiased=bad),
    "mmd kernel": lambda bad: lgd.energy_mmd(x, x, kernel=bad),
    "mmd w": lambda bad: lgd.energy_mmd(x, x, x_weights=bad),
    "mmd tt": lambda bad: lgd.energy_mmd(x, x, target_term=bad),
    "mmd batched": lambda bad: lgd.energy_mmd(x, x, batched=bad),
    "mmd precision": lambda bad: lgd.energy_mmd(x, x, precision=bad),
    "mmd group": lambda bad: lgd.energy_mmd(x, x, group=bad),
    "mmd progress": lambda bad: lgd.energy_mmd(x, x, progress=bad),
    "mmd impl": lambda bad: lgd.energy_mmd(x, x, impl=bad),
    "energy x": lambda bad: lgd.guided_energy(bad, xp, xp, 1.0, L, xp),
    "energy target": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, bad),
    "renoise x0": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, lgd.Renoise(bad, 2, 1)),
    "renoise n": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, lgd.Renoise(x, bad, 1)),
    "renoise seed": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, lgd.Renoise(x, 2, bad)),
    "expected": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, lgd.Expected(bad), beta=2, lam=0),
    "energy beta": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, xp, beta=bad),
    "energy unbiased": lambda bad: lgd.guided_energy(xp, xp, xp, 1.0, L, xp, unbiased=bad),
    "plan index": lambda bad: PLAN.step(bad, x, x),
    "plan kept": lambda bad: PLAN.step(0, x, x, kept=bad),
    "plan omega": lambda bad: PLAN.step(0, x, x, x, bad),
    "plan x": lambda bad: PLAN.step(0, bad, x),
    "plan cond": lambda bad: PLAN.step(0, x, bad),
    "plan uncond": lambda bad: PLAN.step(0, x, x, bad),
    "plan noise": lambda bad: PLAN.step(0, x, x, noise=bad),
    "plan seed": lambda bad: PLAN.step(0, x, x, seed=bad),
    "plan rule": lambda bad: PLAN.step(0, x, x, rule=bad),
    "lp x_s": lambda bad: log_prob.step_with_log_prob(x, x, x, 1.0, L, x_s=bad, seed=1),
    "lp red": lambda bad: log_prob.step_with_log_prob(x, x, x, 1.0, L, reduction=bad, seed=1),
    "lp churn": lambda bad: log_prob.step_with_log_prob(x, x, x, 1.0, L, churn=bad, seed=1),
    "curve loss": lambda bad: lgd.guided_energy_curve(xp, xp, xp, L, xp).loss(bad),
    "curve group": lambda bad: lgd.guided_energy_curve(xp, xp, xp, L, xp).minimize(group=bad),
    "curve bracket": lambda bad: lgd.guided_energy_curve(xp, xp, xp, L, xp).minimize(bracket=bad),
    "why_not op": lambda bad: lgd.why_not(bad, "cpu"),
    "why_not impl": lambda bad: lgd.why_not("combine", bad),
    "why_not t": lambda bad: lgd.why_not("combine", "cpu", bad),
    "median": lambda bad: lgd.median_bandwidth(bad),
    "sample x": lambda bad: sampler.sample(lambda x, t, c: x, bad, PLAN, None),
    "sample plan": lambda bad: sampler.sample(lambda x, t, c: x, x, bad, None),
    "sample omega": lambda bad: sampler.sample(lambda x, t, c: x, x, PLAN, None, 1, bad),
    "Gaussian": lambda bad: lgd.energy_mmd(x, x, kernel=lgd.Gaussian(bad)),
    "eta": lambda bad: lgd.churn_from_eta(bad, L),
    "eta L": lambda bad: lgd.churn_from_eta(1.0, bad),
    "mmd_test x": lambda bad: metrics.mmd_test(bad, x, permutations=5),
    "mmd_test perm": lambda bad: metrics.mmd_test(x, x, permutations=bad),
    "mmd_test seed": lambda bad: metrics.mmd_test(x, x, permutations=5, seed=bad),
    "frechet": lambda bad: metrics.frechet_distance(bad, x),
    "kid": lambda bad: metrics.kernel_inception_distance(x, x, subsets=bad, subset_size=2),
    "kid size": lambda bad: metrics.kernel_inception_distance(x, x, subsets=2, subset_size=bad),
    "edist": lambda bad: metrics.energy_distance(bad, x),
    "fstat": lambda bad: metrics.feature_statistics(bad),
    "draw x0": lambda bad: particles.draw(FROZEN, bad, INDEX, S, T, seed=1),
    "draw c": lambda bad: particles.draw(FROZEN, x, bad, S, T, seed=1),
    "draw s": lambda bad: particles.draw(FROZEN, x, INDEX, bad, T, seed=1),
    "draw n": lambda bad: particles.draw(FROZEN, x, INDEX, S, T, seed=1, particles=bad),
    "draw seed": lambda bad: particles.draw(FROZEN, x, INDEX, S, T, seed=bad),
    "sc omega": lambda bad: losses.self_consistency_loss(DRAWN, bad),
    "sc targets": lambda bad: losses.self_consistency_loss(DRAWN, W, targets=bad),
    "l2": lambda bad: losses.l2_loss(DRAWN, bad),
    "gsm": lambda bad: losses.guided_score_matching_loss(DRAWN, bad),
    "marg omega": lambda bad: marginal.marginal_loss(DRAWN, bad),
    "marg group": lambda bad: marginal.marginal_loss(DRAWN, W, group=bad),
    "marg targets": lambda bad: marginal.marginal_loss(DRAWN, W, targets=bad),
    "marg unbiased": lambda bad: marginal.marginal_loss(DRAWN, W, unbiased=bad),
    "marg pg": lambda bad: marginal.marginal_loss(DRAWN, W, process_group=bad),
    "fit c": lambda bad: fit.fit_table(CURVE, bad, S, T, KNOTS, KNOTS_T),
    "fit s": lambda bad: fit.fit_table(CURVE, INDEX, bad, T, KNOTS, KNOTS_T),
    "fit knots": lambda bad: fit.fit_table(CURVE, INDEX, S, T, bad, KNOTS_T),
    "fit curve": lambda bad: fit.fit_table(bad, INDEX, S, T, KNOTS, KNOTS_T),
    "fiti t": lambda bad: fit.fit_interval(CURVE, bad, KNOTS),
    "fiti edges": lambda bad: fit.fit_interval(CURVE, T, bad),
    "reward omega": lambda bad: reward.reward_loss(DRAWN, bad, lambda x, c: x.flatten(1).sum(1)),
    "bb omega": lambda bad: reward.black_box_reward_loss(DRAWN, bad, lambda x, c: x.flatten(1).sum(1)),
    "times n": lambda bad: objective.sample_times(bad),
    "penergy unb": lambda bad: objective.particle_energy(xp, xp, unbiased=bad),
    "table v": lambda bad: lgd.OmegaTable(bad, KNOTS, KNOTS_T),
    "table k": lambda bad: lgd.OmegaTable(TABLE.values, bad, KNOTS_T),
    "table c": lambda bad: TABLE.at(bad, S, T),
    "table s": lambda bad: TABLE.at(INDEX, bad, T),
    "feedback b": lambda bad: Feedback(bad, pi=0.5),
    "feedback pi": lambda bad: Feedback(3, pi=bad),
    "discrete": lambda bad: lgd.Discrete(bad),
    "minimize unb": lambda bad: CURVE.minimize(unbiased=bad),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_refused_by_name(name, kind):
    """Some of these arguments are valid; a TypeError or ValueError names each of the others."""
    try:
        CALLS[name](BAD[kind])
    except (TypeError, ValueError) as error:
        assert "`" in str(error)


FLAGS = ("combine moments", "combine wide", "mmd unbiased", "mmd tt", "mmd batched", "energy unbiased", "marg unbiased")


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name):
    for bad in ("x", 1, None, torch.ones(2)):
        with pytest.raises(TypeError, match=rf"is a {type(bad).__name__}, expected True or False"):
            CALLS[name](bad)


@pytest.mark.parametrize(
    "name", ["plan index", "plan x", "plan cond", "plan kept", "curve group", "fit c", "mmd_test seed"]
)
def test_what_had_no_attribute_is_a_type_error(name):
    for bad in ("x", 1.5, {}, object()):
        with pytest.raises(TypeError, match=rf"is a {type(bad).__name__}, expected"):
            CALLS[name](bad)


def test_an_index_of_another_kind():
    for index in (torch.ones(()), torch.ones(2, 2, dtype=torch.int64), True):
        with pytest.raises(TypeError, match=r"StepPlan.step: `index` is .*, expected"):
            PLAN.step(index, x, x)
    assert torch.equal(PLAN.step(torch.tensor(1), x, x)[0], PLAN.step(1, x, x)[0])
