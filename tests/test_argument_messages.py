"""Errors about arguments: sparse tensors and arrays are refused by name, and the function named is the one called."""

import numpy as np
import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import metrics
from lgd_kernels.guidance import rules
from lgd_kernels.guidance.stateful import Feedback
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.sampling import log_prob, sampler, solvers

X, C, U = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
W, INDEX, SEEDS = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 0]), torch.arange(3)
FLOW = lgd.RectifiedFlow()
L = FLOW.levels(torch.full((3,), 0.8), torch.full((3,), 0.3))
TIMES, SIGMAS = torch.linspace(0.9, 0, 4), torch.tensor([3.0, 1.0, 0.1, 0.0])
TABLE = lgd.OmegaTable(torch.ones(2, 3, 3), W, W)
PLAN = solvers.one_step(FLOW, TIMES)
CURVE = lgd.guided_energy_curve(X[:, None], C[:, None], U[:, None], L, X[:, None])
NETWORK = OmegaNetwork(FLOW, classes=2, hidden=4)
STEP, TWO = torch.zeros(3, dtype=torch.bool), torch.ones(3, 2)
DENSE = {  # argument, a good value of it, the call
    "score omega": ("omega", W, lambda v: lgd.guided_score(C, U, v)),
    "score rule omega": ("omega", W, lambda v: lgd.guided_score(C, U, v, rule=rules.tcfg)),
    "step churn": ("churn", W, lambda v: lgd.guided_step(X, C, U, 1.0, L, churn=v, seed=1)),
    "step seed": ("seed", SEEDS, lambda v: lgd.guided_step(X, C, U, 1.0, L, churn=1.0, seed=v)),
    "step levels": ("levels.gap", L.gap, lambda v: lgd.guided_step(X, C, U, 1.0, L._replace(gap=v))),
    "step lookup": ("omega.s", W, lambda v: lgd.guided_score(C, U, TABLE.at(INDEX, W, W)._replace(s=v))),
    "combine coefficients": ("coefficients", TWO, lambda v: lgd.combine((C, U), v)),
    "combine constant": ("constant", W, lambda v: lgd.combine((C, U), TWO, constant=v)),
    "combine noise_scale": ("noise_scale", W, lambda v: lgd.combine((C, U), TWO, noise_scale=v, seed=1)),
    "combine source": ("source", INDEX, lambda v: lgd.combine((C, U), TWO, source=v)),
    "energy target": ("target", X[:, None], lambda v: lgd.guided_energy(*(X[:, None],) * 3, 0.5, L, v, lam=0.0)),
    "energy x0": (
        "target.x0",
        X,
        lambda v: lgd.guided_energy(*(X[:, None],) * 3, 0.5, L, lgd.Renoise(v, 2, 1), lam=0.0),
    ),
    "curve omega": ("omega", W, lambda v: CURVE.loss(v, lam=0.0)),
    "curve group": ("group", INDEX, lambda v: CURVE.minimize(lam=0.0, group=v)),
    "mmd x": ("x", C, lambda v: lgd.energy_mmd(v, U)),
    "mmd y_weights": ("y_weights", W, lambda v: lgd.energy_mmd(C, U, y_weights=v)),
    "median": ("x", C, lambda v: lgd.median_bandwidth(v)),
    "statistics": ("x", C, lambda v: metrics.feature_statistics(v)),
    "frechet": ("y", C, lambda v: metrics.frechet_distance(C, v)),
    "philox seed": ("seed", SEEDS, lambda v: lgd.philox_normal((3, 2), v)),
    "eta": ("eta", W, lambda v: lgd.churn_from_eta(v, L)),
    "log_prob churn": ("churn", W, lambda v: log_prob.step_with_log_prob(X, C, U, 0.5, L, churn=v, seed=1)),
    "one_step times": ("times", TIMES, lambda v: solvers.one_step(FLOW, v)),
    "one_step to": ("to", TIMES / 2, lambda v: solvers.one_step(FLOW, TIMES, to=v)),
    "one_step churn": ("churn", W, lambda v: solvers.one_step(FLOW, TIMES, churn=v)),
    "heun sigmas": ("sigmas", SIGMAS, lambda v: solvers.edm_heun(v)),
    "first_order": ("first_order", STEP, lambda v: solvers.dpm_solver_2m(FLOW, TIMES, first_order=v)),
    "plan index": ("index", INDEX, lambda v: PLAN.step(v, X, C)),
    "plan omega": ("omega", W, lambda v: PLAN.step(0, X, C, U, v)),
    "sample omega": ("omega", W, lambda v: sampler.sample(lambda x, t, c: x, X, PLAN, C, U, v)),
    "levels": ("t", W, lambda v: FLOW.levels(v, W)),
    "discrete": ("alphas_cumprod", W.flip(0), lambda v: lgd.Discrete(v)),
    "table values": ("values", TABLE.values, lambda v: lgd.OmegaTable(v, W, W)),
    "table knots": ("t_knots", W, lambda v: lgd.OmegaTable(TABLE.values, W, v)),
    "table c": ("c", INDEX, lambda v: TABLE.at(v, W, W)),
    "table t": ("t", W, lambda v: TABLE.at(INDEX, W, v)),
    "network s": ("s", W, lambda v: NETWORK(INDEX, v, W)),
    "bake": ("s_knots", W, lambda v: NETWORK.bake(v, W)),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_sparse_tensor_is_refused_by_name(name):
    argument, good, call = DENSE[name]
    call(good)
    with pytest.raises((TypeError, ValueError), match=rf"`{argument}` has layout torch.sparse_coo, .*to_dense\(\)"):
        call(good.to_sparse())


ONES = np.ones(2)  # comparisons of arrays are arrays, without a truth value
CHOICES = {
    "guided_step: `prediction`": lambda v: lgd.guided_step(X, C, U, 1.0, L, prediction=v),
    "guided_step: `rule_space`": lambda v: lgd.guided_step(X, C, U, 1.0, L, rule_space=v),
    "guided_step: `impl`": lambda v: lgd.guided_step(X, C, U, 1.0, L, impl=v),
    "guided_score: `impl`": lambda v: lgd.guided_score(C, U, 1.0, rule=rules.tcfg, impl=v),
    "StepPlan.step: `impl`": lambda v: PLAN.step(0, X, C, noise=X, impl=v),
    "sample: `impl`": lambda v: sampler.sample(lambda x, t, c: x, X, PLAN, C, impl=v),
    "sample: `omega`": lambda v: sampler.sample(lambda x, t, c: x, X, PLAN, C, U, v),
    "step_with_log_prob: `reduction`": lambda v: log_prob.step_with_log_prob(X, C, U, 0.5, L, seed=1, reduction=v),
    "step_with_log_prob: `impl`": lambda v: log_prob.step_with_log_prob(X, C, U, 0.5, L, seed=1, impl=v),
    "energy_mmd: `precision`": lambda v: lgd.energy_mmd(C, U, precision=v),
    "unipc: `variant`": lambda v: solvers.unipc(FLOW, TIMES, variant=v),
    "edm_euler: `after`": lambda v: solvers.edm_euler(SIGMAS, after=v),
    "edm_heun: `prediction`": lambda v: solvers.edm_heun(SIGMAS, prediction=v),
    "dpm_solver_2m: `stochastic`": lambda v: solvers.dpm_solver_2m(FLOW, TIMES, stochastic=v),
    "OmegaTable: `prediction`": lambda v: lgd.OmegaTable(TABLE.values, W, W, prediction=v),
    "OmegaNetwork: `initial`": lambda v: OmegaNetwork(FLOW, initial=v),
    "Discrete: `dtype`": lambda v: lgd.Discrete(W.flip(0), dtype=v),
    "Feedback: `w_max`": lambda v: Feedback(3, pi=0.5, w_max=v),
}


@pytest.mark.parametrize("said", CHOICES)
def test_an_array_where_a_choice_is_expected(said):
    with pytest.raises((TypeError, ValueError), match=f"^{said} is "):
        CHOICES[said](ONES)


NAMES = {
    "median_bandwidth: `x` is a float": lambda: lgd.median_bandwidth(0.0),
    "energy_distance: `x` is a float": lambda: metrics.energy_distance(0.0, C),
    "energy_distance: `impl` is 'gpu'": lambda: metrics.energy_distance(C, U, impl="gpu"),
    "mmd_test: `y` is a list": lambda: metrics.mmd_test(C, [1]),
    "mmd_test: `kernel` is a str": lambda: metrics.mmd_test(C, U, kernel="rbf"),
    "mmd_test: `seed` is ": lambda: metrics.mmd_test(C, U, seed=2**63),
    "kernel_inception_distance: `x` is a NoneType": lambda: metrics.kernel_inception_distance(None, C),
    "kernel_inception_distance: `kernel` is a str": lambda: metrics.kernel_inception_distance(
        C, U, subset_size=2, kernel="rbf"
    ),
    "feature_statistics: `x` has dtype torch.complex64": lambda: metrics.feature_statistics(C + 1j),
    "frechet_distance: `x.mean` is a list": lambda: metrics.frechet_distance(
        metrics.FeatureStatistics([0.0], torch.ones(1, 1)), C
    ),
    "guided_step: `impl` is a float": lambda: lgd.guided_step(X, C, U, 1.0, L, rule=rules.tcfg, impl=1.0),
    "guided_step: `impl` is 'gpu'": lambda: lgd.guided_step(X, C, U, 1.0, L, rule=rules.tcfg, impl="gpu"),
    "guided_step: `first_sample` is -1": lambda: lgd.guided_step(X, C, U, 1.0, L, churn=1.0, noise=X, first_sample=-1),
    "guided_step: `first_sample` is a NoneType": lambda: lgd.guided_step(X, C, U, 1.0, L, first_sample=None),
    "combine: `first_sample` is a float": lambda: lgd.combine((C, U), TWO, first_sample=1.5),
    "one_step: `times` has dtype torch.complex64": lambda: solvers.one_step(FLOW, TIMES + 0j),
    "edm_heun: `s_churn` is a complex": lambda: solvers.edm_heun(SIGMAS, s_churn=1j),
    "StepPlan.step: `rule` is a str": lambda: PLAN.step(0, X, C, U, rule="cfg"),
    "sample: `rule` is a str": lambda: sampler.sample(lambda x, t, c: x, X, PLAN, C, U, rule="cfg"),
    "sample: `denoiser` is a NoneType": lambda: sampler.sample(None, X, PLAN, C),
    "sample: `callback` is a str": lambda: sampler.sample(lambda x, t, c: x, X, PLAN, C, callback="x"),
    "sample: `seed` is a str": lambda: sampler.sample(lambda x, t, c: x, X, PLAN, C, seed="x"),
    "Feedback.update: `x` is a NoneType": lambda: Feedback(3, pi=0.5).update(X, None, C, U, L),
    "Feedback: `w_max` is a NoneType": lambda: Feedback(3, pi=0.5, w_max=None),
    "OmegaNetwork: `c` is a list": lambda: NETWORK([1, 0, 1], W, W),
    "OmegaNetwork: `s` is a float": lambda: NETWORK(INDEX, 0.5, W),
    "OmegaNetwork: `t` has dtype torch.complex64": lambda: NETWORK(INDEX, W, W + 0j),
    "OmegaNetwork: hidden is None": lambda: OmegaNetwork(FLOW, hidden=None),
    "OmegaNetwork.bake: `s_knots` is a list": lambda: NETWORK.bake([0.0, 1.0], W),
    "OmegaNetwork.bake: `t_knots` has shape": lambda: NETWORK.bake(W, W[0]),
}


@pytest.mark.parametrize("said", NAMES)
def test_the_message_names_the_function_that_was_called(said):
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        NAMES[said]()


def test_numbers_beyond_int64():
    """Integers, which torch compares with tensors as int64 only."""
    plain, long = (solvers.edm_euler(SIGMAS, s_churn=1.0, s_tmax=most) for most in (1e30, 10**30))
    assert torch.equal(plain.table, long.table)
    scales = [lgd.combine((C,), TWO[:, :1], noise_scale=one, seed=1) for one in (2.0**64, 2**64)]
    assert torch.equal(*scales)


def test_kernel_inception_distance_of_single_numbers():
    """Features [n] are features [n, 1], as for the other metrics."""
    alone, rows = (metrics.kernel_inception_distance(x, x + 1, subset_size=2).value for x in (W, W[:, None]))
    assert torch.equal(alone, rows)
