"""energy_mmd: gradients, the behaviour of the operator under PyTorch, memory and refusals."""

import math

import pytest
import torch
from mmd import OPTIONS, definition, each_kernel
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from benchmarks import timing
from lgd_kernels.ops.energy_mmd import reference
from lgd_kernels.ops.energy_mmd.kernels import KINDS
from lgd_kernels.runtime import impls


@pytest.fixture(params=["cpu", "reference"])
def impl(request):
    return request.param


def test_only_what_requires_grad_gets_one(impl):
    for wanted in ((0,), (1,), (0, 1)):
        for D in (2, 80):
            leaves = [torch.randn(70, D).requires_grad_(i in wanted) for i in range(2)]
            lgd.energy_mmd(*leaves, impl=impl).backward()
            assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(2)]
            both = [leaf.detach().requires_grad_() for leaf in leaves]
            expected = torch.autograd.grad(lgd.energy_mmd(*both, impl=impl), both)
            for i in wanted:
                torch.testing.assert_close(leaves[i].grad, expected[i])


@each_kernel
def test_gradcheck_twice_and_forward_mode(kernel, impl, generator):
    x, y = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (3, 4))

    def call(x, y, impl=impl):
        return lgd.energy_mmd(x, y, kernel=kernel, lam=0.7, unbiased=False, batched=True, impl=impl)

    assert torch.autograd.gradcheck(call, (x, y))
    assert torch.autograd.gradgradcheck(call, (x, y))
    assert torch.autograd.gradcheck(
        lambda x, y: call(x, y, None), (x, y), check_forward_ad=True, check_backward_ad=False
    )


@each_kernel
def test_the_references_gradients_are_its_own(kernel, generator):
    """Compare the formula that the operator runs without a kernel with autograd."""
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    for options in OPTIONS:
        found = reference.energy_mmd_gradients(definition(x.detach(), y.detach(), kernel, **options))
        loss = reference.energy_mmd(definition(x, y, kernel, **options))
        for one, true in zip(found, torch.autograd.grad(loss, (x, y)), strict=True):
            torch.testing.assert_close(one[0], true)


def test_one_tensor_may_be_both(impl, generator):
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(lgd.energy_mmd(x, x, impl=impl), x, create_graph=True)
    parts = [x.detach().requires_grad_() for _ in range(2)]
    torch.testing.assert_close(grad, sum(torch.autograd.grad(lgd.energy_mmd(*parts), parts)))
    assert grad.square().sum().requires_grad


def test_operator_manners(generator):
    x, y = (torch.randn(2, n, 3, generator=generator) for n in (5, 4))
    for wanted in ([False, False], [True, True], [False, True]):
        for impl in ("cpu", "reference"):
            arguments = x, y, torch.rand(2, 5), None, "energy", [1.0], 1.0, True, True, True, None, wanted, impl
            torch.library.opcheck(torch.ops.lgd.energy_mmd, arguments)


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lgd.energy_mmd, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for n in (5, 6, 7, 8):
        x, y = torch.randn(n, 3, generator=generator), torch.randn(n + 3, 3, generator=generator)
        assert torch.equal(compiled(x, y), lgd.energy_mmd(x, y))
        counts.add(counter.frame_count)
    assert len(counts) == 1  # the first call compiles, no later one does
    x.requires_grad_()
    (found,) = torch.autograd.grad(torch.compile(lgd.energy_mmd, fullgraph=True)(x, y).square(), x)
    torch.testing.assert_close(found, torch.autograd.grad(lgd.energy_mmd(x, y).square(), x)[0])


def test_transforms_go_through_the_reference(generator):
    x, y = torch.randn(4, 5, 3, generator=generator), torch.randn(6, 3, generator=generator)
    stacked = torch.func.vmap(lgd.energy_mmd, in_dims=(0, None))(x, y)
    torch.testing.assert_close(stacked[2], lgd.energy_mmd(x[2], y))
    grad = torch.func.grad(lgd.energy_mmd)(x[0], y)
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(lgd.energy_mmd(leaf, y), leaf)[0])
    with pytest.raises(ValueError, match="no rule for vmap"):
        torch.func.grad(lambda x: lgd.energy_mmd(x, y, impl="cpu"))(x[0])


def test_inference_mode_meta_and_autocast(generator):
    x, y = torch.randn(5, 80, generator=generator), torch.randn(90, 80, generator=generator)
    with torch.inference_mode():
        inferred = lgd.energy_mmd(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lgd.energy_mmd(x, y)
    assert torch.equal(inferred, cast) and cast.dtype == torch.float32
    assert lgd.energy_mmd(x.to("meta"), y.to("meta")).shape == ()


@pytest.mark.parametrize("D", [2, 80])
def test_writes_only_its_output_and_reads_no_stale_memory(D, generator, poisoned):
    """Fresh allocations are poisoned; inputs lie between sentinels and are not changed."""
    held = torch.full((400, D), torch.nan)
    held[100:300] = torch.randn(200, D, generator=generator)
    before = held.clone()
    x, y = held[100:200].requires_grad_(), held[200:300].requires_grad_()
    expected = lgd.energy_mmd(x, y, impl="reference")
    slopes = torch.autograd.grad(expected, (x, y))
    loss = lgd.energy_mmd(x, y, impl="cpu")
    torch.testing.assert_close(loss, expected)
    for found, true in zip(torch.autograd.grad(loss, (x, y)), slopes, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-6)
    assert [storage.nbytes() for storage in poisoned.values()].count(4 * x.numel()) >= 2  # the slopes of both
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.extension
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_memory_of_products_is_a_block(offset):
    """Beside the gradients; where samples are centred, two blocks of them."""
    rows, D = impls.launcher("energy_mmd", "cpu").BLOCK, 400
    x, y = (torch.randn(2 * rows, D) + offset for _ in range(2))
    block = 4 * (rows * rows + (2 * rows * D if offset else 0))
    few = 4 * 10 * len(x) + 2**21  # norms, weights; what norms are made of
    assert timing.peak_memory(lambda: lgd.energy_mmd(x, y, impl="cpu"), "cpu") < block + few
    both = [one.requires_grad_() for one in (x, y)]
    block += 4 * (2 * rows * D + x.numel() + y.numel())
    assert timing.peak_memory(lambda: torch.autograd.grad(lgd.energy_mmd(*both, impl="cpu"), both), "cpu") < block + few


def test_same_bits_twice_and_for_any_thread_count(generator):
    for B, n, k in ((1, 1500, 1100), (1, 9000, 100), (1, 100, 3000), (5, 70, 130)):
        x = torch.randn(B, n, 3, generator=generator, requires_grad=True)
        y = torch.randn(B, k, 3, generator=generator, requires_grad=True)
        found = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            loss = lgd.energy_mmd(x, y, batched=True, impl="cpu")
            found.append((loss, *torch.autograd.grad(loss.sum(), (x, y))))
        assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


def test_without_the_extension(monkeypatch):
    """The operator runs the reference and its formula of the gradient."""
    monkeypatch.setattr(impls, "_load", lambda name: (None, "not built (as if)"))
    impls._choose.cache_clear()
    x = torch.tensor([[0.0], [2.0]], requires_grad=True)
    loss = lgd.energy_mmd(x, torch.tensor([[3.0], [4.0]]))
    loss.backward()
    impls._choose.cache_clear()
    assert loss.item() == 1.0
    torch.testing.assert_close(x.grad, torch.tensor([[0.0], [-1.0]]))  # -1/2 + 1/2; -1/2 - 1/2


@pytest.mark.parametrize("D", [3, 80])
def test_autocast_changes_no_bit(D, impl, generator):
    """Forward, backward and the gradient of a gradient."""
    x, y = (torch.randn(n, D, generator=generator).requires_grad_() for n in (70, 66))

    def call():
        loss = lgd.energy_mmd(x, y, beta=1.75, impl=impl)
        first = torch.autograd.grad(loss, (x, y), create_graph=True)
        return loss, *first, *torch.autograd.grad(first[0].square().sum(), (x, y))

    expected = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call()
    assert all(map(torch.equal, found, expected))


def test_why_not():
    assert lgd.why_not("energy_mmd", "cuda") == ["energy_mmd has no 'cuda' implementation in this version"]
    assert list(KINDS) == ["energy", "gaussian", "laplace", "rational", "polynomial"]  # enum MmdKernels


CASES = {
    "dimension": (dict(y=torch.ones(4, 2)), ValueError, r"`y` has shape \[4, 2\], expected \[k, 3\] to go with `x`"),
    "batch": (dict(batched=True), ValueError, r"`x` has shape \[\d\]|expected \[4, k\]"),
    "integers": (dict(x=torch.ones(4, 3, dtype=torch.int64)), TypeError, "`x` has dtype torch.int64, expected"),
    "not a tensor": (dict(y=1.0), TypeError, r"`y` is a float, expected a tensor \[n, ...\]"),
    "no samples": (dict(x=torch.ones(0, 3)), ValueError, r"`x` has shape \[0, 3\], expected .* one sample or more"),
    "device": (dict(y=torch.ones(5, 3, device="meta")), ValueError, "`y` is on meta, expected cpu"),
    "one sample": (dict(x=torch.ones(1, 3)), ValueError, "`x` holds one sample.*lam=0"),
    "one target": (dict(y=torch.ones(1, 3)), ValueError, "`y` holds one sample.*target_term=False"),
    "beta": (dict(beta=2.5), ValueError, r"`beta` is 2.5, expected a power in \(0, 2\]"),
    "lam": (dict(lam=-0.1), ValueError, "`lam` is -0.1, expected a weight"),
    "beta and kernel": (dict(beta=1.5, kernel=lgd.Gaussian()), ValueError, "`beta` is 1.5 beside a `kernel`"),
    "kernel": (dict(kernel="gaussian"), TypeError, "`kernel` is a str, expected one of Energy, Gaussian"),
    "kernel's beta": (dict(kernel=lgd.Energy(0.0)), ValueError, "`beta` is 0.0, expected a power"),
    "bandwidth": (dict(kernel=lgd.Gaussian(0.0)), ValueError, "expected bandwidths .* positive"),
    "no bandwidths": (dict(kernel=lgd.Gaussian(())), ValueError, "expected bandwidths"),
    "degree": (dict(kernel=lgd.Polynomial(0)), ValueError, "`kernel` has degree 0"),
    "unbiased": (dict(unbiased=1), TypeError, "`unbiased` is a int, expected True or False"),
    "weights": (
        dict(x_weights=torch.ones(3)),
        ValueError,
        r"`x_weights` has shape \[3\], expected \[4\], one for each",
    ),
    "negative": (dict(y_weights=-torch.ones(5)), ValueError, "`y_weights` has the value -1, expected weights of 0"),
    "infinite": (dict(x_weights=torch.tensor([1, 1, math.inf, 1])), ValueError, "`x_weights` has the value inf"),
    "not a number": (dict(y_weights=torch.full((5,), math.nan)), ValueError, "`y_weights` has the value nan, expected"),
    "no weight": (
        dict(x_weights=torch.zeros(4)),
        ValueError,
        "`x_weights` has the sum 0, expected .* positive, finite",
    ),
    "no weight, nothing within": (dict(y_weights=torch.zeros(5), lam=0.0), ValueError, "`y_weights` has the sum 0"),
    "no weight in one problem": (
        dict(
            x=torch.ones(2, 2, 3),
            y=torch.ones(2, 3, 3),
            x_weights=torch.eye(2) * 0 + torch.tensor([[1.0], [0.0]]),
            batched=True,
        ),
        ValueError,
        "`x_weights` has the sum 0",
    ),
    "weights of an infinite sum": (
        dict(y_weights=torch.full((5,), 1e308, dtype=torch.float64)),
        ValueError,
        "has the sum inf.*divide by the largest",
    ),
    "weight of one": (
        dict(x_weights=torch.tensor([0.0, 2, 0, 1e-20])),
        ValueError,
        "`x_weights` gives one sample all the weight.*lam=0",
    ),
    "weight of one target": (
        dict(y_weights=torch.eye(5)[1]),
        ValueError,
        "`y_weights` gives one sample all the weight.*target_term=False",
    ),
    "weights' gradient": (dict(y_weights=torch.ones(5, requires_grad=True)), ValueError, "`y_weights` requires grad"),
    "precision": (dict(precision="fast"), ValueError, "`precision` is 'fast', expected None, 'direct' or 'product'"),
    "impl": (dict(impl="fast"), ValueError, "`impl` is 'fast', expected None or one of cuda, triton, cpu, reference"),
    "impl cannot": (dict(impl="cuda"), ValueError, "energy_mmd has no 'cuda' implementation in this version"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        lgd.energy_mmd(**(dict(x=torch.ones(4, 3), y=torch.ones(5, 3)) | change))
