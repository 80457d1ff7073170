"""Moments of columns less their means: right where a variance computed from plain sums has no digits."""

import pytest
import torch
from conftest import dtypes_of

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.columns import every_product, flat, formed

GUIDED = (0, 1, (0, 1))  # c, u and c - u


def centred(target, tensors, columns=None):
    return lgd.moments([t.to(target.device) for t in tensors], columns=columns, centred=True, impl=target.impl)


def check(target, tensors, columns=GUIDED):
    """Hold each product to the budget of its terms, products of deviations, and each mean to that of the deviations."""
    found = centred(target, tensors, columns)
    wide = [testing.promoted(tensor) for tensor in tensors]
    apart = [c.reshape(len(c), -1) for c in formed(wide, flat(columns, len(tensors)), torch.float64)]
    means = torch.stack([c.mean(1) for c in apart], 1)
    apart = [c - c.mean(1, keepdim=True) for c in apart]
    dots = torch.stack([torch.stack([(a * b).sum(1) for b in apart], 1) for a in apart], 1)
    terms = torch.stack([torch.stack([(a * b).abs().sum(1) for b in apart], 1) for a in apart], 1)
    spread = torch.stack([a.abs().mean(1) for a in apart], 1)
    assert found.dots.dtype == found.means.dtype == torch.float64 and found.count == apart[0].shape[1]
    arithmetic = torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32
    testing.assert_sum(found.dots.to(arithmetic), dots, terms)
    off = (found.means.cpu() - means).abs()
    unit = 2.0**-46 if arithmetic == torch.float64 else 2.0**-20
    assert bool((off <= unit * spread + 2.0**-50 * means.abs() + 1e-300).all()), off.max()


def pair(shape, dtype, generator, mean, layout="contiguous"):
    """Return c and u about a mean, u within a tenth of c."""
    c, z = (testing.sample(shape, torch.float64, generator, layout) for _ in range(2))
    return (c + mean).to(dtype), (c + mean + 0.1 * z).to(dtype)


def test_hand_worked(target):
    c, u = torch.tensor([[1.0, 3.0, 8.0], [5.0, 5.0, 5.0]]), torch.tensor([[0.0, 3.0, 0.0], [1.0, 2.0, 3.0]])
    found = centred(target, (c, u), (0, 1))
    assert found.means.tolist() == [[4.0, 1.0], [5.0, 2.0]] and found.count == 3
    expected = torch.tensor([[[26.0, -3.0], [-3.0, 6.0]], [[0.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(found.dots.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        check(target, pair(shape, dtype, generator, 100.0))


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e6])
def test_about_any_mean(target, mean, generator):
    for dtype in dtypes_of(target):
        if abs(mean) < torch.finfo(dtype).max:
            check(target, pair((2, 2500), dtype, generator, mean))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_takes_any_layout(target, layout, generator):
    for dtype in dtypes_of(target):
        check(target, pair((3, 2, 19, 23), dtype, generator, 10.0, layout))


def test_takes_mixed_dtypes_and_any_columns(target, generator):
    for one in dtypes_of(target):
        c, u = pair((2, 1100), one, generator, 30.0)
        check(target, (c, u.float()), (0, (1, 0), 1, (0, 1)))


def test_a_part_at_another_level_costs_no_digits(target, generator):
    """Take channels far apart, and a first element unlike all others, which shifts have to follow."""
    c = testing.sample((2, 4, 50, 41), torch.float32, generator)
    levels = torch.tensor([300.0, 300.0, -2.0, 300.0]).view(4, 1, 1)
    check(target, (c + levels, c * 1e-2 + levels))
    c[:, 0, 0, 0] = 200.0
    check(target, (c, c * 0.5 + 7))


@pytest.mark.parametrize("value", [0.1, 1e6, -3e-20])
def test_a_constant_has_moments_of_exactly_0(target, value, generator):
    for shape in ((2, 7), (2, 8209), (1, 3, 30, 41)):
        c, u = torch.full(shape, value), testing.sample(shape, torch.float32, generator)
        found = centred(target, (c, u), (0, 1, (0, 0)))
        dots = found.dots.cpu()
        assert not dots[:, 0].any() and not dots[:, 2].any() and dots[:, 1, 1].all()
        torch.testing.assert_close(found.means[:, 0].cpu(), c.flatten(1)[:, 0].double(), rtol=1e-15, atol=0)


def test_plain_sums_would_lose_them(generator):
    """Show that dots - sums^2 / count has an error of 3e-3 at std / mean = 1e-3, and centred moments have none."""
    c = testing.sample((8, 4096), torch.float32, generator) + 1e3
    truth = c.double().var(1, correction=0) * 4096
    plain = lgd.moments((c,))
    plain = (plain.dots[:, 0, 0] - plain.sums[:, 0] ** 2 / 4096).double()
    found = lgd.moments((c,), centred=True).dots[:, 0, 0]
    assert ((plain - truth) / truth).abs().max() > 1e-3 and ((found - truth) / truth).abs().max() < 1e-6


def test_parts_merge(target, generator):
    """Merge by Chan's formula, in any order, with an empty part: halves of latents that two devices hold."""
    c, u = pair((3, 4, 10, 21), torch.float32, generator, 1e3)
    whole = centred(target, (c, u), GUIDED)
    parts = [centred(target, (c[..., cut], u[..., cut]), GUIDED)
             for cut in (slice(0, 5), slice(5, 5), slice(5, 21))]  # fmt: skip
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]])
        assert merged.count == whole.count
        torch.testing.assert_close(merged.dots, whole.dots, rtol=1e-6, atol=0)
        torch.testing.assert_close(merged.means, whole.means, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    tensor = torch.empty(shape, device=target.device, requires_grad=True)
    found = lgd.moments((tensor, tensor), columns=(0, (0, 1)), centred=True, impl=target.impl)
    assert found.dots.shape == (shape[0], 2, 2) and not found.dots.any() and not found.means.any()
    (found.dots.sum() + found.means.sum()).backward()
    assert tensor.grad.shape == tensor.shape


def test_not_finite_is_nan(target, generator):
    for bad in (torch.inf, torch.nan):
        c = testing.sample((2, 3000), torch.float32, generator)
        c[0, 1234] = bad
        found = centred(target, (c,))
        assert found.dots[0].isnan().all() and not found.dots[1].isnan().any()


def test_gradients(target, generator):
    """Give the gradient of a variance about a large mean, twice the deviation, to 1e-6."""
    c, u = (tensor.to(target.device).requires_grad_() for tensor in pair((3, 1500), torch.float32, generator, 1e3))
    lgd.moments((c, u), columns=((0, 1), 1), centred=True, impl=target.impl).dots[:, 1, 1].sum().backward()
    expected = 2 * (u.double() - u.double().mean(1, keepdim=True))
    assert c.grad is not None and not c.grad.any()
    torch.testing.assert_close(u.grad.double(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck_twice_and_forward_mode(impl, generator):
    def call(*tensors, impl=impl):
        return tuple(lgd.moments(tensors, columns=(0, (0, 1)), centred=True, impl=impl)[:2])

    inputs = [t.requires_grad_() for t in torch.randn(2, 2, 5, generator=generator, dtype=torch.float64).unbind(0)]
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)
    forward = lambda *tensors: call(*tensors, impl=None)  # noqa: E731
    assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True, check_backward_ad=False)


def test_operator_manners(generator):
    tensors = list(torch.randn(2, 3, 40, generator=generator).unbind(0))
    arguments = tensors, [0, -1, 0, 1], None, 0, every_product(2), True, None
    torch.library.opcheck(torch.ops.lgd.moments, arguments)
    function = lambda *tensors: lgd.moments(tensors, columns=GUIDED, centred=True).dots.square().sum()  # noqa: E731
    leaves = [tensor.requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for f, e in zip(found, torch.autograd.grad(function(*leaves), leaves), strict=True):
        torch.testing.assert_close(f, e)
    a, b = (tensor.detach() for tensor in tensors)
    stacked = torch.func.vmap(lambda a: lgd.moments((a, b), centred=True).dots)(a.expand(4, 3, 40))
    torch.testing.assert_close(stacked[2], lgd.moments((a, b), centred=True).dots, rtol=1e-5, atol=1e-5)
    assert lgd.moments((a.to("meta"),), centred=True).means.shape == (3, 1)


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    tensors = torch.randn(2, 5, 40001 if target.impl == "cpu" else 3001, generator=generator).unbind(0)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(centred(target, tensors, GUIDED))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0][:2], later[:2], strict=True))
