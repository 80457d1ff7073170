"""Gradients of guided_step, and its manners under PyTorch's transforms and compiler."""

import itertools

import pytest
import torch
from conftest import dtypes_of
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.levels import step_coefficients


@pytest.mark.parametrize("kind", ["per sample", "half", "table"])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 8209), (2, 3, 7, 11)], ids=str)
def test_gradients_agree_with_float64(target, shape, kind, generator):
    for dtype, prediction in itertools.product(dtypes_of(target), ("x0", "v")):
        data = [testing.sample(shape, dtype, generator) for _ in range(4)]
        upstream, levels = testing.sample(shape, dtype, generator), testing.step_levels(shape[0])
        omega = testing.omegas(shape[0], generator)[kind]
        churn = torch.rand(shape[0], generator=generator)

        def grads(impl, device, promote, data=data, omega=omega, upstream=upstream, levels=levels, churn=churn,
                  prediction=prediction):  # fmt: skip
            adapt = testing.promoted if promote else lambda value: value
            adapted = [testing.moved(adapt(v), device) for v in (*data, omega, upstream, levels, churn)]
            *leaves, w, d, levels, churn = adapted
            leaves = [tensor.detach().requires_grad_() for tensor in leaves]
            if isinstance(w, torch.Tensor):
                leaves.append(w.detach().requires_grad_())
                w = leaves[4]
            else:
                leaves.append(w.values.detach().requires_grad_())
                w = w._replace(values=leaves[4])
            x, cond, uncond, noise, _ = leaves
            step = lgd.guided_step(
                x, cond, uncond, w, levels, prediction=prediction, churn=churn, noise=noise, impl=impl
            )
            return torch.autograd.grad(step, leaves, d)

        kernel, same, truth = grads(*target, False), grads("reference", "cpu", False), grads("reference", "cpu", True)
        for k, r, t in zip(kernel[:4], same[:4], truth[:4], strict=True):
            testing.assert_elementwise(k, r, t)
        b = step_coefficients(testing.promoted(levels), prediction, churn.double()).guided
        terms = (upstream.double() * (data[1].double() - data[2].double())).abs().reshape(shape[0], -1).sum(1) * b.abs()
        testing.assert_sum(kernel[4], truth[4], terms if kind != "table" else terms.sum())


def test_only_what_requires_grad_gets_one(target, generator):
    data = testing.sample((4, 2, 50), torch.float32, generator).to(target.device).unbind(0)
    omega = torch.tensor([0.5, 1.0], device=target.device)
    levels = testing.moved(testing.step_levels(2), target.device)
    for wanted in ((0,), (1,), (2,), (3,), (4,), (0, 4), (1, 3)):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate((*data, omega))]
        x, cond, uncond, noise, w = leaves
        lgd.guided_step(x, cond, uncond, w, levels, churn=0.5, noise=noise, impl=target.impl).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(5)]


def test_gradient_flows_past_drawn_noise(target, generator):
    """With a seed the gradients are those of the same step with the noise given."""
    x, cond, uncond = testing.sample((3, 2, 3000), torch.float32, generator).to(target.device).unbind(0)
    levels = testing.moved(testing.step_levels(2), target.device)
    noise = lgd.philox_normal((2, 3000), 4, stream=1).to(target.device)
    found = []
    for options in ({"seed": 4}, {"noise": noise}):
        omega = torch.ones(2, device=target.device, requires_grad=True)
        step = lgd.guided_step(x, cond, uncond, omega, levels, churn=1.0, impl=target.impl, **options)
        found.append(torch.autograd.grad(step.square().sum(), omega)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-3)


def float64_inputs(generator):
    x, cond, uncond, noise = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64).unbind(0)
    omega = torch.rand(3, generator=generator, dtype=torch.float64)
    return tuple(tensor.requires_grad_() for tensor in (x, cond, uncond, omega, noise))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_gradcheck_twice_and_forward_mode(impl, prediction, generator):
    levels = testing.step_levels(3, torch.float64)

    def call(x, cond, uncond, omega, noise, impl=impl):
        return lgd.guided_step(x, cond, uncond, omega, levels, prediction=prediction, churn=0.7, noise=noise, impl=impl)

    inputs = float64_inputs(generator)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(
        lambda *args: call(*args, impl=None), inputs, check_forward_ad=True, check_backward_ad=False
    )


@pytest.mark.extension
def test_double_backward_through_the_table(generator):
    x, cond, uncond = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64).unbind(0)
    lookup = testing.promoted(testing.omegas(3, generator)["table"])
    levels = testing.step_levels(3, torch.float64)

    def call(values):
        return lgd.guided_step(x, cond, uncond, lookup._replace(values=values), levels, impl="cpu").square()

    values = lookup.values.detach().requires_grad_()
    assert torch.autograd.gradcheck(call, values) and torch.autograd.gradgradcheck(call, values)


def test_operator_manners(generator):
    x, cond, uncond, omega, noise = (tensor.detach() for tensor in float64_inputs(generator))
    levels, table = list(testing.step_levels(3)), list(testing.omegas(3, generator)["table"])
    churn = torch.rand(3, generator=generator)
    forward, backward = torch.ops.lgd.guided_step, torch.ops.lgd.guided_step_backward
    for scalars in (
        (omega, 0.0, [], levels, "v", churn, 0.0),
        (None, 0.5, [], levels, "x0", None, 1.0),
        (None, 0.0, table, levels, "flow", churn, 0.0),
    ):
        torch.library.opcheck(forward, (x, cond, uncond, noise, *scalars, None, None, 0, None))
        torch.library.opcheck(forward, (x, cond, uncond, None, *scalars, None, 5, 2, None))
        torch.library.opcheck(forward, (x, cond, uncond, None, *scalars, torch.arange(3), None, 0, None))
        for wanted in ([True] * 5, [True, False, True, False, False]):
            wanted[4] = wanted[4] and (scalars[0] is not None or bool(scalars[2]))
            data = (x, cond, uncond) if wanted[4] else (x, None, None)
            torch.library.opcheck(backward, (*data, *scalars, *[x.dtype] * 3, wanted, None))


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, cond, uncond, omega, t, s, churn, seed):
        return lgd.guided_step(
            x, cond, uncond, omega, lgd.VPCosine().levels(t, s), churn=churn, seed=seed, prediction="v"
        )

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for i in range(9):
        batch = 5 + i
        x, cond, uncond = torch.randn(3, batch, 10, generator=generator).unbind(0)
        t = torch.linspace(0.5, 1.0, batch)
        arguments = (x, cond, uncond, 0.5 + i / 8, t, t - 0.25, 0.5 + i / 32, 100 + i)
        torch.testing.assert_close(compiled(*arguments), step(*arguments), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def test_compiled_training(generator):
    torch._dynamo.reset()
    inputs = tuple(tensor.detach().float().requires_grad_() for tensor in float64_inputs(generator))
    levels = testing.step_levels(3)
    lookup = testing.omegas(3, generator)["table"]
    values = lookup.values.detach().requires_grad_()

    def loss(x, cond, uncond, omega, noise, values):
        once = lgd.guided_step(x, cond, uncond, omega, levels, churn=0.5, noise=noise)
        return lgd.guided_step(once, cond, uncond, lookup._replace(values=values), levels).square().sum()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs, values), (*inputs, values))
    expected = torch.autograd.grad(loss(*inputs, values), (*inputs, values))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_transforms_go_through_the_reference(generator):
    x, cond, uncond, omega, noise = (tensor.detach() for tensor in float64_inputs(generator))
    levels = testing.step_levels(3, torch.float64)

    def step(x, noise):
        return lgd.guided_step(x, cond, uncond, omega, levels, churn=1.0, noise=noise)

    stacked = torch.func.vmap(step)(x.expand(4, 3, 5), noise.expand(4, 3, 5))
    torch.testing.assert_close(stacked[2], step(x, noise))
    lookup = testing.promoted(testing.omegas(3, generator)["table"])

    def total(values):
        looked_up = lookup._replace(values=values)
        return lgd.guided_step(x, cond, uncond, looked_up, levels).square().sum()

    values = lookup.values.detach().requires_grad_()
    expected = torch.autograd.grad(total(values), values)[0]
    torch.testing.assert_close(torch.func.grad(total)(values.detach()), expected)
    per_sample = torch.func.vmap(torch.func.grad(total))(values.detach().expand(2, -1, -1, -1))
    torch.testing.assert_close(per_sample[1], expected)
    with pytest.raises(ValueError, match="`seed`.*pass noise"):
        torch.func.vmap(
            lambda x: lgd.guided_step(x, cond, uncond, omega, levels, churn=1.0, seed=1), randomness="error"
        )(x.expand(4, 3, 5))
