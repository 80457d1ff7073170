"""torch.set_default_device and set_default_dtype change no result: every internal tensor sets its device and dtype."""

import ast
import functools
from pathlib import Path

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import metrics
from lgd_kernels.guidance import rules
from lgd_kernels.guidance.stateful import Feedback, Momentum
from lgd_kernels.learn import fit, losses, marginal, objective, particles, reward
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.sampling import log_prob, sampler, solvers

PACKAGE = Path(lgd.__file__).parent
MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "from_numpy", "full", "Generator", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
ALLOWED = {
    "omega/forms.py",
    "learn/sources.py: from_numpy",
}  # modules, made where torch makes modules; always on the CPU
SOURCES = sorted(PACKAGE.rglob("*.py"))


def names_no_device(tree):
    """Yield functions of torch that make a tensor, called or passed on, without an explicit device."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in MAKERS and ast.unparse(node.value) == "torch"):
            continue
        call = calls.get(id(node))
        told = call and any(keyword.arg in ("device", None) for keyword in call.keywords)
        if not told and (call or node.attr != "Generator"):  # which is also a type
            yield node.attr, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_tensor_names_its_device(path):
    name = path.relative_to(PACKAGE).as_posix()
    found = names_no_device(ast.parse(path.read_text()))
    assert [one for one in found if name not in ALLOWED and f"{name}: {one[0]}" not in ALLOWED] == []


def test_the_search_finds_what_it_should():
    code = "torch.zeros(3)\ntorch.zeros(3, device=d)\nmap(torch.arange, s)\ntorch.full(**like)\nx.new_zeros(2)\n"
    tree = ast.parse(code + "def f(g: torch.Generator): torch.Generator()")
    assert sorted(names_no_device(tree)) == [("Generator", 6), ("arange", 3), ("zeros", 1)]


RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 6, generator=RANDOM), torch.randn(40, 6, generator=RANDOM) + 0.3
T, S, WEIGHTS = torch.full((40,), 0.8), torch.full((40,), 0.3), torch.rand(40, generator=RANDOM)
PARTICLES, INDEX = torch.randn(40, 2, 6, generator=RANDOM), torch.arange(40) % 2
LEVELS, FLOW, TIMES = lgd.RectifiedFlow().levels(T, S), lgd.RectifiedFlow(), torch.linspace(1, 0, 5)
SIGMAS = torch.tensor([80.0, 10.0, 2.0, 0.3, 0.0], dtype=torch.float64)
TABLE = lgd.OmegaTable(
    torch.rand(2, 3, 3, generator=RANDOM), torch.tensor([0.0, 0.2, 0.5]), torch.tensor([0.6, 0.8, 1.0])
)
FROZEN = Frozen(lambda x, t, c: x * 0.5 + c.float().view(-1, *(1,) * (x.ndim - 1)) * 0.1, FLOW, null=0)
DRAWN = particles.draw(FROZEN, X, INDEX, S, T, seed=3)
NETWORK = OmegaNetwork(FLOW, 2, hidden=8)
step = functools.partial(lgd.guided_step, X, Y, X * 0.5)


def gradients(call, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(call(*leaves).sum(), leaves)


def run(plan, **options):
    return sampler.sample(lambda x, t, c: x * 0.3 + 1, X, plan, 0, 1, 0.5, **options)


CALLS = {
    "philox_normal": lambda: lgd.philox_normal((4, 3), 7),
    "philox_normal seeds": lambda: lgd.philox_normal((40, 3), INDEX),
    "guided_score": lambda: lgd.guided_score(X, Y, 0.5),
    "guided_score reference": lambda: lgd.guided_score(X, Y, 0.5, impl="reference"),
    "guided_step": lambda: step(0.5, LEVELS, churn=0.5, seed=1),
    "guided_step reference": lambda: step(0.5, LEVELS, churn=0.5, seed=1, impl="reference"),
    "table": lambda: step(TABLE.at(INDEX, S, T), LEVELS),
    "table itself": lambda: TABLE(INDEX, S, T),
    "table gradient": lambda: gradients(lambda v: step(TABLE.at(INDEX, S, T)._replace(values=v), LEVELS), TABLE.values),
    "table of one condition": lambda: lgd.OmegaTable(TABLE.values[:1], TABLE.s_knots, TABLE.t_knots)(None, S, T),
    "gradients": lambda: gradients(lambda x, w: lgd.guided_step(x, Y, x, w, LEVELS), X, WEIGHTS),
    "combine": lambda: lgd.combine((X, Y), torch.stack((WEIGHTS, T), 1), noise_scale=2.0, seed=1, moments=True)[1:],
    "combine reference": lambda: lgd.combine((X,), T[:, None], noise_scale=2.0, seed=1, impl="reference"),
    "combine gradients": lambda: gradients(lambda x, k: lgd.combine((x, Y), k), X, torch.stack((WEIGHTS, T), 1)),
    "moments": lambda: lgd.moments((X, Y)),
    "dynamic_threshold": lambda: lgd.dynamic_threshold(X),
    **{
        f"rules.{name}": functools.partial(lambda rule: step(0.5, LEVELS, rule=rule), rule)
        for name, rule in {
            "apg": rules.apg,
            "rescale": functools.partial(rules.rescale, phi=0.7),
            "interval": functools.partial(rules.interval, t=0.3, low=0.1, high=0.7),
            "interval of tensors": functools.partial(rules.interval, t=T, low=0.8, high=0.9),
            "beta_cfg": functools.partial(rules.beta_cfg, progress=0.3),
            "mambo_g": rules.mambo_g,
            "momentum": Momentum(rules.cfg, 0.0),
        }.items()
    },
    "rule in x0 space": lambda: step(0.5, LEVELS, rule=rules.apg, rule_space="x0", prediction="flow"),
    "Feedback": lambda: [one := Feedback(40, pi=0.8), one.update(X, Y, X, Y, LEVELS), one.omega][-1],
    "step_with_log_prob": lambda: log_prob.step_with_log_prob(X, Y, X, 0.5, LEVELS, seed=1),
    "guided_energy": lambda: lgd.guided_energy(PARTICLES, PARTICLES, -PARTICLES, 0.5, LEVELS, lgd.Renoise(X, 2, 1)),
    "guided_energy reference": lambda: lgd.guided_energy(
        PARTICLES, PARTICLES, -PARTICLES, 0.5, LEVELS, lgd.Renoise(X, 2, 1), impl="reference"
    ),
    "guided_energy gradients": lambda: gradients(
        lambda x, w: lgd.guided_energy(x, PARTICLES, -x, w, LEVELS, PARTICLES), PARTICLES, WEIGHTS
    ),
    "guided_energy_curve": lambda: particles.curve(DRAWN).minimize(group=INDEX),
    "energy_mmd": lambda: lgd.energy_mmd(X, Y, x_weights=WEIGHTS),
    "energy_mmd reference": lambda: lgd.energy_mmd(X, Y, x_weights=WEIGHTS, impl="reference"),
    "energy_mmd gradients": lambda: gradients(lambda x: lgd.energy_mmd(x, Y, kernel=lgd.Gaussian((1.0,))), X),
    "energy_mmd with progress": lambda: lgd.energy_mmd(X, Y, progress=lambda *_: None),
    "median_bandwidth": lambda: lgd.median_bandwidth(X, Y),
    "energy_distance": lambda: metrics.energy_distance(X, Y),
    "mmd_test": lambda: metrics.mmd_test(X, Y, permutations=20)[:2],
    "kernel_inception_distance": lambda: metrics.kernel_inception_distance(X, Y, subsets=3, subset_size=10).value,
    "frechet_distance": lambda: metrics.frechet_distance(X, Y),
    "feature_statistics": lambda: metrics.feature_statistics(X)[1:],
    **{
        f"{type(schedule).__name__}": functools.partial(
            lambda schedule: [schedule.levels(T, S), schedule.log_snr(T), schedule.from_unit(T)], schedule
        )
        for schedule in (FLOW, lgd.VPCosine(), lgd.VPLinear.stable_diffusion(), lgd.EDM())
    },
    "Discrete": lambda: lgd.Discrete(torch.linspace(0.99, 0.01, 100, device="cpu", dtype=torch.float64)).levels(
        INDEX + 50, INDEX - 1
    ),
    "Discrete.ddpm": lambda: lgd.Discrete.ddpm().levels(INDEX + 50, INDEX - 1),
    "Discrete.stable_diffusion": lambda: lgd.Discrete.stable_diffusion().levels(INDEX + 50, INDEX - 1),
    "churn_from_eta": lambda: lgd.churn_from_eta(0.5, LEVELS),
    "one_step": lambda: run(solvers.one_step(FLOW, TIMES, churn=0.5), seed=1),
    "consistency": lambda: run(solvers.consistency(FLOW, TIMES), seed=1),
    "edm_euler": lambda: run(solvers.edm_euler(SIGMAS, s_churn=1.0), seed=1),
    "edm_heun": lambda: run(solvers.edm_heun(SIGMAS, s_churn=1.0), seed=1),
    "adams_bashforth": lambda: run(solvers.adams_bashforth(SIGMAS)),
    "dpm_solver_2m": lambda: run(solvers.dpm_solver_2m(FLOW, TIMES[:-1])),
    "deis": lambda: run(solvers.deis(FLOW, TIMES[:-1], order=3)),
    "unipc": lambda: run(solvers.unipc(FLOW, TIMES[:-1])),
    "plan, tensor index": lambda: solvers.one_step(FLOW, TIMES).step(INDEX, X, Y)[0],
    "draw": lambda: particles.draw(FROZEN, X, INDEX, S, T, seed=3)[5:8],
    "self_consistency_loss": lambda: losses.self_consistency_loss(DRAWN, WEIGHTS),
    "l2_loss": lambda: losses.l2_loss(DRAWN, WEIGHTS),
    "guided_score_matching_loss": lambda: losses.guided_score_matching_loss(DRAWN, WEIGHTS),
    "marginal_loss": lambda: marginal.marginal_loss(DRAWN, WEIGHTS, group=INDEX),
    "black_box_reward_loss": lambda: reward.black_box_reward_loss(
        DRAWN, WEIGHTS.clone().requires_grad_(), lambda x, c: x.flatten(1).sum(1)
    ),
    "sample_times": lambda: objective.sample_times(5, generator=torch.Generator(device="cpu").manual_seed(1)),
    "sample_s": lambda: objective.sample_s(T, generator=torch.Generator(device="cpu").manual_seed(1)),
    "fit_table": lambda: fit.fit_table(particles.curve(DRAWN), INDEX, S, T, TABLE.s_knots, TABLE.t_knots).values,
    "fit_constant": lambda: fit.fit_constant(particles.curve(DRAWN))(None, S, T).detach().float(),
    "fit_interval": lambda: fit.fit_interval(particles.curve(DRAWN), T, TIMES.flip(0))(None, S, T).detach().float(),
    "bake": lambda: NETWORK.bake(TABLE.s_knots, TABLE.t_knots)[0].values,
    "network": lambda: NETWORK(INDEX, S, T),
}


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (int, float)):
        return [torch.tensor(found, device="cpu", dtype=torch.float64)]
    return [one for part in found for one in flat(part)]


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_the_cpu_stay_there(name):
    """ "meta" stands for a GPU: a tensor made there by mistake has no values."""
    expected = flat(CALLS[name]())
    torch.set_default_device("meta")
    try:
        found = flat(CALLS[name]())
    finally:
        torch.set_default_device(None)
    for one, other in zip(found, expected, strict=True):
        assert one.device == other.device and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_default_dtype_changes_nothing(name, dtype):
    expected = flat(CALLS[name]())
    torch.set_default_dtype(dtype)
    try:
        found = flat(CALLS[name]())
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
