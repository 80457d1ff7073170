"""Test `scaled`, on the CPU or in Triton's interpreter."""

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.runtime import impls

IMPL = "triton" if impls.triton_interpreted() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [(7,), (3, 1000)])
def test_agrees_with_float64(dtype, row):
    x, factor = torch.randn(5, *row).to(dtype), torch.randn(5)
    for one in (x, torch.randn(5, 2, *row).to(dtype)[:, 1], torch.randn(*row, 5).to(dtype).movedim(-1, 0)):
        found = lgd.scaled(one, factor, impl=IMPL)
        expected = one.double() * factor.double().view(-1, *(1 for _ in row))
        torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_and_compilation():
    x, factor = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, requires_grad=True))
    if IMPL == "cpu":
        assert torch.autograd.gradcheck(lgd.scaled, (x, factor.double()))
        assert torch.autograd.gradgradcheck(lgd.scaled, (x, factor.double()))
        torch.library.opcheck(torch.ops.lgd.scaled.default, (x.detach(), factor.detach(), None))
    single = x.detach().float()
    compiled = torch.compile(lambda: lgd.scaled(single, factor.detach(), impl=IMPL), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), lgd.scaled(single, factor.detach()))
    assert torch.equal(torch.func.vmap(lgd.scaled)(x[None], factor[None])[0], lgd.scaled(x, factor, impl="reference"))


def test_is_found_and_refuses():
    assert "scaled" in impls.ops() and IMPL in lgd.available_impls("scaled", "cpu")
    with pytest.raises(ValueError, match=r"scaled: `factor` has shape \[4\], expected \[B\] = \[3\]"):
        lgd.scaled(torch.randn(3, 2), torch.randn(4))
