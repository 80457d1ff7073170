"""Per-sample linear combinations of columns, with noise drawn in the kernel."""

import pytest
import torch
from conftest import address, dtypes_of
from torch._dynamo.testing import CompileCounterWithBackend

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime.philox import STREAM_STEP


def combine(target, tensors, coefficients, **options):
    """Combine on the target's device, by the target's implementation."""
    options = {name: testing.moved(value, target.device) for name, value in options.items()}
    tensors = [tensor.to(target.device) for tensor in tensors]
    return lgd.combine(tensors, coefficients.to(target.device), **options, impl=target.impl)


def problem(shape, dtype, generator, count=3, outputs=None, source=None, layout="contiguous"):
    """Return (tensors, coefficients, options) with every option set."""
    tensors = [testing.sample(shape, dtype, generator, layout) for _ in range(count)]
    batch = shape[0] if source is None else len(source)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (batch,) if outputs is None else (batch, outputs)
    columns = [*range(count), (0, count - 1)]
    options = {
        "columns": columns,
        "constant": torch.randn(lead, generator=generator, dtype=wide),
        "noise_scale": torch.rand(lead, generator=generator, dtype=wide),
        "seed": 5,
        "clamp": (-3.0, None),
    }
    if source is not None:
        options["source"] = torch.tensor(source)
    return tensors, torch.randn(*lead, len(columns), generator=generator, dtype=wide), options


def promoted(options):
    return {name: testing.promoted(value) for name, value in options.items()}


def check(target, tensors, coefficients, **options):
    """Allow 1e-6 more for the noise, which implementations draw with that difference."""
    found = combine(target, tensors, coefficients, **options)
    same = lgd.combine(tensors, coefficients, **options, impl="reference")
    wide = [testing.promoted(tensor) for tensor in tensors]
    truth = lgd.combine(wide, coefficients.double(), **promoted(options), impl="reference")
    many = isinstance(found, tuple)
    for k, r, t in zip(*((each if many else (each,)) for each in (found, same, truth)), strict=True):
        testing.assert_elementwise(k, r, t, slack=2e-6 if options.get("noise_scale") is not None else 0.0)
        assert k.is_contiguous()


def test_hand_worked(target):
    c, u = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 4.0], [-1.0, 2.0]])
    coefficients = torch.tensor([[1.0, 0.5], [2.0, -1.0]])
    found = combine(target, (c, u), coefficients, columns=(0, (0, 1)), constant=torch.tensor([0.0, 10.0]))
    assert found.tolist() == [[4.0, 4.0], [10.0, 12.0]]  # 3 + .5 * 2, 4; 2 * 1 - 2 + 10, 0 + 2 + 10
    found = combine(target, (c, u), coefficients, source=torch.tensor([1, 1]), clamp=(-0.5, 2.0))
    assert found.tolist() == [[0.5, 1.0], [2.0, -0.5]]  # 1 - .5, 1; 2 + 1 held at 2, -2 held at -.5
    both = combine(target, (c, u), torch.tensor([[[1.0, 1.0], [0.0, 2.0]]] * 2))
    assert [one.tolist() for one in both] == [[[4.0, 8.0], [0.0, 2.0]], [[2.0, 8.0], [-2.0, 4.0]]]


def test_noise_is_that_of_philox_normal(target):
    zero = torch.zeros(3, 1001)
    options = dict(noise_scale=torch.tensor([1.0, 0.0, 2.0]), seed=9, first_sample=4)
    found = combine(target, (zero,), torch.ones(3, 1), **options).cpu()
    z = lgd.philox_normal((3, 1001), 9, stream=STREAM_STEP, first_sample=4)
    torch.testing.assert_close(found, z * torch.tensor([[1.0], [0.0], [2.0]]), rtol=0, atol=1e-5)
    seeds = torch.tensor([9, 8, 9])
    found = combine(target, (zero,), torch.ones(3, 1), noise_scale=1.0, seed=seeds).cpu()
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_a_scale_that_half_coefficients_cannot_hold(target):
    """Round 1e5 to inf in float16."""
    z = lgd.philox_normal((2, 6), 3, stream=1)
    for dtype in (torch.float16, torch.bfloat16):
        found = combine(target, (torch.zeros(2, 6),), torch.ones(2, 1, dtype=dtype), noise_scale=100001.0, seed=3)
        torch.testing.assert_close(found.cpu(), 100001.0 * z, rtol=2e-6, atol=0.2)


def test_a_guided_step_is_a_combine(target, generator):
    x, c, u = (testing.sample((3, 40), torch.float32, generator) for _ in range(3))
    levels, omega = testing.step_levels(3), torch.tensor([0.5, 1.0, 2.0])
    step = lgd.guided_step(x, c, u, omega, levels, churn=1.0, seed=3)
    from lgd_kernels.runtime.levels import step_coefficients

    a, b, v = step_coefficients(levels, "x0", 1.0)
    found = combine(target, (x, c, u), torch.stack((a, b, b * omega), 1), columns=(0, 1, (1, 2)), noise_scale=v, seed=3)
    torch.testing.assert_close(found.cpu(), step, rtol=1e-6, atol=2e-6)


def test_laws(target, generator):
    """Check that outputs are linear in the coefficients, one sample changes no other, and a source is that sample."""
    tensors = [testing.sample((3, 700), torch.float32, generator) for _ in range(4)]
    coefficients = torch.randn(3, 4, generator=generator)
    found = combine(target, tensors, coefficients)
    assert torch.equal(combine(target, tensors, 2 * coefficients), 2 * found)
    source = torch.tensor([2, 0, 0, 1])
    assert torch.equal(combine(target, tensors, coefficients[source], source=source).cpu(), found.cpu()[source])
    tensors[2][1] = 9.0
    after = combine(target, tensors, coefficients)
    assert torch.equal(after[[0, 2]], found[[0, 2]]) and not torch.equal(after[1], found[1])


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem(shape, dtype, generator)
        check(target, tensors, coefficients, columns=options["columns"])
        check(target, tensors, coefficients, **options)


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_columns(target, count, generator):
    for dtype in dtypes_of(target)[:2]:
        tensors = [testing.sample((2, 1500), dtype, generator) for _ in range(count)]
        coefficients = torch.randn(2, count, generator=generator)
        check(target, tensors, coefficients)
        check(target, tensors, coefficients, columns=[(n, (n + 1) % count) for n in range(count)])
        check(target, tensors, coefficients, columns=[n if n % 2 else (n, (n + 1) % count) for n in range(count)])


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_several_outputs_from_gathered_samples(target, outputs, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem((4, 1100), dtype, generator, 3, outputs, [3, 0, 0, 2, 3])
        check(target, tensors, coefficients, **options)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_takes_any_layout(target, layout, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem((3, 2, 19, 23), dtype, generator, layout=layout)
        check(target, tensors, coefficients, columns=options["columns"], source=torch.tensor([1, 1, 2]))


def test_takes_mixed_dtypes(target, generator):
    for one in dtypes_of(target):
        for other in dtypes_of(target):
            tensors = testing.sample((2, 1100), one, generator), testing.sample((2, 1100), other, generator)
            check(target, tensors, torch.tensor([[1.0, 0.5], [2.0, -1.0]]).to(other), columns=(0, (0, 1)))


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    tensor = torch.empty(shape, device=target.device, requires_grad=True)
    coefficients = torch.ones(shape[0], 1, device=target.device, requires_grad=True)
    found = lgd.combine((tensor,), coefficients, impl=target.impl)
    assert found.shape == shape
    found.sum().backward()
    assert torch.equal(coefficients.grad, torch.zeros_like(coefficients)) and tensor.grad.shape == shape


def test_no_outputs(target):
    tensor = torch.ones(2, 3, device=target.device)
    nothing = torch.empty(0, dtype=torch.int64, device=target.device)
    assert lgd.combine((tensor,), tensor[:0, :1], source=nothing, impl=target.impl).shape == (0, 3)


@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("source", [None, [2, 0, 0, 2, 1]], ids=["own", "gathered"])
def test_gradients_agree_with_float64(target, source, outputs, generator):
    for dtype in dtypes_of(target):
        tensors, coefficients, options = problem((3, 2101), dtype, generator, 3, outputs, source)
        shape = (coefficients.shape[0], 2101)
        upstreams = [testing.sample(shape, dtype, generator) for _ in range(outputs or 1)]

        def grads(impl, device, adapt, tensors=tensors, k=coefficients, options=options, upstreams=upstreams):
            leaves = [adapt(one).to(device).requires_grad_()
                      for one in (*tensors, k, options["constant"], options["noise_scale"])]  # fmt: skip
            rest = options | {"constant": leaves[-2], "noise_scale": leaves[-1]}
            rest = {name: testing.moved(value, device) for name, value in rest.items()}
            found = lgd.combine(leaves[:3], leaves[3], **rest, impl=impl)
            found = found if outputs else (found,)
            return torch.autograd.grad(found, leaves, [adapt(one).to(device) for one in upstreams])

        kernel = grads(*target, torch.Tensor.clone)
        same, truth = grads("reference", "cpu", torch.Tensor.clone), grads("reference", "cpu", testing.promoted)
        for k, r, t in zip(kernel[:3], same[:3], truth[:3], strict=True):
            testing.assert_elementwise(k, r, t, slack=1e-6 if dtype == torch.float32 else 0.0)
        terms = 2101 * 3.0  # three columns, each about as large as 1
        for k, t in zip(kernel[3:5], truth[3:5], strict=True):
            testing.assert_sum(k, t, torch.full_like(t, terms))
        assert (kernel[5].cpu() - truth[5]).abs().max() <= 2e-6 * terms  # of the noise itself


def float64_problem(generator):
    tensors, coefficients, options = problem((3, 5), torch.float64, generator, 3, 2, [2, 0, 0, 1])
    inputs = [*tensors, coefficients, options["constant"], options["noise_scale"]]
    return [one.requires_grad_() for one in inputs], options


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck_twice_and_forward_mode(impl, generator):
    inputs, options = float64_problem(generator)

    def call(a, b, c, coefficients, constant, noise_scale, impl=impl):
        rest = options | {"constant": constant, "noise_scale": noise_scale}
        return lgd.combine((a, b, c), coefficients, **rest, impl=impl)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    forward = lambda *inputs: call(*inputs, impl=None)  # noqa: E731
    assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True, check_backward_ad=False)


def test_moments_and_combine_are_each_others_backward(target, generator):
    """Compare d combine / d coefficients with moments, and d moments / d tensors with a combine."""
    a, b, d = (testing.sample((2, 900), torch.float32, generator).to(target.device) for _ in range(3))
    coefficients = torch.ones(2, 2, device=target.device, requires_grad=True)
    (found,) = torch.autograd.grad(lgd.combine((a, b), coefficients, impl=target.impl), coefficients, d)
    expected = lgd.moments((a, b, d), impl=target.impl).dots[:, 2, :2]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    a = a.requires_grad_()
    upstream = torch.randn(2, 2, 2, generator=generator).to(target.device)
    (found,) = torch.autograd.grad(lgd.moments((a, b), impl=target.impl).dots, a, upstream)
    both = torch.stack((2 * upstream[:, 0, 0], upstream[:, 0, 1] + upstream[:, 1, 0]), 1)
    torch.testing.assert_close(found, lgd.combine((a.detach(), b), both, impl=target.impl), rtol=1e-6, atol=1e-6)


def test_a_clamp_masks(target):
    tensor = torch.tensor([[-2.0, 0.5, 3.0]], device=target.device, requires_grad=True)
    coefficients = torch.ones(1, 1, device=target.device, requires_grad=True)
    lgd.combine((tensor,), coefficients, clamp=(-1, 1), impl=target.impl).sum().backward()
    assert tensor.grad.tolist() == [[0.0, 1.0, 0.0]] and coefficients.grad.item() == 0.5


def test_only_what_requires_grad_gets_one(target, generator):
    data = [*testing.sample((2, 2, 50), torch.float32, generator).unbind(0), torch.ones(2, 2), torch.ones(2)]
    for wanted in ((0,), (1,), (2,), (3,), (0, 2)):
        leaves = [one.to(target.device).clone().requires_grad_(n in wanted) for n, one in enumerate(data)]
        lgd.combine(leaves[:2], leaves[2], noise_scale=leaves[3], seed=1, impl=target.impl).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [n in wanted for n in range(4)]


def test_operator_manners(generator):
    inputs, options = float64_problem(generator)
    a, b, c, *rest = (one.detach() for one in inputs)
    coefficients, constant, scale = rest
    columns = [0, -1, 1, -1, 2, -1, 0, 2]
    for seed in ((None, 5), (torch.tensor([1, 2, 3, 4]), None)):
        arguments = [a, b, c], columns, options["source"], 3, coefficients, constant, scale, *seed, 0, -3.0, 2.0
        torch.library.opcheck(torch.ops.lgd.combine, (*arguments, torch.float64, None))


def test_compiles_without_breaks_or_recompiles(generator):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lgd.combine, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 4, 5, 6):
        tensors, coefficients = torch.randn(2, batch, 10, generator=generator).unbind(0), torch.ones(batch, 2)
        options = dict(noise_scale=torch.ones(batch), seed=10 * batch)
        assert torch.equal(compiled(tensors, coefficients, **options), lgd.combine(tensors, coefficients, **options))
    assert counter.frame_count == 1

    inputs = [one.detach().float().requires_grad_() for one in float64_problem(generator)[0]]
    source = torch.tensor([2, 0, 0, 1])
    function = lambda a, b, c, k, *rest: lgd.combine((a, b, c), k[..., :3], source=source)[1].square().sum()  # noqa: E731
    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(*inputs), inputs[:4])
    for f, e in zip(found, torch.autograd.grad(function(*inputs), inputs[:4]), strict=True):
        torch.testing.assert_close(f, e)


def test_transforms_inference_mode_and_meta(generator):
    a, b = torch.randn(2, 3, 5, generator=generator).unbind(0)
    k = torch.randn(3, 2, generator=generator)
    stacked = torch.func.vmap(lambda a: lgd.combine((a, b), k))(a.expand(4, 3, 5))
    torch.testing.assert_close(stacked[2], lgd.combine((a, b), k))
    grad = torch.func.grad(lambda k: lgd.combine((a, b), k).sum())(k)
    torch.testing.assert_close(grad, torch.stack((a.sum(1), b.sum(1)), 1))
    with pytest.raises(ValueError, match="`seed` under vmap would draw the same noise"):
        torch.func.vmap(lambda a: lgd.combine((a,), k[:, :1], noise_scale=1.0, seed=1))(a.expand(4, 3, 5))
    with torch.inference_mode():
        assert lgd.combine((a, b), k).shape == (3, 5)
    assert lgd.combine((a.to("meta"),), k[:, :1].to("meta")).shape == (3, 5)


def test_writes_only_its_output_and_reads_no_stale_memory(target, generator, poisoned):
    held = torch.full((2, 3000), torch.nan)
    held[:, 500:2500] = torch.randn(2, 2000, generator=generator)
    held = held.to(target.device)
    tensors, before = (held[:1, 500:2500], held[1:, 500:2500]), held.clone()
    k = torch.tensor([[1.0, 2.0]], device=target.device)
    found = lgd.combine(tensors, k, impl=target.impl)
    assert address(found) in poisoned
    torch.testing.assert_close(found, tensors[0] + 2 * tensors[1])
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_source_that_is_not_there_gives_nan(target):
    """Call the operator itself, which cannot read the source."""
    tensor = torch.ones(2, 600, device=target.device)
    source = torch.tensor([1, 2, -1], device=target.device)
    one = torch.ones(3, 1, 1, device=target.device)
    rest = None, None, None, None, 0, -torch.inf, torch.inf, torch.float32, target.impl
    found = torch.ops.lgd.combine([tensor], [0, -1], source, 1, one, *rest)[0]
    assert (found[0] == 1).all() and found[1:].isnan().all()
    found = torch.ops.lgd.moments([tensor], [0, -1], source, 1, [0, 0], False, target.impl)
    assert found[0] == 600 and found[1:].isnan().all()


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    shape = (5, 40001 if target.impl == "cpu" else 3001)
    tensors, coefficients, options = problem(shape, torch.float32, generator, 3, 2, [4, 4, 0])
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(combine(target, tensors, coefficients, **options))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


TENSOR = torch.ones(2, 3)
CASES = {
    "coefficients kind": (dict(coefficients=[1.0, 1.0]), TypeError, "`coefficients` is a list, expected a tensor"),
    "coefficients": (dict(coefficients=torch.ones(2, 3)), ValueError, r"`coefficients` has shape \[2, 3\].*\[2, 2\]"),
    "outputs": (dict(coefficients=torch.ones(2, 9, 2)), ValueError, "P outputs, up to 8"),
    "integers": (dict(coefficients=torch.ones(2, 2).long()), TypeError, "`coefficients` has dtype torch.int64"),
    "constant": (dict(constant=torch.ones(3)), ValueError, r"`constant` has shape \[3\], expected \[2\]"),
    "constant kind": (dict(constant=1.0), TypeError, "`constant` is a float, expected a tensor"),
    "scale alone": (dict(noise_scale=1.0), ValueError, "`noise_scale` was given without `seed`"),
    "seed alone": (dict(seed=1), ValueError, "`seed` was given without `noise_scale`"),
    "seed": (dict(seed=1.5, noise_scale=1.0), TypeError, "`seed` is a float"),
    "scale": (dict(seed=1, noise_scale=torch.ones(2, 2)), ValueError, r"`noise_scale` has shape \[2, 2\]"),
    "source kind": (dict(source=[0, 1]), TypeError, "`source` is a list, expected an int64 tensor"),
    "source dtype": (dict(source=torch.ones(2)), TypeError, r"`source` has dtype torch.float32.*long\(\)"),
    "source range": (dict(source=torch.tensor([0, 2])), ValueError, "expected indices from 0 to 1"),
    "clamp": (dict(clamp=1.0), TypeError, r"`clamp` is 1.0, expected \(low, high\)"),
    "clamp order": (dict(clamp=(1, 0)), ValueError, "expected low <= high"),
    "columns": (dict(columns=(0, (0, 2))), ValueError, r"`columns\[1\]` is \(0, 2\)"),
    "device": (dict(coefficients=torch.ones(2, 2, device="meta")), ValueError, "`coefficients` is on meta"),
    "impl": (dict(impl="cuda"), ValueError, "combine has no 'cuda' implementation"),
}  # fmt: skip


@pytest.mark.extension
def test_the_kernel_refuses_other_columns_than_it_has_coefficients_for():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="coefficients .* of another K than there are columns"):
        rest = None, None, None, None, 0, -1e9, 1e9, x.dtype, "cpu"
        torch.ops.lgd.combine([x, x], [0, -1, 1, -1], None, 0, torch.ones(2, 1, 1), *rest)


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    change, error, message = CASES[case]
    arguments = dict(tensors=(TENSOR, TENSOR), coefficients=torch.ones(2, 2)) | change
    with pytest.raises(error, match=message):
        lgd.combine(**arguments)
