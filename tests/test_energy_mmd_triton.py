"""energy_mmd's Triton kernels against float64: few dimensions in registers, many in tiles, in more than one block."""

import math

import pytest
import torch
from mmd import KERNELS, definition, each_kernel, terms, terms_of_slope

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.energy_mmd import reference
from lgd_kernels.runtime import impls

LIMIT = 8 * 2.0**-24


@pytest.fixture
def kernels(target, monkeypatch):
    """Return any target but the CPU, with blocks of one tile, so that a few samples fill several."""
    if target.impl != "triton":
        pytest.skip("the CPU's are tested in test_energy_mmd.py; there is none in CUDA")
    pytest.importorskip("triton")
    from lgd_kernels.ops.energy_mmd import triton_tiles

    monkeypatch.setattr(triton_tiles, "BLOCK", 64)
    monkeypatch.setattr(triton_tiles, "VALUES_BLOCK", 64)
    return target


def compare(target, x, y, kernel, precision=None, **options):
    """Compare value and gradients with float64, relative to the sizes of their terms; inputs are not modified."""
    leaves = [one.to(target.device).requires_grad_() for one in (x, y)]
    loss = lgd.energy_mmd(*leaves, kernel=kernel, impl="triton", precision=precision, **options)
    wide = [testing.promoted(one).requires_grad_() for one in (x, y)]
    truth = reference.energy_mmd(definition(*wide, kernel, **options))[0]
    assert loss.dtype == torch.float32
    assert abs(loss.item() - truth.item()) <= LIMIT * terms(*(one.detach() for one in wide), kernel)
    slopes = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True)
    for (found, true), one, other in zip(slopes, wide, wide[::-1], strict=True):
        size = terms_of_slope(one.detach(), other.detach(), kernel)
        stored = torch.finfo(found.dtype)
        rounding = stored.eps * true.abs().max().item() if found.dtype != torch.float32 else 0.0
        assert (found.cpu().double() - true).abs().max().item() <= LIMIT * size + rounding + stored.tiny
    for leaf, one in zip(leaves, (x, y), strict=True):
        assert torch.equal(leaf.detach().cpu(), one)
    with torch.no_grad():
        alone = lgd.energy_mmd(*leaves, kernel=kernel, impl="triton", precision=precision, **options)
    assert abs(alone.item() - truth.item()) <= LIMIT * terms(*(one.detach() for one in wide), kernel)


@each_kernel
def test_few_dimensions(kernel, kernels, generator):
    x, y = torch.randn(13, 2, generator=generator), torch.randn(10, 2, generator=generator)
    compare(kernels, x, y, kernel, **({"unbiased": False} if kernel == KERNELS["laplace"] else {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [3, 40])
def test_halves(D, dtype, kernels, generator):
    x, y = torch.randn(13, D, generator=generator).to(dtype), torch.randn(10, D, generator=generator)
    compare(kernels, x, y, lgd.Energy())


@pytest.mark.parametrize("options", [{"unbiased": False}, {"lam": 0.5, "target_term": False}, {"lam": 0.0}], ids=str)
@pytest.mark.parametrize("D", [1, 40])
def test_options_and_weights(D, options, kernels, generator):
    x, y = torch.randn(17, D, generator=generator) + 3, torch.randn(12, D, generator=generator) + 3
    p, q = torch.rand(17, generator=generator), torch.rand(12, generator=generator)
    compare(kernels, x, y, lgd.Energy(), x_weights=p, y_weights=q, **options)


@pytest.mark.parametrize("D, factor", [(3, 1e-30), (3, 1e38), (40, 1e-22), (40, 1e36)])
def test_weights_of_any_positive_sum(D, factor, kernels, generator):
    x, y = torch.randn(17, D, generator=generator), torch.randn(12, D, generator=generator)
    p, q = (factor * (0.1 + torch.rand(n, generator=generator)) for n in (17, 12))
    on_device = {"x_weights": p.to(kernels.device), "y_weights": q.to(kernels.device)}
    leaves = [one.to(kernels.device).requires_grad_() for one in (x, y)]
    loss = lgd.energy_mmd(*leaves, impl="triton", **on_device)
    shares = {name: one.double() / one.double().sum() for name, one in on_device.items()}
    true = lgd.energy_mmd(*leaves, impl="reference", **shares)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(true, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [None, "product", "direct"])
@pytest.mark.parametrize("kernel", [lgd.Energy(1.75), lgd.Polynomial()], ids=str)
def test_tiles(kernel, precision, kernels, generator):
    """Several blocks of them, the last ones not full, with two samples that nearly coincide."""
    x, y = torch.randn(70, 40, generator=generator), torch.randn(66, 40, generator=generator)
    if precision is None:
        y[65] = x[69] + 1e-3
    compare(kernels, x, y, kernel, precision=precision)


@pytest.mark.parametrize("D", [2, 40])
def test_batches(D, kernels, generator):
    x, y = (torch.randn(2, n, D, generator=generator).to(kernels.device).requires_grad_() for n in (11, 5))
    found = lgd.energy_mmd(x, y, batched=True, impl="triton")
    expected = lgd.energy_mmd(x, y, batched=True, impl="reference")
    torch.testing.assert_close(found, expected)
    upstream = torch.tensor([1.0, -3.0], device=kernels.device)
    slopes = (torch.autograd.grad(one, (x, y), upstream) for one in (found, expected))
    for one, true in zip(*slopes, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("D", [2, 40])
def test_coincident_points_have_slope_0(D, kernels):
    for kernel in (lgd.Energy(), lgd.Energy(0.3), lgd.Laplace(2.0)):
        x = torch.ones(3, D, device=kernels.device, requires_grad=True)
        loss = lgd.energy_mmd(x, torch.ones(4, D, device=kernels.device), kernel=kernel, impl="triton")
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6) and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("D", [2, 40])
def test_bad_values_show(D, value, kernels):
    for kernel in (lgd.Energy(), lgd.Energy(1.75), lgd.Gaussian(1.5), lgd.Polynomial()):
        x = torch.randn(5, D, device=kernels.device)
        x[2, 1] = value
        found = lgd.energy_mmd(x, torch.randn(4, D, device=kernels.device), kernel=kernel, impl="triton").item()
        vanishes = value == math.inf and isinstance(kernel, lgd.Gaussian)
        assert not math.isfinite(found) or vanishes, kernel


def test_only_what_requires_grad_gets_one(target):
    assert impls.why_not("energy_mmd", "cuda")
    if target.impl != "triton":
        pytest.skip("tested in test_energy_mmd_autograd.py")
    for D in (2, 40):
        points = [torch.randn(9, D, device=target.device) for _ in range(2)]
        both = [one.clone().requires_grad_() for one in points]
        expected = torch.autograd.grad(lgd.energy_mmd(*both, impl="triton"), both)
        for wanted in (0, 1):
            leaves = [one.clone().requires_grad_(i == wanted) for i, one in enumerate(points)]
            (found,) = torch.autograd.grad(lgd.energy_mmd(*leaves, impl="triton"), leaves[wanted])
            torch.testing.assert_close(found, expected[wanted])
