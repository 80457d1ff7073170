"""x_s = a x + b (cond + omega (cond - uncond)) + v z."""

import itertools
import math

import pytest
import torch
from conftest import address, dtypes_of

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.guided_step import reference
from lgd_kernels.ops.guided_step.structs import GuidedStep
from lgd_kernels.runtime.levels import PREDICTIONS, step_coefficients

SCHEDULES = {
    "rectified flow": lgd.RectifiedFlow(),
    "vp cosine": lgd.VPCosine(),
    "vp linear": lgd.VPLinear.ddpm(),
    "stable diffusion": lgd.VPLinear.stable_diffusion(),
    "edm": lgd.EDM(),
    "discrete": lgd.Discrete.ddpm(dtype=torch.float64),
}


def guided_step(target, *args, **options):
    """On the target's device, by the target's implementation."""
    moved = (testing.moved(value, target.device) for value in args)
    options = {name: testing.moved(value, target.device) for name, value in options.items()}
    return lgd.guided_step(*moved, impl=target.impl, **options)


def specified(x, cond, uncond, omega, levels, prediction="x0", churn=0.0, noise=None, seed=None, first_sample=0):
    options = {"prediction": prediction, "churn": churn, "noise": noise, "seed": seed, "first_sample": first_sample}
    return reference.guided_step(GuidedStep.of(x, cond, uncond, omega, levels, **options))


def test_hand_worked(target):
    """Rectified flow from t = 1/2 to s = 1/4. q = 1/4 / (3/4 1/2) = 2/3, r = 1/3."""
    levels = lgd.RectifiedFlow().levels(torch.tensor([0.5]), torch.tensor([0.25]))
    x, cond, uncond = torch.tensor([[4.0, 8.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    guided = torch.tensor([[2.5, 0.0]])  # omega = 1/2
    # churn 0: h = 1, A = 1/2, B = 3/4 2/3 = 1/2
    found = guided_step(target, x, cond, uncond, 0.5, levels).cpu()
    torch.testing.assert_close(found, x / 2 + guided / 2)
    # churn 1: h = 1/3, A = 1/2 1/3 = 1/6, B = 1/2 (1 + 1/3) = 2/3, V = 1/4 sqrt(2/3 4/3) = sqrt(2)/6
    z = torch.tensor([[3.0, -3.0]])
    found = guided_step(target, x, cond, uncond, 0.5, levels, churn=1.0, noise=z).cpu()
    torch.testing.assert_close(found, x / 6 + guided * 2 / 3 + math.sqrt(2) / 6 * z)


def test_hand_worked_predictions(target):
    """One datum, x0 = 3 and z = -1 at signal 0.6, noise 0.8, and what each prediction says of it; s is the data."""
    t = torch.tensor([0.6]), torch.tensor([0.8])
    levels = lgd.Levels(*t, torch.ones(1), torch.zeros(1), t[1])
    x = torch.tensor([[0.6 * 3 - 0.8]])
    said = {"x0": 3.0, "eps": -1.0, "v": 0.6 * -1 - 0.8 * 3, "flow": -1.0 - 3.0}
    for prediction, value in said.items():
        p = torch.tensor([[value]])
        found = guided_step(target, x, p, p, 7.0, levels, prediction=prediction).cpu()
        torch.testing.assert_close(found, torch.tensor([[3.0]]), rtol=1e-6, atol=1e-6)


def test_euler_of_rectified_flow_and_ddpm_posterior():
    """churn 0 with a flow prediction is x + (s - t) p; churn 1 is DDPM's posterior as Ho et al. give it."""
    t, s = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    a, b, _ = step_coefficients(lgd.RectifiedFlow().levels(t, s), "flow", 0.0)
    torch.testing.assert_close(torch.cat((a, b)), torch.tensor([1.0, -0.5], dtype=torch.float64))

    table = lgd.Discrete.ddpm(dtype=torch.float64)
    step = table.levels(torch.tensor([500]), torch.tensor([499]))
    bar_t, bar_s = step.signal_t**2, step.signal_s**2
    beta = 1 - bar_t / bar_s
    a, b, v = step_coefficients(step, "x0", 1.0)
    torch.testing.assert_close(a, torch.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t))
    torch.testing.assert_close(b, torch.sqrt(bar_s) * beta / (1 - bar_t))
    torch.testing.assert_close(v, torch.sqrt(beta * (1 - bar_s) / (1 - bar_t)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("churn", [0.0, 0.4, 1.0])
def test_preserves_the_marginals(name, prediction, churn):
    """With the true prediction, x_s = signal_s x0 + (...) z' + v z, and the noise has variance noise_s^2."""
    schedule, last = SCHEDULES[name], 0.999  # eps says nothing at signal 0
    for u_t, u_s in ((last, 0.9), (0.7, 0.35), (0.5, 0.4999), (0.3, 0.01), (0.2, 0.0), (last, 0.0)):
        t, s = (schedule.from_unit(torch.tensor([u], dtype=torch.float64)) for u in (u_t, u_s))
        if torch.equal(t, s):
            continue
        levels = schedule.levels(t, s)
        a, b, v = step_coefficients(levels, prediction, churn)
        signal, noise = levels.signal_t, levels.noise_t
        unit = torch.sqrt(signal**2 + noise**2)
        of_x0, of_z = {
            "x0": (1.0, 0.0),
            "eps": (0.0, 1.0),
            "v": (-noise / unit, signal / unit),
            "flow": (-1.0, 1.0),
        }[prediction]
        scale = max(1.0, 1 / float(signal) if prediction == "eps" else 1.0)
        torch.testing.assert_close(a * signal + b * of_x0, levels.signal_s, rtol=1e-11 * scale, atol=1e-12 * scale)
        variance = (a * noise + b * of_z) ** 2 + v**2
        torch.testing.assert_close(variance, levels.noise_s**2, rtol=1e-11 * scale, atol=1e-12 * scale)


def test_preserves_the_marginals_in_samples(target):
    """The same through the kernel: mean and variance over a hundred thousand draws."""
    n = 100_000
    levels = lgd.VPCosine().levels(torch.tensor([0.8]), torch.tensor([0.3]))
    z = lgd.philox_normal((1, n), seed=1)
    x0 = torch.full((1, n), 0.7)
    x = levels.signal_t[:, None] * x0 + levels.noise_t[:, None] * z
    x_s = guided_step(target, x, x0, x0 - 5, 0.0, levels, churn=0.6, seed=2).cpu()
    mean, variance = levels.signal_s * 0.7, levels.noise_s**2
    assert abs(x_s.mean() - mean) < 5 * math.sqrt(variance / n)
    assert abs(x_s.var() / variance - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
@pytest.mark.parametrize("churn", [0.0, 1.0])
def test_the_ends(target, prediction, churn):
    """s = t is the identity, at the data and at t = 1 too; s = 0 gives the guided x0; t = 1 is finite."""
    x, p = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).unbind(0)
    noise = torch.full_like(x, 2.0)
    t = torch.tensor([0.0, 0.4, 1.0])
    still = lgd.Levels(1 - t, t, 1 - t, t, torch.zeros(3))
    same = guided_step(target, x, p, p, 1.0, still, prediction=prediction, churn=churn, noise=noise)
    assert torch.equal(same.cpu(), x)

    t = torch.tensor([0.3, 0.7, 1.0])
    levels = lgd.RectifiedFlow().levels(t, torch.zeros(3))
    found = guided_step(target, x, p, p, 1.0, levels, prediction=prediction, churn=churn, noise=noise).cpu()
    a, n = levels.signal_t[:, None], levels.noise_t[:, None]
    x0 = {
        "x0": p,
        "v": a * x / (a * a + n * n) - n * p / torch.sqrt(a * a + n * n),
        "flow": (x - n * p) / (a + n),
    }[prediction]
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


def test_close_times(target, generator):
    """t - s = 1e-4, where a gap formed from rounded levels would be 1e-3 off."""
    t = torch.linspace(0.1, 0.9, 5)
    x, p = torch.randn(2, 5, 1100, generator=generator).unbind(0)
    for schedule in (lgd.RectifiedFlow(), lgd.VPCosine(), lgd.VPLinear.ddpm()):
        exact = schedule.levels(t.double(), (t - 1e-4).double())
        found = guided_step(target, x, p, p, 0.0, schedule.levels(t, t - 1e-4), prediction="x0").cpu()
        truth = specified(x.double(), p.double(), p.double(), 0.0, exact)
        assert ((found - truth).abs().max() / truth.abs().max()).item() < 4e-7
        moved, true_move = (found.double() - x).norm(), (truth - x).norm()
        assert abs(moved / true_move - 1) < 2e-3


@pytest.mark.extension
def test_undefined_steps_are_nan_where_values_are_not_checked():
    """On the raw operator nothing is checked, as on a GPU: s after t, eps at signal 0, churn above 1."""
    one, zero, half = torch.ones(1), torch.zeros(1), torch.full((1,), 0.5)
    x = torch.ones(1, 3)

    def raw(levels, prediction, churn, impl):
        call = torch.ops.lgd.guided_step
        return call(x, x, x, x, None, 0.0, [], list(levels), prediction, churn, 0.0, None, None, 0, impl)

    ordered = (half, half, one, zero, half)
    for impl in ("cpu", "reference"):
        assert raw((one, zero, half, half, -half), "x0", None, impl).isnan().all()
        assert raw((zero, one, half, half, half), "eps", None, impl).isnan().all()
        assert raw(ordered, "x0", torch.full((1,), 1.5), impl).isnan().all()
        assert raw(ordered, "x0", torch.full((1,), -0.5), impl).isnan().all()
        assert not raw(ordered, "eps", half, impl).isnan().any()


def test_one_sample_moves_no_other(target, generator):
    x, cond, uncond = torch.randn(3, 3, 40, generator=generator).unbind(0)
    omega, levels = torch.tensor([0.5, 1.0, 2.0]), testing.step_levels(3)
    before = guided_step(target, x, cond, uncond, omega, levels, churn=0.5, seed=3).cpu()
    x[1], cond[1], uncond[1], omega[1] = 5.0, 7.0, -3.0, 9.0
    after = guided_step(target, x, cond, uncond, omega, levels, churn=0.5, seed=3).cpu()
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def check(target, x, cond, uncond, omega, levels, **options):
    kernel = guided_step(target, x, cond, uncond, omega, levels, **options)
    same = specified(x, cond, uncond, omega, levels, **options)
    wide = {name: testing.promoted(value) for name, value in options.items()}
    truth = specified(*(testing.promoted(value) for value in (x, cond, uncond, omega, levels)), **wide)
    drawn = 0.0
    if options.get("seed") is not None:  # implementations agree on a normal to 1e-6 of max(1, |z|), |z| < 6.8
        drawn = 6.8e-6
    testing.assert_elementwise(kernel, same, truth, drawn)
    assert kernel.is_contiguous()


@pytest.mark.parametrize("shape", testing.SHAPES, ids=str)
def test_agrees_with_float64(target, shape, generator):
    for dtype, prediction in itertools.product(dtypes_of(target), PREDICTIONS):
        data = [testing.sample(shape, dtype, generator) for _ in range(4)]
        levels = testing.step_levels(shape[0])
        if prediction == "eps":
            levels = lgd.RectifiedFlow().levels(torch.full(shape[:1], 0.8), torch.full(shape[:1], 0.3))
        omega = torch.rand(shape[0], generator=generator) * 3
        check(target, *data[:3], omega, levels, prediction=prediction)
        check(target, *data[:3], omega, levels, prediction=prediction, churn=0.5, noise=data[3])


@pytest.mark.parametrize("churn", [0.0, 1.0, "per sample"])
def test_agrees_with_float64_however_the_scalars_come(target, churn, generator):
    for shape in ((5, 1031), (37, 3)):
        if churn == "per sample":
            churn = torch.rand(shape[0], generator=generator)
        x, cond, uncond, noise = (testing.sample(shape, torch.float32, generator) for _ in range(4))
        for levels in (testing.step_levels(shape[0]), testing.step_levels(shape[0], torch.float64)):
            for omega in testing.omegas(shape[0], generator).values():
                check(target, x, cond, uncond, omega, levels, churn=churn, noise=noise, prediction="v")
        churn = churn if isinstance(churn, float) else "per sample"


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_takes_any_layout(target, layout, generator):
    for dtype in dtypes_of(target):
        shape = (3, 2, 19, 23)
        data = [testing.sample(shape, dtype, generator, layout) for _ in range(4)]
        if layout == "expanded":
            data[0] = testing.sample(shape, dtype, generator)
        expanded = torch.tensor([0.5]).expand(3)
        levels = lgd.Levels(*(tensor[:1].expand(3) for tensor in testing.step_levels(3)))
        check(target, *data[:3], expanded, levels, churn=expanded, noise=data[3], prediction="flow")
        mixed = lgd.Levels(*(tensor[:1].expand(3).contiguous() for tensor in levels[:2]), *levels[2:])
        check(target, *data[:3], 0.5, mixed, churn=1.0, noise=data[3], prediction="flow")


@pytest.mark.parametrize("layout", ["offset", "odd stride"])
def test_takes_whole_vectors_that_are_not_aligned(target, layout, generator):
    for dtype in dtypes_of(target):
        data = [testing.sample((3, 64), dtype, generator, layout) for _ in range(4)]
        check(target, *data[:3], 0.5, testing.step_levels(3), churn=1.0, noise=data[3])


def test_takes_mixed_dtypes(target, generator):
    dtypes = dtypes_of(target)
    for i, _ in enumerate(dtypes):
        turned = dtypes[i:] + dtypes[:i]
        data = [testing.sample((2, 1100), turned[j % len(turned)], generator) for j in range(4)]
        check(target, *data[:3], 1.5, testing.step_levels(2), churn=1.0, noise=data[3])


@pytest.mark.parametrize("shape", testing.EMPTY_SHAPES, ids=str)
def test_empty(target, shape):
    x = torch.empty(shape, device=target.device, requires_grad=True)
    omega = torch.ones(shape[0], device=target.device, requires_grad=True)
    levels = testing.moved(testing.step_levels(shape[0]), target.device)
    x_s = lgd.guided_step(x, x, x, omega, levels, churn=1.0, seed=0, impl=target.impl)
    assert x_s.shape == shape
    x_s.sum().backward()
    assert torch.equal(omega.grad, torch.zeros_like(omega)) and x.grad.shape == shape


@pytest.mark.parametrize("seed", [7, -(2**63), 2**63 - 1, 2**40 + 1, "0-dim", "per sample"])
def test_draws_the_noise_of_the_contract(target, seed, generator):
    """A seed is `philox_normal` on stream 1, whatever its form; longer than a block, and not a multiple of 4."""
    for shape in ((3, 2051), (3, 2), (3,), (2, 3, 5, 7)):
        batch = shape[0]
        if seed == "0-dim":
            value = torch.tensor(12345678901234)
        else:
            value = torch.tensor([5, -6, 2**50])[:batch] if seed == "per sample" else seed
        z = lgd.philox_normal(shape, value, stream=1, first_sample=11)
        x, cond, uncond = (testing.sample(shape, torch.float32, generator) for _ in range(3))
        levels = testing.step_levels(batch)
        drawn = guided_step(target, x, cond, uncond, 0.5, levels, churn=1.0, seed=value, first_sample=11).cpu()
        given = guided_step(target, x, cond, uncond, 0.5, levels, churn=1.0, noise=z).cpu()
        torch.testing.assert_close(drawn, given, rtol=0, atol=3e-6)
        quiet = guided_step(target, x, cond, uncond, 0.5, levels, churn=0.0).cpu()
        assert (drawn - quiet).abs().max() > 0.01
        for dtype in dtypes_of(target):
            data = (tensor.to(dtype) for tensor in (x, cond, uncond))
            check(target, *data, 0.5, levels, churn=0.7, seed=value)


def test_a_batch_may_be_split(target, generator):
    """Over processes with `first_sample`; anyhow with a seed for each sample."""
    x, cond, uncond = torch.randn(3, 5, 100, generator=generator).unbind(0)
    levels, seeds = testing.step_levels(5), torch.arange(5) * 17
    tail = lgd.Levels(*(tensor[3:] for tensor in levels))
    for of_whole, of_tail in (({"seed": 3}, {"seed": 3, "first_sample": 3}), ({"seed": seeds}, {"seed": seeds[3:]})):
        whole = guided_step(target, x, cond, uncond, 1.0, levels, churn=1.0, **of_whole).cpu()
        part = guided_step(target, x[3:], cond[3:], uncond[3:], 1.0, tail, churn=1.0, **of_tail).cpu()
        assert torch.equal(whole[3:], part)


def test_inference_mode_meta_and_autocast(generator):
    x, cond, uncond = torch.randn(3, 3, 5, generator=generator).unbind(0)
    levels = testing.step_levels(3)
    with torch.inference_mode():
        inferred = lgd.guided_step(x, cond, uncond, 0.5, levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lgd.guided_step(x, cond, uncond, 0.5, levels)
    assert torch.equal(inferred, cast) and cast.dtype == torch.float32
    on_meta = [tensor.to("meta") for tensor in (x, cond, uncond)]
    assert lgd.guided_step(*on_meta, 0.5, testing.moved(levels, "meta"), churn=1.0, seed=0).shape == x.shape


def test_writes_only_its_output_and_reads_no_stale_memory(target, generator, poisoned):
    """Fresh allocations are poisoned; inputs lie between sentinels."""
    held = torch.full((3, 3000), torch.nan)
    held[:, 500:2500] = torch.randn(3, 2000, generator=generator)
    held = held.to(target.device)
    x, cond, uncond = (held[i : i + 1, 500:2500] for i in range(3))
    before, levels = held.clone(), testing.step_levels(1)
    expected = specified(x.cpu(), cond.cpu(), uncond.cpu(), 0.5, levels, churn=1.0, seed=9)
    x_s = guided_step(target, x, cond, uncond, 0.5, levels, churn=1.0, seed=9)
    assert address(x_s) in poisoned
    torch.testing.assert_close(x_s.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(held.nan_to_num(7.0), before.nan_to_num(7.0))


def test_same_bits_twice_and_for_any_thread_count(target, generator):
    x, cond, uncond = torch.randn(3, 5, 40001 if target.impl == "cpu" else 3001, generator=generator).unbind(0)
    omega, levels = torch.ones(5, requires_grad=True), testing.step_levels(5)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        x_s = guided_step(target, x, cond, uncond, omega, levels, churn=0.5, seed=1)
        found.append((x_s, *torch.autograd.grad(x_s.square().sum(), omega)))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


def levels_with(**fields):
    return testing.step_levels(2)._replace(**fields)


X = torch.ones(2, 3)
CASES = {
    "shape": (dict(uncond=torch.ones(2, 4)), ValueError, r"`uncond` has shape \[2, 4\], expected \[2, 3\] like `x`"),
    "dtype": (dict(cond=torch.ones(2, 3, dtype=torch.int64)), TypeError, "`cond` has dtype torch.int64, expected"),
    "device": (dict(cond=torch.ones(2, 3, device="meta")), ValueError, "`cond` is on meta, expected cpu"),
    "noise shape": (dict(churn=1.0, noise=torch.ones(3)), ValueError, r"`noise` has shape \[3\]"),
    "omega length": (dict(omega=torch.ones(3)), ValueError, r"`omega` has shape \[3\], expected \[B\] = \[2\]"),
    "prediction": (dict(prediction="score"), ValueError, "`prediction` is 'score', expected one of x0, eps, v, flow"),
    "impl": (dict(impl="fast"), ValueError, "`impl` is 'fast', expected None or one of"),
    "impl cannot": (dict(impl="triton"), ValueError, "impl='triton' cannot run here: .*These can: .*reference"),
    "no noise": (dict(churn=0.5), ValueError, r"`churn` is 0.5 but there is no noise; pass seed"),
    "no noise, tensor": (dict(churn=torch.zeros(2)), ValueError, "`churn` is .* but there is no noise"),
    "noise twice": (dict(churn=0.5, noise=X, seed=1), ValueError, "`noise` and `seed` were both given"),
    "seed kind": (dict(churn=0.5, seed=1.0), TypeError, "`seed` is a float"),
    "seed dtype": (dict(churn=0.5, seed=torch.ones(2)), TypeError, "`seed` has dtype torch.float32, expected int64"),
    "seed length": (dict(churn=0.5, seed=torch.arange(3)), ValueError, r"`seed` has shape \[3\], expected \[\]"),
    "seed range": (dict(churn=0.5, seed=2**63), ValueError, r"`seed` is 9223372036854775808, expected"),
    "first_sample": (dict(seed=1, first_sample=0.5), TypeError, "`first_sample` is a float, expected an int"),
    "churn above 1": (dict(churn=1.5, seed=1), ValueError, r"`churn` is 1.5, expected values in \[0, 1\]"),
    "churn below 0": (dict(churn=torch.tensor([0.5, -1.0]), seed=1), ValueError, r"`churn` is \[0.5, -1\]"),
    "churn grad": (dict(churn=torch.ones(2, requires_grad=True), seed=1), ValueError, "`churn` requires grad"),
    "levels kind": (dict(levels=(1, 2)), TypeError, "`levels` is a tuple, expected lgd_kernels.Levels"),
    "levels length": (dict(levels=testing.step_levels(3)), ValueError, r"`levels.signal_t` has shape \[3\]"),
    "levels dtype": (dict(levels=levels_with(noise_s=torch.ones(2).half())), TypeError, "`levels.noise_s` has dtype"),
    "levels grad": (dict(levels=levels_with(gap=torch.ones(2, requires_grad=True))), ValueError, "levels.gap.detach"),
    "order": (dict(levels=levels_with(gap=torch.tensor([0.1, -0.1]))), ValueError, "`levels.gap` is -0.1"),
    "eps at signal 0": (dict(prediction="eps", levels=testing.step_levels(2)), ValueError, "`levels.signal_t` is 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case):
    change, error, message = CASES[case]
    arguments = dict(x=X, cond=X, uncond=X, omega=0.5, levels=testing.step_levels(2)) | change
    with pytest.raises(error, match=message):
        lgd.guided_step(**arguments)
