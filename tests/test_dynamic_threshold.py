"""Clip to a quantile of each sample's own magnitudes, and division by it."""

import math

import pytest
import torch
from conftest import address, dtypes_of
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.dynamic_threshold.structs import position

QUANTILES = (0.0, 0.5, 0.9, 0.995, 1.0)


def call(target, x0, **options):
    """On the target's device, by the target's implementation."""
    return lgd.dynamic_threshold(x0.to(target.device), impl=target.impl, **options)


def by_sorting(x0, quantile=0.995, max_value=math.inf):
    """As papers and diffusers write it, with torch.quantile."""
    size = x0.reshape(x0.shape[0], -1).abs()
    s = torch.quantile(size, quantile, dim=1).clamp(1, max_value).view(-1, *(1,) * (x0.ndim - 1))
    return torch.clamp(x0, -s, s) / s


def check(target, x0, **options):
    same = lgd.dynamic_threshold(x0, impl="reference", **options)
    truth = lgd.dynamic_threshold(testing.promoted(x0), impl="reference", **options)
    testing.assert_elementwise(call(target, x0, **options), same, truth)


def test_hand_worked(target):
    x0 = torch.tensor([[-4.0, 0.5, 1.0, 2.0], [0.1, -0.2, 0.3, -0.4]])
    assert call(target, x0, quantile=2 / 3).tolist()[0] == [-1.0, 0.25, 0.5, 1.0]
    assert call(target, x0, quantile=0.5)[0].tolist() == pytest.approx([-1.0, 1 / 3, 2 / 3, 1.0])  # s = 1.5
    assert torch.equal(call(target, x0, quantile=1.0).cpu()[1], x0[1])  # s is at least 1
    assert call(target, x0, quantile=1.0, max_value=2.0).tolist()[0] == [-1.0, 0.25, 0.5, 1.0]


def test_laws(target, generator):
    """Odd; within [-1, 1]; a clip alone at max_value 1; one sample moves no other."""
    x0 = 3 * testing.sample((3, 900), torch.float32, generator)
    found = call(target, x0).cpu()
    assert torch.equal(call(target, -x0).cpu(), -found) and found.abs().max() == 1
    assert torch.equal(call(target, x0, max_value=1.0).cpu(), x0.clamp(-1, 1))
    assert 4 <= (found.abs() == 1).sum(1).min() <= (found.abs() == 1).sum(1).max() <= 5  # of 900, half a percent
    changed = x0.clone()
    changed[1] = 5.0
    after = call(target, changed).cpu()
    assert torch.equal(after[[0, 2]], found[[0, 2]]) and not torch.equal(after[1], found[1])


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        x0 = 2 * testing.sample(shape, dtype, generator)
        for quantile in QUANTILES:
            check(target, x0, quantile=quantile)
        check(target, x0, max_value=1.5)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_is_torch_quantile(impl, shape, generator):
    """To float64's rounding; in float32 as far as torch's float32 position goes."""
    for dtype in testing.DTYPES:
        x0 = 2 * testing.sample(shape, dtype, generator)
        for quantile in QUANTILES:
            found = lgd.dynamic_threshold(x0.double(), quantile=quantile, impl=impl)
            torch.testing.assert_close(found, by_sorting(x0.double(), quantile), rtol=1e-14, atol=1e-15)
    x0 = x0.float()
    found = lgd.dynamic_threshold(x0, impl=impl)
    torch.testing.assert_close(found, by_sorting(x0), rtol=1e-4, atol=1e-6)


def test_is_diffusers(generator):
    """By DDPMScheduler, for which the largest s is 1 unless it is set."""
    diffusers = pytest.importorskip("diffusers")
    x0 = 3 * testing.sample((3, 4, 16, 16), torch.float64, generator)
    for options in ({}, {"sample_max_value": 2.0}, {"sample_max_value": 50.0, "dynamic_thresholding_ratio": 0.9}):
        scheduler = diffusers.DDPMScheduler(thresholding=True, **options)
        found = lgd.dynamic_threshold(
            x0, quantile=options.get("dynamic_thresholding_ratio", 0.995), max_value=options.get("sample_max_value", 1)
        )
        torch.testing.assert_close(found, scheduler._threshold_sample(x0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_takes_any_layout(target, layout, generator):
    for dtype in dtypes_of(target):
        check(target, 2 * testing.sample((3, 2, 19, 23), dtype, generator, layout), quantile=0.9)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_any_magnitude(target, scale, generator):
    """Digits that nearly all elements share, subnormals, and no overflow on the way."""
    x0 = scale * testing.sample((2, 3000), torch.float32, generator).clamp(-1, 1)
    x0[0, ::7] = 2.0
    for quantile in QUANTILES:
        check(target, x0, quantile=quantile)


def test_ties_and_constants(target):
    x0 = torch.tensor([[2.0, -2.0, 2.0, 3.0, 3.0, -3.0], [2.0] * 6, [0.0] * 6])
    for quantile in (0.0, 0.4, 0.45, 0.5, 0.6, 1.0):
        check(target, x0, quantile=quantile)


def test_a_bound_beyond_the_dtype_is_none(target):
    x0 = torch.tensor([[-4.0, 0.5, 1.0, 2.0]], device=target.device, requires_grad=True)
    for impl in (target.impl, "reference"):
        for bound in (1e39, 1e308):
            found = lgd.dynamic_threshold(x0, quantile=0.7, max_value=bound, impl=impl)
            expected = lgd.dynamic_threshold(x0, quantile=0.7, impl=impl)
            assert torch.equal(found, expected)
            grads = [torch.autograd.grad(one.square().sum(), x0)[0] for one in (found, expected)]
            assert torch.equal(*grads)


def test_what_is_not_finite(target):
    """A NaN makes its sample NaN; infinities above the quantile are clipped, one that is the quantile leaves zeros."""
    inf = math.inf
    x0 = torch.tensor([[1.0, 2.0, math.nan, 3.0], [1.0, 2.0, 4.0, inf], [1.0, -inf, 4.0, inf], [1.0, 2.0, 4.0, 8.0]])
    found = call(target, x0, quantile=2 / 3).cpu()
    assert found[0].isnan().all()
    assert found[1].tolist() == [0.25, 0.5, 1.0, 1.0]
    assert found[2].isnan().tolist() == [False, True, False, True] and not found[2, ::2].any()
    assert found[3].tolist() == [0.25, 0.5, 1.0, 1.0]
    check(target, x0, quantile=2 / 3)
    check(target, x0, quantile=0.9)
    assert call(target, x0, quantile=0.9, max_value=4.0)[1].tolist() == [0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    x0 = torch.empty(shape, device=target.device, requires_grad=True)
    found = lgd.dynamic_threshold(x0, impl=target.impl)
    assert found.shape == shape
    found.sum().backward()
    assert x0.grad.shape == shape


@pytest.mark.extension
def test_more_than_torch_quantile_takes(generator):
    """2^24 + 5 elements: counted as order statistics are."""
    x0 = 2 * torch.randn(1, 2**24 + 5, generator=generator)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x0, 0.995)
    found = lgd.dynamic_threshold(x0)
    at = 0.995 * (x0.numel() - 1)
    low, high = (x0.abs()[0].kthvalue(math.floor(at) + n).values.double() for n in (1, 2))
    s = (low + (at - math.floor(at)) * (high - low)).float()
    assert torch.equal(found, x0.clamp(-s, s) / s)


@pytest.mark.parametrize("options", [{}, {"quantile": 0.5}, {"max_value": 1.2}, {"quantile": 1.0}], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 2051)], ids=str)
def test_gradients_agree_with_float64(target, shape, options, generator):
    for dtype in dtypes_of(target):
        x0, upstream = (testing.sample(shape, dtype, generator) for _ in range(2))

        def grad(impl, device, adapt, x0=2 * x0, upstream=upstream):
            leaf = adapt(x0).to(device).requires_grad_()
            found = lgd.dynamic_threshold(leaf, impl=impl, **options)
            return torch.autograd.grad(found, leaf, adapt(upstream).to(device))[0]

        same, truth = (grad("reference", "cpu", adapt) for adapt in (torch.Tensor.clone, testing.promoted))
        terms = 0.0 if dtype == torch.float64 else (2 * x0 * upstream).abs().double().reshape(shape[0], -1).sum(1).max()
        slack = 8 * 2.0**-24 * float(terms)  # the gradient of s is a sum, and s is at least 1
        testing.assert_elementwise(grad(*target, torch.Tensor.clone), same, truth, slack)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_gradient_of_a_tie_is_shared(impl):
    """Four have the magnitude that is s: each takes a quarter of its gradient, with its own sign."""
    x0 = torch.tensor([[2.0, -2.0, 2.0, 1.0, -2.0]], requires_grad=True)
    found = lgd.dynamic_threshold(x0, quantile=0.75, impl=impl)
    found[0, 3].backward()  # 1 / s
    assert x0.grad.tolist() == [[-1 / 16, 1 / 16, -1 / 16, 0.5, 1 / 16]]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"quantile": 0.6}, {"max_value": 1.1}], ids=str)
def test_gradcheck_twice_and_forward_mode(impl, options, generator):
    x0 = (2 * torch.randn(2, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lgd.dynamic_threshold(x, impl=impl, **options), x0)
    assert torch.autograd.gradgradcheck(lambda x: lgd.dynamic_threshold(x, impl=impl, **options), x0)
    forward = lambda x: lgd.dynamic_threshold(x, **options)  # noqa: E731
    assert torch.autograd.gradcheck(forward, x0, check_forward_ad=True, check_backward_ad=False)


def test_gradient_is_that_of_torch_quantile(generator):
    """Where no two elements are alike there is one gradient."""
    x0 = (2 * torch.randn(3, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    for quantile in (0.5, 0.9, 0.995):
        found, theirs = (
            torch.autograd.grad(function(x0, quantile=quantile), x0, upstream)[0]
            for function in (lgd.dynamic_threshold, by_sorting)
        )
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-14)


def test_operator_manners(generator):
    torch.library.opcheck(
        torch.ops.lgd.dynamic_threshold, (torch.randn(3, 50, generator=generator), 0.9, math.inf, None)
    )


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lgd.dynamic_threshold, backend=counter, fullgraph=True, dynamic=True)
    frames = set()  # compiled at the first call, which finds out that quantile is a constant, and at no other
    for batch in (3, 4, 5, 6):
        x0 = 2 * torch.randn(batch, 10, generator=generator)
        assert torch.equal(compiled(x0), lgd.dynamic_threshold(x0))
        frames.add(counter.frame_count)
    assert len(frames) == 1
    x0.requires_grad_()
    function = lambda x0: lgd.dynamic_threshold(x0).square().sum()  # noqa: E731
    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(x0), x0)
    torch.testing.assert_close(found, torch.autograd.grad(function(x0), x0))


def test_transforms_inference_mode_and_meta(generator):
    x0 = 2 * torch.randn(3, 40, generator=generator)
    stacked = torch.func.vmap(lgd.dynamic_threshold)(torch.stack((x0, 2 * x0)))
    torch.testing.assert_close(stacked[1], lgd.dynamic_threshold(2 * x0))
    grad = torch.func.grad(lambda x: lgd.dynamic_threshold(x).square().sum())(x0)
    leaf = x0.clone().requires_grad_()
    torch.testing.assert_close(
        grad, torch.autograd.grad(lgd.dynamic_threshold(leaf, impl="reference").square().sum(), leaf)[0]
    )
    with torch.inference_mode():
        assert lgd.dynamic_threshold(x0).shape == x0.shape
    assert lgd.dynamic_threshold(x0.to("meta")).shape == x0.shape


def test_writes_only_its_output_and_reads_no_stale_memory(target, generator, poisoned):
    held = torch.full((2, 3000), torch.nan)
    held[:, 500:2500] = 2 * torch.randn(2, 2000, generator=generator)
    held = held.to(target.device)
    before, x0 = held.clone(), held[:, 500:2500]
    found = call(target, x0)
    assert address(found) in poisoned
    torch.testing.assert_close(found.cpu(), lgd.dynamic_threshold(x0.cpu(), impl="reference"))
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    for shape in ((1, 40001), (3, 20011), (5, 9001)) if target.impl == "cpu" else ((3, 3001),):
        x0, found = 2 * torch.randn(shape, generator=generator), []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(call(target, x0))
        assert all(torch.equal(found[0], later) for later in found[1:])


def test_position_of_a_quantile():
    assert position(0.5, 5) == (2, 0.0) and position(0.5, 4) == (1, 0.5)
    assert position(1.0, 7) == (6, 0.0) and position(0.0, 1) == (0, 0.0)


TENSOR = torch.ones(2, 3)
CASES = {
    "list": (dict(x0=[1.0]), TypeError, "`x0` is a list"),
    "integers": (dict(x0=TENSOR.long()), TypeError, "`x0` has dtype torch.int64"),
    "no batch": (dict(x0=torch.tensor(1.0)), ValueError, r"`x0` has shape \[\]"),
    "quantile kind": (dict(quantile="0.9"), TypeError, "`quantile` is a str, expected a float"),
    "quantile range": (dict(quantile=99.5), ValueError, r"`quantile` is 99.5, expected a number in \[0, 1\]"),
    "quantile nan": (dict(quantile=math.nan), ValueError, "`quantile` is nan"),
    "max_value": (dict(max_value=0.5), ValueError, r"`max_value` is 0.5, expected a number in \[1, inf\]"),
    "impl": (dict(impl="cuda"), ValueError, "dynamic_threshold has no 'cuda' implementation"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        lgd.dynamic_threshold(**(dict(x0=TENSOR) | change))
