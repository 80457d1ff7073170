"""Test calls under default dtypes, traces, profilers, subclasses and views, and batched and mixed backwards."""

import itertools

import pytest
import torch
from conftest import address

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules
from lgd_kernels.sampling import log_prob, solvers

NOISE = {"rtol": 1e-5, "atol": 1e-5}  # noise agrees to 1e-6 between implementations
LEVELS = testing.step_levels(3)


def score(cond, uncond, omega=0.5, **options):
    return lgd.guided_score(cond, uncond, omega, **options)


def step(cond, uncond, omega=0.5, **options):
    return lgd.guided_step(uncond, cond, uncond, omega, LEVELS, **options)


each_op = pytest.mark.parametrize("op", [score, step])


@pytest.fixture
def data(generator):
    return torch.randn(2, 3, 5, generator=generator).unbind(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_dtype_changes_nothing(dtype, data):
    expected = lgd.philox_normal((3, 1000), seed=1), step(*data, churn=1.0, seed=2)
    torch.set_default_dtype(dtype)
    try:
        found = lgd.philox_normal((3, 1000), seed=1), step(*data, churn=1.0, seed=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@each_op
@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_the_operator(op, data):
    traced = torch.jit.trace(lambda cond, uncond: op(cond, uncond), data, check_trace=False)
    other = [tensor + 1 for tensor in data]
    torch.testing.assert_close(traced(*other), op(*other))


@each_op
def test_the_profiler_sees_the_operator(op, data):
    with torch.profiler.profile() as profile:
        op(*data)
    assert any(event.key == f"lgd::guided_{op.__name__}" for event in profile.key_averages())


class Halved(torch.Tensor):
    """A subclass whose values are half of what it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [arg.held / 2 if isinstance(arg, cls) else arg for arg in args]
        return func(*args, **(kwargs or {}))


@each_op
def test_subclasses_are_asked(op, data):
    omega = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(op(*data, Halved(2 * omega)), op(*data, omega))


@each_op
def test_negative_views(op, data):
    negative = torch.complex(torch.zeros(3, 5), data[0]).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(op(negative, data[1]), op(-data[0], data[1]))
    omega = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    torch.testing.assert_close(op(*data, omega), op(*data, -1.0))


@each_op
def test_batched_backward(op, data):
    omega = torch.ones(3, requires_grad=True)
    upstream = torch.randn(4, 3, 5)
    batched = torch.autograd.grad(op(*data, omega), omega, upstream, is_grads_batched=True)[0]
    alone = [torch.autograd.grad(op(*data, omega), omega, one)[0] for one in upstream]
    torch.testing.assert_close(batched, torch.stack(alone))


@each_op
def test_forward_over_reverse(op, data):
    omega, tangents = torch.ones(3, requires_grad=True), []
    for impl in (None, "reference"):
        guided = op(*data, omega, impl=impl)
        with torch.autograd.forward_ad.dual_level():
            upstream = torch.autograd.forward_ad.make_dual(torch.ones(3, 5), 2 * torch.ones(3, 5))
            grad = torch.autograd.grad(guided, omega, upstream)[0]
            tangents.append(torch.autograd.forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("wide", range(4))
@pytest.mark.parametrize("trains", [(0, 1, 2, 3), (1,), (3, 4), (0, 1, 2, 3, 4)])
def test_gradients_of_mixed_dtypes(wide, trains, generator, poisoned):
    """With one float64 among float32, its gradient is float64, and every byte of an output is written."""
    tensors = [torch.randn(3, 50, generator=generator) for _ in range(4)] + [torch.rand(3, generator=generator)]
    tensors[wide] = tensors[wide].double()
    found = []
    for impl in (None, "reference"):
        leaves = [tensor.clone().requires_grad_(i in trains) for i, tensor in enumerate(tensors)]
        x, cond, uncond, noise, omega = leaves
        options = {"churn": 0.5, "noise": noise, "prediction": "flow", "impl": impl}
        stepped = lgd.guided_step(x, cond, uncond, omega, LEVELS, **options)
        found.append(torch.autograd.grad(stepped.square().sum(), [leaves[i] for i in trains]))
    assert any(address(grad) in poisoned for grad in found[0])
    for mine, reference, i in zip(*found, trains, strict=True):
        assert mine.dtype == tensors[i].dtype
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)  # omega's is a sum of float32


def test_score_gradients_of_mixed_dtypes(data):
    for wide in (0, 1):
        leaves = [tensor.double() if i == wide else tensor for i, tensor in enumerate(data)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        grads = torch.autograd.grad(score(*leaves, 0.5).sum(), leaves)
        assert torch.equal(grads[0], torch.full_like(leaves[0], 1.5))
        assert torch.equal(grads[1], torch.full_like(leaves[1], -0.5))


def test_expanded_seeds(data):
    """One seed expanded over the batch is a seed for each sample: all rows draw the same."""
    seeds = torch.tensor([5]).expand(3)
    z = lgd.philox_normal((3, 5), seeds)
    assert torch.equal(z[0], z[1]) and torch.equal(z, lgd.philox_normal((3, 5), seeds.clone()))
    assert torch.equal(step(*data, churn=1.0, seed=seeds), step(*data, churn=1.0, seed=seeds.clone()))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
X_LEVELS = lgd.RectifiedFlow().levels(torch.full((4,), 0.8), torch.full((4,), 0.3))
PARTICLES = X[:, None].repeat(1, 2, 1) * torch.tensor([1.0, -0.5])[:, None]
PLAN = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(1, 0, 4), churn=1.0)
DRAWN = {
    "combine": lambda seed, impl: lgd.combine((X,), torch.ones(4, 1), noise_scale=1.0, seed=seed, impl=impl),
    "step": lambda seed, impl: lgd.guided_step(X, X, X, 1.0, X_LEVELS, churn=1.0, seed=seed, impl=impl),
    "rule": lambda seed, impl: lgd.guided_step(
        X, X, X / 2, 1.0, X_LEVELS, churn=1.0, seed=seed, rule=rules.apg, impl=impl
    ),
    "plan": lambda seed, impl: PLAN.step(0, X, X, seed=seed, impl=impl)[0],
    "log_prob": lambda seed, impl: log_prob.step_with_log_prob(X, X, X, 1.0, X_LEVELS, seed=seed, impl=impl)[0],
    "energy": lambda seed, impl: lgd.guided_energy(
        PARTICLES,
        PARTICLES,
        X[:, None].expand(4, 2, 8),
        0.5,
        X_LEVELS,
        PARTICLES[:, :1],
        churn=1.0,
        seed=seed,
        impl=impl,
    ),
    "curve": lambda seed, impl: lgd.guided_energy_curve(
        PARTICLES, PARTICLES, X[:, None].expand(4, 2, 8), X_LEVELS, PARTICLES[:, :1], churn=1.0, seed=seed, impl=impl
    ).loss(torch.zeros(4)),
    "targets": lambda seed, impl: lgd.guided_energy(
        PARTICLES, PARTICLES, X[:, None].expand(4, 2, 8), 0.5, X_LEVELS, lgd.Renoise(X, 3, seed), impl=impl
    ),
    "philox": lambda seed, impl: lgd.philox_normal((4, 8), seed),
}


@pytest.mark.parametrize("op", DRAWN)
def test_seeds_of_any_stride(op, target):
    """A seed [B] is B seeds in any memory layout: expanded (stride 0), or strided."""
    if target.device != "cpu":
        pytest.skip("tensors of this test are on the CPU")
    for seeds in (torch.tensor([5]).expand(4), torch.tensor([5, 0, 6, 0, -7, 0, 2**40, 0])[::2]):
        found, expected = (DRAWN[op](one, target.impl) for one in (seeds, seeds.clone()))
        assert torch.equal(found, expected)
        torch.testing.assert_close(found, DRAWN[op](seeds.clone(), "reference"), **NOISE)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_numbers_of_any_stride(impl):
    """The same holds for every other tensor [B]."""
    one = torch.tensor([0.5]).expand(4)
    apart = torch.tensor([0.5, 9.0] * 4)[::2]
    index = torch.tensor([0, 9, 1, 9, 2, 9, 3, 9])[::2]
    table = lgd.OmegaTable(torch.rand(4, 2, 2), torch.tensor([0.0, 0.5]), torch.tensor([0.6, 1.0]))
    calls = {
        "omega": lambda w: lgd.guided_score(X, X / 2, w, impl=impl),
        "churn": lambda w: lgd.guided_step(X, X, X / 2, w, X_LEVELS, churn=w, seed=1, impl=impl),
        "levels": lambda w: lgd.guided_step(X, X, X / 2, 1.0, lgd.Levels(w, w, w, w, w * 0), impl=impl),
        "constant": lambda w: lgd.combine((X,), w[:, None], constant=w, noise_scale=w, seed=1, impl=impl),
        "rule": lambda w: lgd.guided_step(X, X, X / 2, w, X_LEVELS, churn=w, seed=1, rule=rules.apg, impl=impl),
        "plan": lambda w: PLAN.step(0, X, X, X / 2, w, seed=1, impl=impl)[0],
        "weights": lambda w: lgd.energy_mmd(X, X + 1, x_weights=w, y_weights=w, impl=impl),
        "times": lambda w: lgd.guided_score(X, X / 2, table.at(torch.arange(4), w / 2, w), impl=impl),
    }
    for numbers in (one, apart):
        for name, call in calls.items():
            torch.testing.assert_close(call(numbers), call(numbers.clone()), rtol=0, atol=0, msg=name)
    found = lgd.combine((X,), torch.ones(4, 1), source=index, impl=impl)
    assert torch.equal(found, X)
    looked_up = (table.at(c, one / 2, one) for c in (index, index.clone()))
    assert torch.equal(*(lgd.guided_score(X, X / 2, lookup, impl=impl) for lookup in looked_up))


def test_noise_without_churn_is_refused():
    """Noise without churn raises, as in combine a seed without noise_scale. An explicit churn of 0 ignores noise."""
    energy = lambda **noise: lgd.guided_energy(  # noqa: E731
        PARTICLES, PARTICLES, PARTICLES, 0.5, X_LEVELS, PARTICLES, **noise
    )
    curve = lambda **noise: lgd.guided_energy_curve(  # noqa: E731
        PARTICLES, PARTICLES, PARTICLES, X_LEVELS, PARTICLES, **noise
    ).loss(torch.zeros(4))
    by_rule = lambda **noise: lgd.guided_step(X, X, X, 1.0, X_LEVELS, rule=rules.cfg, **noise)  # noqa: E731
    step = lambda **noise: lgd.guided_step(X, X, X, 1.0, X_LEVELS, **noise)  # noqa: E731
    for call, noise in ((step, X), (by_rule, X), (energy, PARTICLES), (curve, PARTICLES)):
        for name, given in (("seed", 1), ("noise", noise)):
            with pytest.raises(ValueError, match=f"`{name}` was given without `churn`, expected both or neither"):
                call(**{name: given})
            assert torch.equal(call(**{name: given}, churn=0.0), call())


def test_the_raw_operator_takes_any_strides(data, generator):
    lookup = testing.omegas(3, generator)["table"]
    strided = lookup._replace(values=lookup.values.transpose(0, 2).contiguous().transpose(0, 2))
    levels = [LEVELS[0].repeat_interleave(2)[::2], *LEVELS[1:]]
    found = []
    for table, impl in itertools.product((lookup, strided), (None, "reference")):
        scalars = None, 0.0, list(table), levels, "x0", None, 0.0
        found.append(torch.ops.lgd.guided_step(data[0], *data, None, *scalars, None, None, 0, impl))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_compiled_table_gradient_is_the_same_every_time(generator):
    torch._dynamo.reset()
    x, cond, uncond = torch.randn(3, 20_000, 2, generator=generator).unbind(0)
    lookup, levels = testing.omegas(20_000, generator)["table"], testing.step_levels(20_000)
    values = lookup.values.detach().requires_grad_()

    def loss(values):
        return lgd.guided_step(x, cond, uncond, lookup._replace(values=values), levels).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    first, *others = (torch.autograd.grad(compiled(values), values)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def _zeros(shape, dtype=torch.float32):
    """Zero tensors of forward AD have no memory."""
    return torch._efficientzerotensor(shape, dtype=dtype)


ZEROS = {
    "score": (lambda z: lgd.guided_score(X, z, 0.5), (4, 8)),
    "step": (lambda z: lgd.guided_step(z, X, X / 2, 0.5, X_LEVELS), (4, 8)),
    "omega": (lambda z: lgd.guided_step(X, X, X / 2, z, X_LEVELS), (4,)),
    "churn": (lambda z: lgd.guided_step(X, X, X / 2, 1.0, X_LEVELS, churn=z, seed=1), (4,)),
    "gap": (lambda z: lgd.guided_step(X, X, X / 2, 1.0, X_LEVELS._replace(gap=z)), (4,)),
    "seed": (lambda z: lgd.guided_step(X, X, X / 2, 1.0, X_LEVELS, churn=1.0, seed=z.long()), (4,)),
    "combine": (lambda z: lgd.combine((X, z), torch.ones(4, 2)), (4, 8)),
    "moments of a combine": (lambda z: lgd.combine((X, z), torch.ones(4, 2), moments=True).dots, (4, 8)),
    "constant": (lambda z: lgd.combine((X,), torch.ones(4, 1), constant=z), (4,)),
    "moments": (lambda z: lgd.moments((X, z)).dots, (4, 8)),
    "rule": (lambda z: lgd.guided_step(X, X, z, 0.5, X_LEVELS, rule=rules.apg), (4, 8)),
    "plan": (lambda z: PLAN.step(0, X, z, noise=X)[0], (4, 8)),
    "log_prob": (lambda z: log_prob.step_with_log_prob(X, X, z, 0.5, X_LEVELS, x_s=X)[1], (4, 8)),
    "mmd": (lambda z: lgd.energy_mmd(X, z), (4, 8)),
    "threshold": (lambda z: lgd.dynamic_threshold(z), (4, 8)),
    "energy": (lambda z: lgd.guided_energy(PARTICLES, PARTICLES, z, 0.5, X_LEVELS, PARTICLES), (4, 2, 8)),
    "philox": (lambda z: lgd.philox_normal((4, 8), z.long()), (4,)),
}


@pytest.mark.parametrize("case", ZEROS)
def test_zeros_without_memory(case):
    """A tangent that is zero has no memory: its data_ptr is 0."""
    call, shape = ZEROS[case]
    assert torch.equal(call(_zeros(shape)), call(torch.zeros(shape)))


def test_zeros_without_memory_from_above():
    """An upstream gradient, and seeds as they are."""
    for op in (score, step):
        cond = X[:3, :5].clone().requires_grad_()
        grad = torch.autograd.grad(op(cond, cond / 2), cond, _zeros((3, 5)))[0]
        assert not grad.any()
    seeds = _zeros((4,), torch.int64)
    assert torch.equal(lgd.philox_normal((4, 8), seeds), lgd.philox_normal((4, 8), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.extension
def test_a_storage_that_was_freed_is_refused():
    """FSDP frees the memory of tensors like this one."""
    freed = X.clone()
    freed.untyped_storage().resize_(0)
    for call in (lambda: lgd.guided_score(X, freed, 0.5), lambda: lgd.combine((X, freed), torch.ones(4, 2))):
        with pytest.raises(ValueError, match="has elements but no memory"):
            call()


@pytest.mark.parametrize("nan_first", [True, False])
def test_nan_is_refused_wherever_it_stands(nan_first, data):
    values = torch.tensor([torch.nan, 0.5, 0.5] if nan_first else [0.5, 0.5, torch.nan])
    with pytest.raises(ValueError, match=r"`churn` is .*nan.*, expected values in \[0, 1\]"):
        step(*data, churn=values, seed=0)
    with pytest.raises(ValueError, match="`levels.gap` is nan in one sample"):
        lgd.guided_step(*data, data[0], 0.5, LEVELS._replace(gap=values))


def test_noise_that_is_multiplied_by_0_is_not_looked_at(data):
    noise = torch.full((3, 5), torch.nan)
    for impl in (None, "reference"):
        assert torch.equal(step(*data, churn=0.0, noise=noise, impl=impl), step(*data, impl=impl))


@pytest.mark.extension
def test_half_subnormals_survive_flushing(data):
    tiny = torch.tensor([[2.0**-24, 2.0**-20, -(2.0**-15), 1.0]], dtype=torch.float16)
    assert torch.set_flush_denormal(True)
    try:
        found = lgd.guided_score(tiny, tiny * 0, 1.0, impl="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, 2 * tiny)


REFUSED = {
    "none": (
        lambda c, u: lgd.guided_step(c, c, None, 0.5, LEVELS),
        TypeError,
        "`uncond` is a NoneType.*pass cond",
    ),
    "none score": (lambda c, u: lgd.guided_score(c, None, 0.5), TypeError, "`uncond` is a NoneType"),
    "sparse": (lambda c, u: lgd.guided_score(c.to_sparse(), u, 0.5), TypeError, "`cond` has layout torch.sparse_coo"),
    "table": (lambda c, u: lgd.guided_score(c, u, "x"), TypeError, r"`omega` is a str.*OmegaTable.at\(c, s, t\)"),
    "omega column": (lambda c, u: score(c, u, torch.ones(3, 1)), ValueError, r"omega.flatten\(\)"),
    "omega float8": (
        lambda c, u: score(c, u, torch.ones(3).to(torch.float8_e4m3fn)),
        TypeError,
        "`omega` has dtype torch.float8_e4m3fn, expected float32",
    ),
    "first_sample": (
        lambda c, u: step(c, u, churn=1.0, seed=0, first_sample=-1),
        ValueError,
        "`first_sample` is -1, expected an index from 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, data):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(*data)
