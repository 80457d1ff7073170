"""Moments of the outputs of a combine, from the same pass: of outputs that are written and of those that are not."""

import pytest
import torch
from conftest import dtypes_of
from test_combine import combine, problem, promoted
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.columns import flat, formed


def test_hand_worked(target):
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 4.0], [-1.0, 2.0]])
    k = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]] * 2)  # 4, 8 and 2, 0; 0, 2 and 2, -2
    outputs, dots, sums = combine(target, (a, b), k, moments=True)
    assert [one.tolist() for one in outputs] == [[[4.0, 8.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, -2.0]]]
    assert dots.tolist() == [[[80.0, 8.0], [8.0, 4.0]], [[4.0, -4.0], [-4.0, 8.0]]]
    assert sums.tolist() == [[12.0, 2.0], [2.0, 0.0]]
    found = combine(target, (a, b), k[:, 0], clamp=(None, 5.0), moments=True, written=0)
    assert (
        found.outputs is None and found.dots.tolist() == [[[41.0]], [[4.0]]] and found.sums.tolist() == [[9.0], [2.0]]
    )


def magnitudes(tensors, coefficients, columns=None, constant=None, noise_scale=None, source=None, **_):
    """Compute the same from the magnitudes of all terms, since outputs are sums that may cancel. z counts as 2."""
    read = [one.abs() for one in formed(tensors, flat(columns, len(tensors)), torch.float64)]
    fixed = [one.abs() for one in (constant, None if noise_scale is None else 2 * noise_scale) if one is not None]
    constant = sum(fixed[1:], fixed[0]) if fixed else None
    return lgd.combine(read, coefficients.abs(), constant=constant, source=source, moments=True, impl="reference")


def check(target, tensors, coefficients, **options):
    """Give outputs as without moments, and moments of the unrounded outputs within the budget of a sum."""
    found = combine(target, tensors, coefficients, **options, moments=True)
    plain = combine(target, tensors, coefficients, **options)
    many = isinstance(plain, tuple)
    for one, other in zip(found.outputs if many else [found.outputs], plain if many else [plain], strict=True):
        testing.assert_elementwise(one, other, other.double())
    wide = [testing.promoted(tensor) for tensor in tensors]
    truth = lgd.combine(wide, coefficients.double(), **promoted(options), moments=True, impl="reference")
    sizes = magnitudes(wide, coefficients.double(), **promoted(options))
    for one, exact, size in zip(found[1:], truth[1:], sizes[1:], strict=True):
        if options.get("noise_scale") is None:
            testing.assert_sum(one, exact, size)
        else:  # noises differ by 1e-6
            assert ((one.cpu() - exact).abs() <= 2e-6 * size + 1e-300).all()
    for written in sorted({0, len(plain) - 1}) if many else [0]:
        part = combine(target, tensors, coefficients, **options, moments=True, written=written)
        assert torch.equal(part.dots, found.dots) and torch.equal(part.sums, found.sums)
        assert part.outputs is None if not many else len(part.outputs) == written
        for one, other in zip(part.outputs or (), found.outputs, strict=False):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem(shape, dtype, generator)
        check(target, tensors, coefficients, columns=options["columns"])
        check(target, tensors, coefficients, **options)


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_several_outputs_from_gathered_samples(target, outputs, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem((4, 1100), dtype, generator, 3, outputs, [3, 0, 0, 2, 3])
        check(target, tensors, coefficients, **options)


def test_a_small_combination_keeps_its_digits(target, generator):
    """Give ||x_s - mean||^2 to 3e-5 where x_s - mean is 1e-4 of x_s. Computed from their moments it has no digits."""
    for dtype in (torch.float32, torch.bfloat16):
        x, g, z = testing.sample((3, 3, 4096), torch.float32, generator)
        x, g = x.to(dtype).float(), g.to(dtype)
        x_s = x - 0.5 * g.float() + 1e-4 * z
        k = torch.tensor([[1.0, -1.0, 0.5]] * 3)
        found = combine(target, (x_s, x, g), k, moments=True, written=0).dots[:, 0, 0].cpu().double()
        exact = (x_s.double() - x.double() + 0.5 * g.double()).square().sum(1)
        assert ((found - exact) / exact).abs().max() < 3e-5
        dots = lgd.moments((x_s, x, g)).dots  # in float32
        apart = torch.einsum("bi,bij,bj->b", k, dots, k)
        assert ((apart - exact) / exact).abs().max() > 0.1


def test_wide_is_float64_for_every_dtype(target, generator):
    """Use float64 for arithmetic, noise scale, sums and moments; outputs stay in the dtype of the first tensor."""
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem((3, 2101), dtype, generator, 3, 2, [2, 0, 0, 2, 1])
        options["noise_scale"] = None  # noises of implementations differ by 1e-6
        del options["seed"]
        found = combine(target, tensors, coefficients.double(), **options, moments=True, written=1, wide=True)
        promoted_tensors = [testing.promoted(tensor) for tensor in tensors]
        exact = lgd.combine(promoted_tensors, coefficients.double(), **promoted(options), moments=True, written=1)
        assert found.outputs[0].dtype == dtype
        testing.assert_elementwise(found.outputs[0], exact.outputs[0].to(dtype), exact.outputs[0])
        sizes = magnitudes(promoted_tensors, coefficients.double(), **promoted(options))
        for one, true, size in zip(found[1:], exact[1:], sizes[1:], strict=True):
            assert one.dtype == torch.float64
            assert ((one.cpu() - true).abs() <= 1e-13 * size).all()


@pytest.mark.parametrize("written", [0, 1, 2])
def test_gradients_agree_with_float64(target, written, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem((3, 2101), dtype, generator, 3, 2, [2, 0, 0, 2, 1])
        options["noise_scale"] = None  # noises of implementations differ by 1e-6: test_combine has their gradient
        del options["seed"]
        upstreams = [testing.sample((5, 2101), dtype, generator) for _ in range(written)]
        to_moments = [torch.randn(5, 2, 2, generator=generator) / 50, torch.randn(5, 2, generator=generator) / 50]

        def grads(
            impl, device, adapt, tensors=tensors, k=coefficients, options=options, given=upstreams, to=to_moments
        ):
            leaves = [adapt(one).to(device).requires_grad_() for one in (*tensors, k, options["constant"])]
            rest = {name: testing.moved(value, device) for name, value in options.items()} | {"constant": leaves[-1]}
            found = lgd.combine(leaves[:3], leaves[3], **rest, moments=True, written=written, impl=impl)
            found = *found.outputs, found.dots, found.sums
            return torch.autograd.grad(
                found, leaves, [one.to(device).to(f) for one, f in zip([*map(adapt, given), *to], found, strict=True)]
            )

        kernel = grads(*target, torch.Tensor.clone)
        same, truth = grads("reference", "cpu", torch.Tensor.clone), grads("reference", "cpu", testing.promoted)
        for k, r, t in zip(kernel[:3], same[:3], truth[:3], strict=True):
            testing.assert_elementwise(k, r, t, slack=1e-6 * t.abs().max().item() if dtype == torch.float32 else 0.0)
        for k, t in zip(kernel[3:], truth[3:], strict=True):
            testing.assert_sum(k, t, torch.full_like(t, 2101 * 3.0))


@pytest.mark.parametrize("outputs", [1, 2])
def test_gradients_of_moments_alone(target, outputs, generator):
    """Check that those of `wide` moments keep float64 where outputs cancel, for tensors of several dtypes, coefficients
    and a constant: float32 arithmetic would be off by 5e-3."""
    a, z = (testing.sample((3, 700), torch.float32, generator) for _ in range(2))
    tensors = [a, a + 1e-5 * z, testing.sample((3, 700), torch.bfloat16, generator)]
    k = torch.tensor([[0.3, -0.3, 1e-9], [-0.7, 0.7, 2e-9]][:outputs], dtype=torch.float64).repeat(3, 1, 1)
    constant = 1e-6 * torch.rand(3, outputs, dtype=torch.float64, generator=generator)
    inputs = [one.to(target.device).requires_grad_() for one in (*tensors, k, constant)]
    wide = [one.detach().double().cpu().requires_grad_() for one in inputs]
    upstream = torch.randn(3, outputs, outputs + 1, dtype=torch.float64, generator=generator)
    upstream[..., -1] *= 1e-6  # of the sums: as large as what comes from products
    options = dict(columns=(0, 1, (2, 1)), moments=True, written=0, wide=True)

    def grads(leaves, impl):
        found = lgd.combine(leaves[:3], leaves[3], constant=leaves[4], **options, impl=impl)
        made = torch.cat((found.dots, found.sums.unsqueeze(-1)), -1)
        return torch.autograd.grad((made * upstream.to(made.device)).sum(), leaves)

    for found, expected in zip(grads(inputs, target.impl), grads(wide, "reference"), strict=True):
        tolerance = max(1e-6, torch.finfo(found.dtype).eps)
        size = expected.abs().max().item()
        torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("written", [0, 1])
@pytest.mark.parametrize("clamp", [None, (-1.5, 1.0)], ids=["free", "clamped"])
def test_gradcheck_twice_and_forward_mode(impl, written, clamp, generator):
    tensors, coefficients, options = problem((3, 5), torch.float64, generator, 2, 2, [2, 0, 0, 1])
    inputs = [one.requires_grad_() for one in (*tensors, coefficients, options["constant"], options["noise_scale"])]

    def call(a, b, k, constant, noise_scale, impl=impl):
        rest = options | {"constant": constant, "noise_scale": noise_scale, "clamp": clamp}
        found = lgd.combine((a, b), k, **rest, moments=True, written=written, impl=impl)
        return *found.outputs, found.dots, found.sums

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    forward = lambda *inputs: call(*inputs, impl=None)  # noqa: E731
    assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    tensor = torch.empty(shape, device=target.device, requires_grad=True)
    found = lgd.combine((tensor,), torch.ones(shape[0], 1, device=target.device), moments=True, impl=target.impl)
    assert found.outputs.shape == shape and found.dots.shape == (shape[0], 1, 1) and not found.dots.any()
    (found.dots.sum() + found.sums.sum()).backward()
    assert tensor.grad.shape == shape


def test_operator_manners(generator):
    tensors, coefficients, options = problem((3, 5), torch.float64, generator, 2, 2, [2, 0, 0, 1])
    scalars = options["constant"], options["noise_scale"]
    for written in (0, 1, 2):
        read = tensors, [0, -1, 1, -1, 0, 1], options["source"], len(tensors)
        rest = coefficients, *scalars, None, 5, 0, -3.0, 2.0
        torch.library.opcheck(torch.ops.lgd.combine_moments, (*read, *rest, torch.float64, written, False, None))
    narrow = [tensor.float() for tensor in tensors], *read[1:]
    torch.library.opcheck(torch.ops.lgd.combine_moments, (*narrow, *rest, torch.float32, 1, True, None))


def test_a_source_that_is_not_there_gives_nan(target):
    """Call the operator itself, which cannot read the source."""
    tensor, one = torch.ones(2, 600, device=target.device), torch.ones(3, 1, 1, device=target.device)
    source = torch.tensor([1, 2, -1], device=target.device)
    rest = None, None, None, None, 0, -torch.inf, torch.inf, torch.float32, 0, False, target.impl
    found = torch.ops.lgd.combine_moments([tensor], [0, -1], source, 1, one, *rest)[1]
    assert found[0].tolist() == [600.0, 600.0] and found[1:].isnan().all()


def test_compiles_without_breaks(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lgd.combine, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 4, 5):
        tensors, k = torch.randn(2, batch, 10, generator=generator).unbind(0), torch.ones(batch, 2, 2)
        found, expected = (one(tensors, k, moments=True, written=1) for one in (compiled, lgd.combine))
        assert torch.equal(found.outputs[0], expected.outputs[0]) and torch.equal(found.dots, expected.dots)
    assert counter.frame_count == 1
    k = torch.ones(5, 2, requires_grad=True)
    square = lambda k: lgd.combine(tensors, k, moments=True, written=0).dots.sum()  # noqa: E731
    grads = [torch.autograd.grad(one(k), k)[0] for one in (torch.compile(square, fullgraph=True), square)]
    torch.testing.assert_close(*grads)


def test_transforms(generator):
    a, b = torch.randn(2, 3, 5, generator=generator).unbind(0)
    k = torch.randn(3, 2, generator=generator)
    square = lambda a: lgd.combine((a, b), k, moments=True, written=0).dots[:, 0, 0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(square)(a.expand(4, 3, 5))[2], square(a))
    made = lgd.combine((a, b), k)
    torch.testing.assert_close(torch.func.grad(lambda a: square(a).sum())(a), 2 * k[:, :1] * made)


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    shape = (5, 40001 if target.impl == "cpu" else 3001)
    tensors, coefficients, options = problem(shape, torch.float32, generator, 3, 2, [4, 4, 0])
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        made = combine(target, tensors, coefficients, **options, moments=True, written=1)
        found.append((*made.outputs, made.dots, made.sums))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


def test_refuses():
    tensor, k = torch.ones(2, 3), torch.ones(2, 2, 1)
    with pytest.raises(ValueError, match="`written` is 1 without moments"):
        lgd.combine((tensor,), k, written=1)
    for written in (3, -1, True, 1.0):
        with pytest.raises(ValueError, match="expected how many of the 2 outputs, 0 to 2"):
            lgd.combine((tensor,), k, moments=True, written=written)
