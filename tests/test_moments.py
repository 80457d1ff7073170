"""Per-sample inner products and sums of columns."""

import pytest
import torch
from conftest import address, dtypes_of
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.columns import flat, formed

GUIDED = (0, 1, (0, 1))  # c, u and c - u


def moments(target, tensors, columns=None):
    """Compute moments on the target's device, by the target's implementation."""
    return lgd.moments([t.to(target.device) for t in tensors], columns=columns, impl=target.impl)


def test_hand_worked(target):
    c, u = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 4.0], [-1.0, 2.0]])
    dots, sums = moments(target, (c, u), columns=(0, (0, 1)))
    assert dots.tolist() == [[[25.0, 6.0], [6.0, 4.0]], [[1.0, 2.0], [2.0, 8.0]]]
    assert sums.tolist() == [[7.0, 2.0], [1.0, 0.0]]


def test_laws(target, generator):
    """Check symmetry, ||a + b||^2 by polarisation, scaling by the square, and that one sample changes no other."""
    a, b = (testing.sample((3, 900), torch.float32, generator).round(decimals=1) for _ in range(2))
    found = moments(target, (a, b, a + b), columns=(0, 1, 2, (2, 1)))
    dots = found.dots.cpu()
    assert torch.equal(dots, dots.transpose(1, 2))
    torch.testing.assert_close(dots[:, 2, 2], dots[:, 0, 0] + 2 * dots[:, 0, 1] + dots[:, 1, 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(dots[:, 3, 3], dots[:, 0, 0], rtol=1e-5, atol=0)
    assert torch.equal(moments(target, (2 * a,)).dots.cpu(), 4 * dots[:, :1, :1])
    changed = a.clone()
    changed[1] = 5.0
    after = moments(target, (changed, b)).dots.cpu()
    assert torch.equal(after[[0, 2]], dots[[0, 2], :2, :2]) and not torch.equal(after[1], dots[1, :2, :2])


def check(target, tensors, columns=None):
    found = moments(target, tensors, columns)
    truth = lgd.moments([testing.promoted(t) for t in tensors], columns=columns, impl="reference")
    terms = formed([testing.promoted(t) for t in tensors], flat(columns, len(tensors)), torch.float64)
    sizes = torch.stack([column.abs().flatten(1).sum(1) if column.ndim > 1 else column.abs() for column in terms], 1)
    products = lgd.moments([column.abs() for column in terms], impl="reference").dots
    testing.assert_sum(found.dots, truth.dots, products)
    testing.assert_sum(found.sums, truth.sums, sizes)
    assert found.dots.dtype == (torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32)


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        tensors = [testing.sample(shape, dtype, generator) for _ in range(3)]
        check(target, tensors)
        check(target, tensors[:2], GUIDED)


def test_eight_of_all(target, generator):
    """Take as many tensors and columns as are allowed."""
    tensors = [testing.sample((2, 1500), torch.float32, generator) for _ in range(8)]
    check(target, tensors)
    check(target, tensors, [(n, (n + 1) % 8) for n in range(8)])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_takes_any_layout(target, layout, generator):
    for dtype in dtypes_of(target):
        other = testing.sample((3, 2, 19, 23), dtype, generator)
        check(target, (testing.sample((3, 2, 19, 23), dtype, generator, layout), other), GUIDED)


def test_takes_mixed_dtypes(target, generator):
    for one in dtypes_of(target):
        for other in dtypes_of(target):
            check(target, (testing.sample((2, 1100), one, generator), testing.sample((2, 1100), other, generator)))


@pytest.mark.parametrize("closeness", [1e-2, 1e-4])
def test_a_small_difference_keeps_its_digits(target, closeness, generator):
    """Give ||c - u||^2 to 1e-6 where c and u have four digits in common. Computed from their moments it has none."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        c = testing.sample((3, 4096), torch.float32, generator).to(dtype)
        u = (c.double() + closeness * testing.sample((3, 4096), torch.float64, generator)).to(dtype)
        difference = c.double() - u.double()
        assert difference.any()
        found = moments(target, (c, u), columns=(0, 1, (0, 1))).dots.cpu().double()
        exact = torch.stack(((difference**2).sum(1), (difference * c.double()).sum(1)), 1)
        terms = torch.stack((exact[:, 0], (difference * c.double()).abs().sum(1)), 1)
        error = (found[:, 2, [2, 0]] - exact).abs() / terms
        assert error.max() < 1e-6, (dtype, error.max())
        if dtype == torch.float32 and closeness == 1e-4:
            expanded = found[:, 0, 0] - 2 * found[:, 0, 1] + found[:, 1, 1]
            assert ((expanded - exact[:, 0]).abs() / exact[:, 0]).max() > 0.1


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    tensor = torch.empty(shape, device=target.device, requires_grad=True)
    found = lgd.moments((tensor, tensor), columns=(0, (0, 1)), impl=target.impl)
    assert found.dots.shape == (shape[0], 2, 2) and not found.dots.any() and not found.sums.any()
    (found.dots.sum() + found.sums.sum()).backward()
    assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 8209)], ids=str)
def test_gradients_agree_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        data = [testing.sample(shape, dtype, generator) for _ in range(2)]
        to_dots = torch.randn(shape[0], 3, 3, generator=generator, dtype=torch.float64)
        to_sums = torch.randn(shape[0], 3, generator=generator, dtype=torch.float64)

        def grads(impl, device, adapt, data=data, upstream=(to_dots, to_sums)):
            leaves = [adapt(tensor).to(device).requires_grad_() for tensor in data]
            found = lgd.moments(leaves, columns=GUIDED, impl=impl)
            loss = sum((u.float().to(f) * f).sum() for u, f in zip(upstream, found, strict=True))
            return torch.autograd.grad(loss, leaves)

        same = grads("reference", "cpu", torch.Tensor.clone)
        for k, r, t in zip(grads(*target, torch.Tensor.clone), same, grads("reference", "cpu", testing.promoted),
                           strict=True):  # fmt: skip
            testing.assert_elementwise(k, r, t)


def test_the_gradient_of_a_small_difference_keeps_its_digits(target, generator):
    """Give d ||c - u||^2 / dc = 2 (c - u), from a difference formed in the backward too."""
    c = testing.sample((2, 3000), torch.float32, generator)
    u = (c + 1e-4 * testing.sample((2, 3000), torch.float32, generator)).to(target.device)
    c = c.to(target.device).requires_grad_()
    lgd.moments((c, u), columns=((0, 1),), impl=target.impl).dots.sum().backward()
    torch.testing.assert_close(c.grad, 2 * (c - u).detach(), rtol=1e-6, atol=0)


def float64_inputs(generator):
    return tuple(t.requires_grad_() for t in torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).unbind(0))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck_twice_and_forward_mode(impl, generator):
    def call(*tensors, impl=impl):
        return tuple(lgd.moments(tensors, columns=(0, (0, 1), (2, 0)), impl=impl))

    inputs = float64_inputs(generator)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    forward = lambda *tensors: call(*tensors, impl=None)  # noqa: E731
    assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True, check_backward_ad=False)


def test_only_what_requires_grad_gets_one(target, generator):
    data = testing.sample((2, 2, 50), torch.float32, generator).to(target.device).unbind(0)
    for wanted in (0, 1):
        leaves = [tensor.clone().requires_grad_(n == wanted) for n, tensor in enumerate(data)]
        lgd.moments(leaves, columns=GUIDED, impl=target.impl).dots.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [n == wanted for n in range(2)]


def test_operator_manners(generator):
    tensors = [tensor.detach() for tensor in float64_inputs(generator)]
    products = [0, 0, 0, 1, 1, 1, 0, -1]
    torch.library.opcheck(torch.ops.lgd.moments, (tensors, [0, -1, 0, 1], None, 0, products, False, None))
    source = torch.tensor([1, 1, 0])
    gathered = [tensors[0], torch.randn(3, 5, dtype=torch.float64)]
    torch.library.opcheck(torch.ops.lgd.moments, (gathered, [0, -1, 1, -1], source, 1, products, False, None))


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lgd.moments, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 4, 5, 6):
        tensors = torch.randn(2, batch, 10, generator=generator).unbind(0)
        for found, expected in zip(compiled(tensors), lgd.moments(tensors), strict=True):
            assert torch.equal(found, expected)
    assert counter.frame_count == 1

    tensors = [tensor.detach().float().requires_grad_() for tensor in float64_inputs(generator)]
    function = lambda *tensors: lgd.moments(tensors, columns=GUIDED).dots.square().sum()  # noqa: E731
    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(*tensors[:2]), tensors[:2])
    for f, e in zip(found, torch.autograd.grad(function(*tensors[:2]), tensors[:2]), strict=True):
        torch.testing.assert_close(f, e)


def test_transforms_inference_mode_and_meta(generator):
    a, b, _ = (tensor.detach() for tensor in float64_inputs(generator))
    stacked = torch.func.vmap(lambda a: lgd.moments((a, b)).dots)(a.expand(4, 2, 5))
    torch.testing.assert_close(stacked[2], lgd.moments((a, b)).dots)
    grad = torch.func.grad(lambda a: lgd.moments((a,)).dots.sum())(a)
    torch.testing.assert_close(grad, 2 * a)
    with torch.inference_mode():
        assert lgd.moments((a, b)).dots.shape == (2, 2, 2)
    assert lgd.moments((a.to("meta"),)).sums.shape == (2, 1)


def test_writes_only_its_output_and_reads_no_stale_memory(target, generator, poisoned):
    held = torch.full((2, 3000), torch.nan)
    held[:, 500:2500] = torch.randn(2, 2000, generator=generator)
    held = held.to(target.device)
    a, b = held[:1, 500:2500], held[1:, 500:2500]
    before = held.clone()
    found = lgd.moments((a, b), columns=GUIDED, impl=target.impl)
    assert address(found.dots) in poisoned
    torch.testing.assert_close(found.dots.cpu(), lgd.moments((a.cpu(), b.cpu()), columns=GUIDED).dots)
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    tensors = torch.randn(2, 5, 40001 if target.impl == "cpu" else 3001, generator=generator).unbind(0)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(moments(target, tensors, GUIDED))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


TENSOR = torch.ones(2, 3)
CASES = {
    "one tensor": (dict(tensors=TENSOR), TypeError, "`tensors` is a Tensor, expected a list or tuple"),
    "none": (dict(tensors=[]), ValueError, "`tensors` has 0 entries, expected 1 to 8"),
    "too many": (dict(tensors=[TENSOR] * 9), ValueError, "`tensors` has 9 entries"),
    "shape": (dict(tensors=(TENSOR, torch.ones(2, 4))), ValueError, r"`tensors\[1\]` has shape \[2, 4\]"),
    "integers": (dict(tensors=(TENSOR.long(),)), TypeError, r"`tensors\[0\]` has dtype torch.int64"),
    "columns kind": (dict(columns=0), TypeError, "`columns` is a int, expected a list of indices"),
    "columns empty": (dict(columns=[]), ValueError, "`columns` has 0 entries"),
    "column index": (dict(columns=(0, 2)), ValueError, r"`columns\[1\]` is 2, expected indices from 0 to 1"),
    "column pair": (dict(columns=((0, -1),)), ValueError, r"`columns\[0\]` is \(0, -1\)"),
    "column float": (dict(columns=(0.5,)), TypeError, r"`columns\[0\]` is 0.5, expected an index i"),
    "column triple": (dict(columns=((0, 1, 1),)), TypeError, r"`columns\[0\]` is \(0, 1, 1\)"),
    "centred": (dict(centred=1), TypeError, "`centred` is a int, expected True or False"),
    "impl": (dict(impl="cuda"), ValueError, "moments has no 'cuda' implementation"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    change, error, message = CASES[case]
    arguments = dict(tensors=(TENSOR, TENSOR)) | change
    with pytest.raises(error, match=message):
        lgd.moments(**arguments)
