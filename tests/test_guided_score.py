"""guided = cond + omega (cond - uncond)."""

import pytest
import torch
from conftest import address, dtypes_of
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.guided_score import reference
from lgd_kernels.ops.guided_score.structs import GuidedScore
from lgd_kernels.runtime.arguments import Omega


def formula(cond, uncond, omega):
    """Run the reference on what users pass."""
    return reference.guided_score(GuidedScore(cond, uncond, Omega.of(omega, cond)))


def guided_score(target, cond, uncond, omega):
    """On the target's device, by the target's implementation."""
    args = (testing.moved(value, target.device) for value in (cond, uncond, omega))
    return lgd.guided_score(*args, impl=target.impl)


def test_hand_worked(target):
    cond = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    uncond = torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    expected = torch.tensor([[1.5, 1.0], [7.0, -14.0]])  # 1 + .5 * 1, 2 + .5 * -2; 3 + 2 * 2, -4 + 2 * -5
    assert torch.equal(guided_score(target, cond, uncond, torch.tensor([0.5, 2.0])).cpu(), expected)


def test_omega_0_is_conditional_only_and_minus_1_unconditional_only(target, generator):
    cond, uncond = torch.randn(2, 3, 40, generator=generator).round(decimals=2).unbind(0)
    assert torch.equal(guided_score(target, cond, uncond, 0.0).cpu(), cond)
    torch.testing.assert_close(guided_score(target, cond, uncond, -1.0).cpu(), uncond, rtol=0, atol=1e-6)


def test_one_sample_moves_no_other(target, generator):
    cond, uncond = torch.randn(2, 3, 40, generator=generator).unbind(0)
    omega = torch.tensor([0.5, 1.0, 2.0])
    before = guided_score(target, cond, uncond, omega).cpu()
    cond[1], uncond[1], omega[1] = 7.0, -3.0, 9.0
    after = guided_score(target, cond, uncond, omega).cpu()
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def check(target, cond, uncond, omega):
    kernel = guided_score(target, cond, uncond, omega)
    truth = formula(testing.promoted(cond), testing.promoted(uncond), testing.promoted(omega))
    testing.assert_elementwise(kernel, formula(cond, uncond, omega), truth)
    assert kernel.is_contiguous()


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        cond, uncond = (testing.sample(shape, dtype, generator) for _ in range(2))
        for omega in testing.omegas(shape[0], generator).values():
            check(target, cond, uncond, omega)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_takes_any_layout(target, layout, generator):
    for dtype in dtypes_of(target):
        cond = testing.sample((3, 2, 19, 23), dtype, generator, layout)
        uncond = testing.sample((3, 2, 19, 23), dtype, generator, "contiguous" if layout == "expanded" else layout)
        check(target, cond, uncond, torch.tensor([0.5, 1.0, 2.0]))
        check(target, uncond, cond, torch.tensor([0.5]).expand(3))


@pytest.mark.parametrize("layout", ["offset", "odd stride"])
def test_takes_whole_vectors_that_are_not_aligned(target, layout, generator):
    for dtype in dtypes_of(target):
        cond, uncond = (testing.sample((3, 64), dtype, generator, layout) for _ in range(2))
        check(target, cond, uncond, torch.tensor([0.5, 1.0, 2.0]))


def test_takes_mixed_dtypes(target, generator):
    for cond_dtype in dtypes_of(target):
        for uncond_dtype in dtypes_of(target):
            cond = testing.sample((2, 1100), cond_dtype, generator)
            check(target, cond, testing.sample((2, 1100), uncond_dtype, generator), 1.5)


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    cond = torch.empty(shape, device=target.device, requires_grad=True)
    omega = torch.ones(shape[0], device=target.device, requires_grad=True)
    guided = lgd.guided_score(cond, cond, omega, impl=target.impl)
    assert guided.shape == shape
    guided.sum().backward()
    assert torch.equal(omega.grad, torch.zeros_like(omega))


@pytest.mark.parametrize("kind", ["per sample", "half", "table"])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 8209), (2, 3, 7, 11)], ids=str)
def test_gradients_agree_with_float64(target, shape, kind, generator):
    for dtype in dtypes_of(target):
        data = [testing.sample(shape, dtype, generator) for _ in range(2)]
        upstream = testing.sample(shape, dtype, generator)
        omega = testing.omegas(shape[0], generator)[kind]

        def grads(impl, device, promote, data=data, omega=omega, upstream=upstream):
            adapt = testing.promoted if promote else lambda value: value
            cond, uncond, w, d = (testing.moved(adapt(v), device) for v in (*data, omega, upstream))
            leaves = [cond.detach().requires_grad_(), uncond.detach().requires_grad_()]
            if isinstance(w, torch.Tensor):
                leaves.append(w.detach().requires_grad_())
                w = leaves[2]
            else:
                leaves.append(w.values.detach().requires_grad_())
                w = w._replace(values=leaves[2])
            return torch.autograd.grad(lgd.guided_score(*leaves[:2], w, impl=impl), leaves, d)

        kernel, same, truth = grads(*target, False), grads("reference", "cpu", False), grads("reference", "cpu", True)
        for k, r, t in zip(kernel[:2], same[:2], truth[:2], strict=True):
            testing.assert_elementwise(k, r, t)
        terms = (upstream.double() * (data[0].double() - data[1].double())).abs().flatten()
        per_sample = terms.view(shape[0], -1).sum(1)
        testing.assert_sum(kernel[2], truth[2], per_sample if kind != "table" else per_sample.sum())


def test_only_what_requires_grad_gets_one(target, generator):
    data = testing.sample((2, 2, 50), torch.float32, generator).to(target.device).unbind(0)
    omega = torch.tensor([0.5, 1.0], device=target.device)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate((*data, omega))]
        lgd.guided_score(*leaves, impl=target.impl).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(3)]


def test_expanded_upstream_gradient(target, generator):
    """`.sum().backward()` hands over a gradient with stride 0."""
    cond = torch.randn(2, 3000, generator=generator).to(target.device)
    omega = torch.ones(2, device=target.device, requires_grad=True)
    lgd.guided_score(cond, torch.zeros_like(cond), omega, impl=target.impl).sum().backward()
    torch.testing.assert_close(omega.grad, cond.sum(1), rtol=1e-5, atol=1e-4)


def float64_inputs(generator):
    cond, uncond = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).unbind(0)
    omega = torch.rand(3, generator=generator, dtype=torch.float64)
    return tuple(tensor.requires_grad_() for tensor in (cond, uncond, omega))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck_twice_and_forward_mode(impl, generator):
    def call(*args):
        return lgd.guided_score(*args, impl=impl)

    inputs = float64_inputs(generator)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(lgd.guided_score, inputs, check_forward_ad=True, check_backward_ad=False)


def test_operator_manners(generator):
    cond, uncond, omega = (tensor.detach() for tensor in float64_inputs(generator))
    table = list(testing.omegas(3, generator)["table"])
    for arguments in ((omega, 0.0, []), (None, 0.5, []), (None, 0.0, table)):
        trains = arguments[1] == 0.0
        torch.library.opcheck(torch.ops.lgd.guided_score, (cond, uncond, *arguments, None))
        torch.library.opcheck(
            torch.ops.lgd.guided_score_backward,
            (cond, cond, uncond, *arguments, cond.dtype, cond.dtype, [True, True, trains], None),
        )


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lgd.guided_score, backend=counter, fullgraph=True, dynamic=True)
    for batch, omega in ((3, 0.5), (4, 0.75), (5, 1.0), (6, 1.25), (7, 1.5)):
        cond, uncond = torch.randn(2, batch, 10, generator=generator).unbind(0)
        assert torch.equal(compiled(cond, uncond, omega), lgd.guided_score(cond, uncond, omega))
    assert counter.frame_count == 1

    cond, uncond, omega = (tensor.detach().float().requires_grad_() for tensor in float64_inputs(generator))
    compiled = torch.compile(lgd.guided_score, fullgraph=True)
    loss = compiled(cond, uncond, omega).square().sum()
    found = torch.autograd.grad(loss, (cond, uncond, omega))
    expected = torch.autograd.grad(lgd.guided_score(cond, uncond, omega).square().sum(), (cond, uncond, omega))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_transforms_go_through_the_reference(generator):
    cond, uncond, omega = (tensor.detach() for tensor in float64_inputs(generator))
    stacked = torch.func.vmap(lgd.guided_score, in_dims=(0, 0, None))(
        cond.expand(4, 3, 5), uncond.expand(4, 3, 5), omega
    )
    assert torch.equal(stacked[2], lgd.guided_score(cond, uncond, omega, impl="reference"))
    grad = torch.func.grad(lambda w: lgd.guided_score(cond, uncond, w).sum())(omega)
    torch.testing.assert_close(grad, (cond - uncond).sum(1))
    with pytest.raises(ValueError, match="no rule for vmap"):
        torch.func.grad(lambda w: lgd.guided_score(cond, uncond, w, impl="cpu").sum())(omega)


def test_inference_mode_meta_and_autocast(generator):
    cond, uncond = torch.randn(2, 3, 5, generator=generator).unbind(0)
    with torch.inference_mode():
        inferred = lgd.guided_score(cond, uncond, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lgd.guided_score(cond, uncond, 0.5)
    assert torch.equal(inferred, cast) and cast.dtype == torch.float32
    assert lgd.guided_score(cond.to("meta"), uncond.to("meta"), 0.5).shape == cond.shape


def test_writes_only_its_output_and_reads_no_stale_memory(target, generator, poisoned):
    """Fresh allocations are poisoned; inputs lie between sentinels."""
    held = torch.full((2, 3000), torch.nan)
    held[:, 500:2500] = torch.randn(2, 2000, generator=generator)
    held = held.to(target.device)
    cond, uncond = held[:1, 500:2500], held[1:, 500:2500]
    before = held.clone()
    expected = lgd.guided_score(cond.cpu(), uncond.cpu(), 0.5, impl="reference")
    guided = lgd.guided_score(cond, uncond, 0.5, impl=target.impl)
    assert address(guided) in poisoned
    torch.testing.assert_close(guided.cpu(), expected)
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    cond, uncond = torch.randn(2, 5, 40001 if target.impl == "cpu" else 3001, generator=generator)
    omega = torch.ones(5, requires_grad=True)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        guided = guided_score(target, cond, uncond, omega)
        found.append((guided, *torch.autograd.grad(guided.square().sum(), omega)))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


CASES = {
    "shape": (dict(uncond=torch.ones(2, 4)), ValueError, r"`uncond` has shape \[2, 4\], expected \[2, 3\] like `cond`"),
    "integers": (dict(cond=torch.ones(2, 3, dtype=torch.int64)), TypeError, "`cond` has dtype torch.int64, expected"),
    "not a tensor": (dict(uncond=1.0), TypeError, "`uncond` is a float, expected a tensor"),
    "0-dim": (dict(cond=torch.tensor(1.0)), ValueError, r"`cond` has shape \[\].*unsqueeze"),
    "device": (dict(uncond=torch.ones(2, 3, device="meta")), ValueError, "`uncond` is on meta, expected cpu"),
    "omega length": (dict(omega=torch.ones(3)), ValueError, r"`omega` has shape \[3\], expected \[B\] = \[2\]"),
    "omega 0-dim": (dict(omega=torch.tensor(1.0)), ValueError, r"`omega` has shape \[\].*expand"),
    "omega integers": (dict(omega=torch.ones(2, dtype=torch.int32)), TypeError, "`omega` has dtype torch.int32"),
    "omega kind": (dict(omega="1"), TypeError, "`omega` is a str"),
    "impl": (dict(impl="fast"), ValueError, "`impl` is 'fast', expected None or one of cuda, triton, cpu, reference"),
    "impl cannot": (dict(impl="cuda"), ValueError, "impl='cuda' cannot run here.*These can: .*reference"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    change, error, message = CASES[case]
    arguments = dict(cond=torch.ones(2, 3), uncond=torch.ones(2, 3), omega=0.5) | change
    with pytest.raises(error, match=message):
        lgd.guided_score(**arguments)
