"""Gradients of guided_energy, and its manners under PyTorch's transforms and compiler."""

import functools
import itertools

import pytest
import torch
from conftest import Target
from energy import defined, dtypes, guided_energy, interpreted, problem, truth
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.guided_energy import op
from lgd_kernels.ops.guided_energy.structs import EnergyCall, EnergyOptions, GuidedEnergy, GuidedEnergyBackward
from lgd_kernels.runtime.levels import omega_at, table_gradient

REFERENCE = Target("reference", "cpu")
EXPECTED = {"beta": 2.0, "lam": 0.0}
each_kind = pytest.mark.parametrize("kind", ["tensor", "renoise", "expected"])
each_impl = pytest.mark.parametrize("impl", ["cpu", "reference"])


def leaves_of(args, options):
    """x, cond, uncond, omega, the target's tensor and noise."""
    *data, omega, _, y = args
    return *data, omega, y if isinstance(y, torch.Tensor) else y.x0, options["noise"]


def with_leaves(args, options, x, cond, uncond, omega, y, noise):
    levels, target = args[4:]
    target = y if isinstance(target, torch.Tensor) else target._replace(**{"x0": y})
    return (x, cond, uncond, omega, levels, target), options | {"noise": noise}


def energy_of_leaves(args, options, call=lgd.guided_energy, **more):
    def of(*leaves):
        changed, others = with_leaves(args, options, *leaves)
        return call(*changed, **others, **more)

    return of


def some(kind, generator, dtype=torch.float64, m=3, k=2, row=5, **options):
    options = EXPECTED if kind == "expected" else {"beta": 1.5} | options
    return problem(generator, m, k, row, dtype, kind=kind, noise=True, **options)


def wanting(leaves, which=range(6)):
    return [leaf.detach().clone().requires_grad_(i in which) for i, leaf in enumerate(leaves)]


@each_kind
@pytest.mark.parametrize("row", [1, 7, (3, 5), 1031], ids=str)
def test_gradients_agree_with_float64(target, kind, row, generator):
    for dtype, prediction in itertools.product(dtypes(target), ("v",) if interpreted(target) else ("x0", "v")):
        if dtype == torch.float64 and kind == "renoise":
            continue  # normals of float32 agree to 1e-6
        args, options = some(kind, generator, dtype, row=row, prediction=prediction)
        upstream = torch.rand(3, generator=generator, dtype=args[3].dtype) + 0.5

        def grads(on, promote, args=args, options=options, upstream=upstream):
            adapt = testing.promoted if promote else lambda value: value
            args = [adapt(value) for value in args]
            options = {name: adapt(value) for name, value in options.items()}
            args[4:] = (testing.moved(value, on.device) for value in args[4:])
            options = {name: testing.moved(value, on.device) for name, value in options.items()}
            leaves = wanting(testing.moved(leaf, on.device) for leaf in leaves_of(args, options))
            loss = energy_of_leaves(args, options, impl=on.impl)(*leaves)
            return torch.autograd.grad(loss, leaves, adapt(upstream).to(on.device))

        kernel, same, exact = grads(target, False), grads(REFERENCE, False), grads(REFERENCE, True)
        for name, k, r, t in zip(("x", "cond", "uncond", "omega", "y", "noise"), kernel, same, exact, strict=True):
            if name == "omega" and kind != "expected":
                testing.assert_sum(k, t, upstream * truth(*args, **options)[3])
            elif name != "omega":
                testing.assert_elementwise(k, r, t, 1e-6 * t.abs().max().item() if kind == "renoise" else 0.0)


def test_gradients_are_those_of_the_definition(generator):
    """The reference, which is the truth above, against other ops' references."""
    for kind, prediction in itertools.product(("tensor", "renoise"), ("x0", "flow")):
        args, options = some(kind, generator, prediction=prediction, lam=0.5, unbiased=False)
        leaves = wanting(leaves_of(args, options))
        losses = [energy_of_leaves(args, options, call)(*leaves) for call in (lgd.guided_energy, defined)]
        torch.testing.assert_close(*losses)
        for found, expected in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in losses), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # its own noise is float32


@pytest.mark.extension
@each_impl
@each_kind
def test_gradcheck_twice_and_forward_mode(impl, kind, generator):
    args, options = some(kind, generator, row=3, prediction="v")
    leaves = wanting(leaves_of(args, options))
    call = energy_of_leaves(args, options, impl=impl)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    call = energy_of_leaves(args, options)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.extension
@each_impl
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_omega_alone_has_two_derivatives_without_the_data(impl, beta, generator):
    args, options = problem(generator, 3, 2, 5, torch.float64, noise=True, beta=beta)
    omega, others = args[3].requires_grad_(), [value.detach() for value in args[:3]]

    def call(omega):
        return lgd.guided_energy(*others, omega, *args[4:], **options, impl=impl)

    assert torch.autograd.gradcheck(call, omega) and torch.autograd.gradgradcheck(call, omega)
    curve = lgd.guided_energy_curve(*others, *args[4:], churn=options["churn"], noise=options["noise"], impl=impl)
    slope = torch.autograd.grad(call(omega).sum(), omega, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), omega)[0]
    torch.testing.assert_close(slope, curve.grad(omega, beta).detach())
    torch.testing.assert_close(bend, curve.hessian(omega, beta).detach())


@pytest.mark.extension
@each_impl
def test_double_backward_through_the_table(impl, generator):
    args, options = problem(generator, 3, 2, 5, torch.float64, noise=True)
    lookup = testing.promoted(testing.omegas(3, generator)["table"])

    def call(values, x):
        looked_up = lookup._replace(values=values)
        return lgd.guided_energy(x, *args[1:3], looked_up, *args[4:], **options, impl=impl)

    for x in (args[0], args[0].clone().requires_grad_()):
        inputs = (lookup.values.detach().requires_grad_(), x)
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["half", "table"])
def test_gradient_of_every_omega(target, kind, generator):
    """In its dtype; a table's is that of [B], summed over cells."""
    args, _ = problem(generator, 3, 4, 300)
    omega = testing.moved(testing.omegas(3, generator)[kind], target.device)
    at = (omega if kind == "half" else omega_at(omega, omega.t)).detach().float().requires_grad_()
    expected = torch.autograd.grad(guided_energy(target, *args[:3], at, *args[4:]).sum(), at)[0]
    leaf = (omega if kind == "half" else omega.values).detach().requires_grad_()
    omega = leaf if kind == "half" else omega._replace(values=leaf)
    found = torch.autograd.grad(guided_energy(target, *args[:3], omega, *args[4:]).sum(), leaf)[0]
    if kind == "table":
        expected = table_gradient(omega, expected)
    assert found.dtype == leaf.dtype
    torch.testing.assert_close(found.float(), expected, rtol=1e-3 if kind == "half" else 1e-5, atol=1e-5)


@each_kind
def test_only_what_requires_grad_gets_one(target, kind, generator):
    args, options = some(kind, generator, torch.float32)
    args, options = [testing.moved(v, target.device) for v in args], {
        name: testing.moved(value, target.device) for name, value in options.items()}  # fmt: skip
    every = wanting(leaves_of(args, options))
    expected = torch.autograd.grad(energy_of_leaves(args, options, impl=target.impl)(*every).sum(), every)
    for wanted in [(0, 3), (1, 4), (3, 4, 5)] + [(i,) for i in range(6) if not interpreted(target)]:
        leaves = wanting(leaves_of(args, options), wanted)
        energy_of_leaves(args, options, impl=target.impl)(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(6)]
        for i in wanted:
            assert torch.equal(leaves[i].grad, expected[i])


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.75, 2.0])
def test_points_that_coincide_have_slope_0(target, beta, generator):
    """Particles on each other and on a target, to every argument, once and twice; no NaN."""
    args, options = problem(generator, 2, 2, 9, noise=True, batch=2, beta=beta)
    for tensor in (*args[:3], options["noise"]):
        tensor[:] = tensor[0, 0]
    args, options = [testing.moved(v, target.device) for v in args], {
        name: testing.moved(value, target.device) for name, value in options.items()}  # fmt: skip
    args[3][:] = 1.0
    options["churn"] = 0.0
    args[4] = testing.moved(lgd.RectifiedFlow().levels(torch.ones(2), torch.zeros(2)), target.device)
    args[5] = (2 * args[1] - args[2]).clone()  # x_s = cond + (cond - uncond)
    leaves = wanting(leaves_of(args, options))
    loss = energy_of_leaves(args, options, impl=target.impl)(*leaves)
    assert torch.equal(loss.cpu(), torch.zeros(2))
    grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    bends = torch.autograd.grad(sum(grad.square().sum() + grad.sum() for grad in grads), leaves, allow_unused=True)
    for bend in bends:
        assert bend is None or (bend.isfinite().all() and (beta == 2 or not bend.any()))
    grads = torch.autograd.grad(energy_of_leaves(args, options, impl=target.impl)(*leaves).sum(), leaves)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@each_kind
def test_expanded_upstream_and_batches_of_them(target, kind, generator):
    args, options = some(kind, generator, torch.float32)
    args, options = [testing.moved(v, target.device) for v in args], {
        name: testing.moved(value, target.device) for name, value in options.items()}  # fmt: skip
    leaves = wanting(leaves_of(args, options))

    def grads(upstream, **how):
        loss = energy_of_leaves(args, options, impl=target.impl)(*leaves)
        return torch.autograd.grad(loss, leaves, upstream.to(target.device), **how)

    upstream = torch.randn(2 if interpreted(target) else 4, 3, generator=generator)
    upstream[0] = 0.5
    alone = [grads(one) for one in upstream]
    for found, expected in zip(grads(torch.tensor(0.5).expand(3)), alone[0], strict=True):
        assert torch.equal(found, expected)
    for found, *expected in zip(grads(upstream, is_grads_batched=True), *alone, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_forward_over_reverse(generator):
    """Upstream with a tangent: the gradient has one, in every argument."""
    args, options = some("tensor", generator)
    tangents = []
    for impl in (None, "reference"):
        leaves = wanting(leaves_of(args, options))
        loss = energy_of_leaves(args, options, impl=impl)(*leaves)
        with torch.autograd.forward_ad.dual_level():
            upstream = torch.autograd.forward_ad.make_dual(torch.ones(3).double(), torch.arange(3).double())
            grads = torch.autograd.grad(loss, leaves, upstream)
            tangents.append([torch.autograd.forward_ad.unpack_dual(grad).tangent for grad in grads])
    for mine, expected in zip(*tangents, strict=True):
        torch.testing.assert_close(mine, expected)


def test_transforms_go_through_the_reference(generator):
    args, options = some("tensor", generator)
    leaves = [leaf.detach() for leaf in leaves_of(args, options)]
    call = energy_of_leaves(args, options)
    expected = torch.autograd.grad(call(*(every := wanting(leaves))).sum(), every)
    found = torch.func.grad(lambda *leaves: call(*leaves).sum(), tuple(range(6)))(*leaves)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)
    omegas = torch.stack((leaves[3], leaves[3] + 1))

    def slope(omega):
        return torch.func.grad(lambda omega: call(*leaves[:3], omega, *leaves[4:]).sum())(omega)

    torch.testing.assert_close(torch.func.vmap(slope)(omegas)[0], expected[3])
    along = (torch.ones(3).double(),)
    tangent = torch.func.jvp(lambda omega: call(*leaves[:3], omega, *leaves[4:]), (leaves[3],), along)[1]
    torch.testing.assert_close(tangent, expected[3])
    for options in ({"churn": 1.0, "seed": 1}, {"target": lgd.Renoise(leaves[0][:, 0], 2, 1)}):
        arguments = {"levels": args[4], "target": args[5]} | options
        with pytest.raises(ValueError, match="`.*seed` under vmap .* pass"):
            torch.func.vmap(lambda x: lgd.guided_energy(x, *leaves[1:4], **arguments), randomness="error")(  # noqa: B023
                leaves[0].expand(2, -1, -1, -1)
            )


@pytest.mark.extension
def test_operator_manners(generator):
    args, options = some("tensor", generator)
    x, cond, uncond, omega, levels, y = args
    churn, noise, table = options["churn"], options["noise"], testing.omegas(3, generator)["table"]
    m, k, x0, seeds = 3, 2, y[:, 0], torch.arange(3)
    weights = torch.rand(3, m * k + m * (m - 1) // 2, generator=generator).double()
    weights = weights[:, : m * k].view(3, m, k), weights[:, m * k :]
    energy = functools.partial(GuidedEnergy.of, x, cond, uncond)
    calls = [
        energy(omega, levels, y, prediction="v", churn=churn, noise=noise),
        energy(0.5, levels, lgd.Renoise(x0, k, 7), churn=1.0, seed=5, first_sample=2),
        energy(table, levels, lgd.Renoise(x0, k, seeds), prediction="flow", churn=churn, seed=seeds),
    ]
    for a in calls:
        call = EnergyCall(a, EnergyOptions(1.5, 1.0, True))
        torch.library.opcheck(torch.ops.lgd.guided_energy, (*op.raw.flatten(call), None))
        wanted = [True, a.noise is None, True, a.noise is not None, True]
        backward = op.raw_backward.flatten(GuidedEnergyBackward(a, *weights, wanted))
        torch.library.opcheck(torch.ops.lgd.guided_energy_backward, (*backward, None))
    call = EnergyCall(energy(table, levels, lgd.Expected(x0), churn=0.0), EnergyOptions(2.0, 0.0, True))
    torch.library.opcheck(torch.ops.lgd.guided_energy, (*op.raw.flatten(call), None))


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def energy(x, cond, uncond, omega, t, s, churn, seed, y, x0):
        levels = lgd.VPCosine().levels(t, s)
        given = lgd.guided_energy(x, cond, uncond, omega, levels, y, churn=churn, seed=seed, prediction="v")
        return given + lgd.guided_energy(x, cond, uncond, omega, levels, lgd.Renoise(x0, 3, seed), beta=1.0)

    compiled, compiled_once = torch.compile(energy, backend=counter, fullgraph=True, dynamic=True), 0
    for i in range(6):
        batch, m, k, row = 5 + i, 3 + i % 3, 2 + i % 2, 10 + 3 * i
        x, cond, uncond = (torch.randn(batch, m, row, generator=generator) for _ in range(3))
        y, t = torch.randn(batch, k, row, generator=generator), torch.linspace(0.5, 1.0, batch)
        arguments = (x, cond, uncond, 0.5 + i / 8, t, t - 0.25, 0.5 + i / 32, 100 + i, y, y[:, 0])
        torch.testing.assert_close(compiled(*arguments), energy(*arguments), rtol=1e-5, atol=1e-5)
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


@each_kind
def test_compiled_training(kind, generator):
    torch._dynamo.reset()
    args, options = some(kind, generator, torch.float32)
    lookup = testing.omegas(3, generator)["table"]
    leaves = [*wanting(leaves_of(args, options)), lookup.values.detach().requires_grad_()]

    def loss(*leaves):
        once = energy_of_leaves(args, options)(*leaves[:6])
        x, cond, uncond, _, y, noise = leaves[:6]
        looked_up = lookup._replace(values=leaves[6])
        return (once + energy_of_leaves(args, options)(x, cond, uncond, looked_up, y, noise)).square().sum()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for f, e in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(f, e)


def test_inference_mode_meta_and_autocast(generator):
    args, options = some("renoise", generator, torch.float32)
    with torch.inference_mode():
        inferred = lgd.guided_energy(*args, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lgd.guided_energy(*args, **options)
    assert torch.equal(inferred, cast) and cast.dtype == torch.float32
    on_meta = [testing.moved(value, "meta") for value in args]
    options = {name: testing.moved(value, "meta") for name, value in options.items()}
    leaves = wanting(leaves_of(on_meta, options))
    loss = energy_of_leaves(on_meta, options)(*leaves)
    assert loss.shape == (3,) and loss.device.type == "meta"
    for grad, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype


@pytest.mark.filterwarnings("ignore")
def test_traces_and_profiles_show_the_operator(generator):
    args, _ = problem(generator, 3, 2, 5)
    with torch.profiler.profile() as profile:
        lgd.guided_energy(*args)
    assert any(event.key == "lgd::guided_energy" for event in profile.key_averages())
    traced = torch.jit.trace(lambda x, y: lgd.guided_energy(x, *args[1:5], y), (args[0], args[5]), check_trace=False)
    torch.testing.assert_close(
        traced(args[0] + 1, args[5] - 1), lgd.guided_energy(args[0] + 1, *args[1:5], args[5] - 1)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_dtype_changes_nothing(dtype, generator):
    args, options = problem(generator, 3, 2, 5, kind="renoise", noise=True)

    def both():
        curve = lgd.guided_energy_curve(*args[:3], *args[4:], **options)
        return [lgd.guided_energy(*args, **options, impl=impl) for impl in (None, "reference")] + [curve.minimize()]

    expected = both()
    torch.set_default_dtype(dtype)
    try:
        found = both()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_negative_views(generator):
    args, _ = problem(generator, 3, 2, 5)
    negative = torch.complex(torch.zeros_like(args[0]), args[0]).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(lgd.guided_energy(negative, *args[1:]), lgd.guided_energy(-args[0], *args[1:]))
