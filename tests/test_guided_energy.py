"""Guided particles against targets: values, laws, and agreement with the definition in float64."""

import functools
import inspect
import itertools
import math

import pytest
import torch
from conftest import Target, dtypes_of
from energy import defined, dtypes, guided_energy, interpreted, loss_and_slope, problem, truth

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.levels import PREDICTIONS, omega_at

TO_DATA = lgd.RectifiedFlow().levels(torch.ones(1), torch.zeros(1))  # x_s is the guided prediction
BETWEEN = lgd.RectifiedFlow().levels(torch.tensor([0.5]), torch.tensor([0.25]))  # A = B = 1/2


def test_hand_worked(target):
    """x_s = (3, 0) and (0, 4) at omega 1/2, their slopes (2, -4) and (0, 4), y = 0: distances 3, 4, and 5 between."""
    cond, uncond = torch.tensor([[[2.0, 2.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 6.0], [0.0, -2.0]]])
    y, omega = torch.zeros(1, 1, 2), torch.tensor([0.5])
    # slopes of the distances: (3, 0) (2, -4) / 3 = 2, (0, 4) (0, 4) / 4 = 4, (3, -4) (2, -8) / 5 = 38 / 5
    expected = {
        (1.0, 1.0, True): ((3 + 4) / 2 - 5 / 2, (2 + 4) / 2 - 38 / 5 / 2),
        (1.0, 1.0, False): ((3 + 4) / 2 - 5 / 4, (2 + 4) / 2 - 38 / 5 / 4),
        (1.0, 0.0, True): ((3 + 4) / 2, (2 + 4) / 2),
        (2.0, 0.0, True): ((9 + 16) / 2, (6 + 16) / 2 * 2),
        (2.0, 1.0, True): (0.0, (6 + 16) / 2 * 2 - 38),
        (2.0, 0.5, False): ((9 + 16) / 2 - 25 / 8, (6 + 16) / 2 * 2 - 38 / 4),
        (1.5, 1.0, True): ((3**1.5 + 8) / 2 - 5**1.5 / 2, 0.75 * (6 / 3**0.5 + 16 / 2 - 38 / 5**0.5)),
    }
    for (beta, lam, unbiased), (loss, slope) in expected.items():
        options = {"beta": beta, "lam": lam, "unbiased": unbiased}
        found = loss_and_slope(target, cond, cond, uncond, omega, TO_DATA, y, **options)
        torch.testing.assert_close(torch.cat(found), torch.tensor([loss, slope]), rtol=1e-6, atol=1e-5)


def test_hand_worked_targets_and_noise(target):
    """x_s = x/2 + g/2 = 3.25, targets at 2.25 and 4.25; with churn 1, x/6 + 2 g/3 + sqrt(2)/6 z."""
    x, cond, uncond = (torch.tensor([[value]]) for value in (4.0, 2.0, 1.0))  # g = 2.5, no trailing dimension
    half, y = torch.tensor([0.5]), torch.tensor([[2.25, 4.75]])
    found = loss_and_slope(target, x, cond, uncond, half, BETWEEN, y, beta=2.0, lam=0.0)
    torch.testing.assert_close(torch.cat(found), torch.tensor([(1 + 2.25) / 2, 1 - 1.5]) * torch.tensor([1.0, 0.5]))
    found = loss_and_slope(target, x, cond, uncond, half, BETWEEN, y, beta=1.0, lam=1.0, unbiased=False)
    torch.testing.assert_close(torch.cat(found), torch.tensor([1.25, 0.0]))
    z = torch.tensor([[-3.0]])
    x_s = 4 / 6 + 5 / 3 - math.sqrt(2) / 2
    found = guided_energy(target, x, cond, uncond, half, BETWEEN, y[:, :1], lam=0.0, beta=1.0, churn=1.0, noise=z)
    torch.testing.assert_close(found.cpu(), torch.tensor([2.25 - x_s]))


def test_hand_worked_expected(target):
    """||x_s - signal_s x0||^2 + noise_s^2 D, with x_s = 3.25 twice, signal_s x0 = 3/4 3 and 3/4 5, noise_s = 1/4."""
    x, cond, uncond = (torch.full((1, 1, 2), value) for value in (4.0, 2.0, 1.0))
    x0 = torch.tensor([[3.0, 5.0]])
    found = loss_and_slope(target, x, cond, uncond, torch.tensor([0.5]), BETWEEN, lgd.Expected(x0), beta=2.0, lam=0.0)
    torch.testing.assert_close(torch.cat(found), torch.tensor([1 + 0.25 + 2 / 16, 2 * 0.5 * (1 - 0.5)]))


def test_is_the_step_and_then_the_loss(target, generator):
    """Bit for bit nothing is asked; in float32 the two differ by rounding."""
    args, options = problem(generator, 4, 3, (3, 5), noise=True, prediction="v")
    for beta, lam, unbiased in ((1.75, 1.0, True), (1.0, 0.5, False), (2.0, 0.0, True)):
        found = guided_energy(target, *args, beta=beta, lam=lam, unbiased=unbiased, **options).cpu()
        expected = defined(*args, beta=beta, lam=lam, unbiased=unbiased, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_item_moves_no_other(target, generator):
    args, options = problem(generator, 3, 2, 40, noise=True)
    before = guided_energy(target, *args, **options).cpu()
    for value in (*args[:4], args[5], options["noise"]):
        value[1] = 5.0
    after = guided_energy(target, *args, **options).cpu()
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def test_order_of_particles_and_of_targets_is_irrelevant(target, generator):
    (x, cond, uncond, omega, levels, y), _ = problem(generator, 5, 6, 23)
    before = loss_and_slope(target, x, cond, uncond, omega, levels, y)
    particles, targets = torch.randperm(5, generator=generator), torch.randperm(6, generator=generator)
    data = (tensor[:, particles] for tensor in (x, cond, uncond))
    after = loss_and_slope(target, *data, omega, levels, y[:, targets])
    torch.testing.assert_close(torch.cat(after), torch.cat(before), rtol=1e-6, atol=1e-5)


def test_only_differences_matter(target, generator):
    """All points moved by one vector: x_s moves by a + b times that of x, cond and uncond."""
    (x, cond, uncond, omega, _, y), _ = problem(generator, 3, 4, 30)
    move = torch.randn(30, generator=generator)
    levels = lgd.Levels(*(one.expand(3) for one in BETWEEN))  # a = b = 1/2
    before = loss_and_slope(target, x, cond, uncond, omega, levels, y)
    after = loss_and_slope(target, x + move, cond + move, uncond + move, omega, levels, y + move)
    torch.testing.assert_close(torch.cat(after), torch.cat(before), rtol=1e-5, atol=1e-5)


def test_scales_as_the_power(target, generator):
    args, _ = problem(generator, 3, 4, 30)
    doubled = (*(2 * tensor for tensor in args[:3]), *args[3:5], 2 * args[5])
    for beta in (0.5, 1.0, 1.75, 2.0):
        once, twice = (guided_energy(target, *these, beta=beta).cpu() for these in (args, doubled))
        torch.testing.assert_close(twice, 2**beta * once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [5, -(2**63), 2**40 + 1, "0-dim", "per item"])
def test_drawn_noise_and_targets_are_those_of_philox(target, seed, generator):
    """The step's noise is stream 1, the targets' stream 2, each item's own where it has its own seed."""
    for row in (9,) if interpreted(target) else (9, (2, 8)):  # not a multiple of four: normals come in fours
        args, _ = problem(generator, 3, 2, row)
        made = {"0-dim": torch.tensor(5), "per item": torch.tensor([4, 4, -7])}.get(seed, seed)
        args = (*args[:5], lgd.Renoise(args[5][:, 0], 4, made))
        found = guided_energy(target, *args, churn=1.0, seed=made, first_sample=2).cpu()
        expected = defined(*args, churn=1.0, seed=made, first_sample=2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if seed == "per item":
        same = guided_energy(target, *(v[:1] for v in args[:4]), lgd.Levels(*(v[:1] for v in args[4])),
                             lgd.Renoise(args[5].x0[:1], 4, 4), churn=1.0, seed=4).cpu()  # fmt: skip
        assert torch.equal(same, found[:1])  # alone, with that seed as a number


def test_a_batch_may_be_split(target, generator):
    """first_sample counts items: each half draws what the whole would have drawn."""
    args, _ = problem(generator, 3, 4, 37, batch=5, kind="renoise")

    def part(items, first):
        x, cond, uncond, omega, levels, renoise = args
        levels, y = lgd.Levels(*(one[items] for one in levels)), renoise._replace(x0=renoise.x0[items])
        data = (one[items] for one in (x, cond, uncond, omega))
        return guided_energy(target, *data, levels, y, churn=0.5, seed=3, first_sample=first).cpu()

    whole, halves = part(slice(None), 10), torch.cat((part(slice(2), 10), part(slice(2, None), 12)))
    if target.impl in ("reference", None):  # PyTorch's sums may go in another order for another size
        torch.testing.assert_close(whole, halves, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(whole, halves)


def test_one_seed_shares_no_noise_between_particles_and_targets(target):
    """A target that knew its particle would be nearer to it: here x_s = V z and y = noise_s z', V = noise_s."""
    x = torch.zeros(1, 1, 5000)
    levels = lgd.Levels(*torch.tensor([[0.0], [1.0], [1.0], [0.5], [1.0]]))  # q = 1: V = noise_s at churn 1
    renoise = lgd.Renoise(x[:, 0], 1, 3)
    found = guided_energy(target, x, x, x, 0.0, levels, renoise, churn=1.0, seed=3, beta=2.0, lam=0.0).item()
    assert abs(found / (5000 * 2 * 0.25) - 1) < 5 * math.sqrt(2 / 5000)


def test_expected_targets_are_integrated_out(target, generator):
    args, _ = problem(generator, 3, 1, 50, kind="expected")
    levels, x0 = args[4], args[5].x0
    found, slope = loss_and_slope(target, *args, beta=2.0, lam=0.0)
    centre = (levels.signal_s[:, None] * x0)[:, None]
    known, known_slope = loss_and_slope(target, *args[:5], centre, beta=2.0, lam=0.0)
    torch.testing.assert_close(found, known + levels.noise_s**2 * 50)
    torch.testing.assert_close(slope, known_slope)


LAWS = [
    test_hand_worked,
    test_hand_worked_targets_and_noise,
    test_hand_worked_expected,
    test_expected_targets_are_integrated_out,
    test_a_batch_may_be_split,
    functools.partial(test_drawn_noise_and_targets_are_those_of_philox, seed=5),
    functools.partial(test_drawn_noise_and_targets_are_those_of_philox, seed="per item"),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("impl", ["reference", None], ids=["asked for", "all there is"])
def test_the_reference_obeys(law, impl, generator, monkeypatch):
    """Both ways to it: differentiable as it stands, and through the operator where there is no other implementation."""
    monkeypatch.setattr(impls, "choose", lambda *args: "reference")
    arguments = {"target": Target(impl, "cpu"), "generator": generator}
    law(**{name: value for name, value in arguments.items() if name in inspect.signature(law).parameters})


CASES = [  # m, k, elements, beta, lam, unbiased, kind, prediction, noise
    (1, 1, 1, 2.0, 0.0, True, "tensor", "x0", ""),
    (2, 1, 1, 1.75, 1.0, True, "tensor", "v", "tensor"),
    (3, 5, 1, 1.5, 1.0, True, "renoise", "flow", ""),
    (1, 4, 7, 1.0, 1.0, False, "tensor", "flow", "tensor"),
    (3, 2, 7, 0.5, 0.5, True, "renoise", "x0", "seed"),
    (5, 3, 7, 0.1, 1.0, False, "tensor", "eps", "tensor"),
    (8, 5, (3, 5), 1.5, 1.0, True, "tensor", "v", "tensor"),
    (4, 4, 127, 1.75, 1.0, True, "tensor", "x0", "tensor"),
    (4, 4, 127, 1.75, 1.0, True, "renoise", "v", "seed"),
    (16, 8, 127, 1.0, 0.5, True, "tensor", "x0", ""),
    (4, 16, 127, 0.1, 1.0, True, "renoise", "flow", "tensor"),
    (2, 3, 1031, 2.0, 1.0, True, "tensor", "flow", "seed"),
    (5, 1, 1031, 1.75, 0.5, False, "renoise", "eps", "seed"),
    (3, 8, 1031, 0.5, 0.0, True, "tensor", "v", "tensor"),
    (4, 4, 5000, 1.75, 1.0, True, "tensor", "x0", "tensor"),
    (2, 5, 5000, 1.0, 1.0, True, "renoise", "x0", "seed"),
]


def check(target, args, options):
    found = loss_and_slope(target, *args, **options)
    *expected, terms, slopes = truth(*args, **options)
    assert found[0].dtype == (torch.float64 if args[0].dtype == torch.float64 else torch.float32)
    for kernel, exact, of in zip(found, expected, (terms, slopes), strict=True):
        testing.assert_sum(kernel, exact, of)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(target, case, generator):
    m, k, row, beta, lam, unbiased, kind, prediction, noise = case
    if interpreted(target):
        m, k, row = min(m, 4), min(k, 3), 1500 if row == 5000 else row
    for dtype in dtypes(target, CASES.index(case)):
        if dtype == torch.float64 and (noise == "seed" or kind == "renoise"):
            continue  # normals of float32 agree to 1e-6
        options = {"beta": beta, "lam": lam, "unbiased": unbiased, "prediction": prediction}
        args, options = problem(generator, m, k, row, dtype, kind=kind, noise=noise == "tensor", **options)
        if noise == "seed":
            options |= {"churn": 0.7, "seed": 21}
        check(target, args, options)


def test_agrees_with_float64_for_many_particles(target, generator):
    many = 6 if interpreted(target) else 64
    args, options = problem(generator, many, many, 131, batch=2, noise=True, beta=1.5, lam=1.0)
    check(target, args, options)


@pytest.mark.parametrize("churn", [0.0, 1.0, "per item"])
def test_agrees_with_float64_however_the_scalars_come(target, churn, generator):
    (x, cond, uncond, _, levels, y), options = problem(generator, 3, 2, 43, batch=5, noise=True)
    options["churn"] = options["churn"] if churn == "per item" else churn
    wide = lgd.Levels(*(level.double() for level in levels))
    each = [("v", levels)] if interpreted(target) else itertools.product(PREDICTIONS, (levels, wide))
    for prediction, exact in each:
        for omega in testing.omegas(5, generator).values():
            found = guided_energy(target, x, cond, uncond, omega, exact, y, prediction=prediction, **options)
            args = [testing.promoted(value) for value in (x, cond, uncond, omega, exact, y)]
            promoted = {name: testing.promoted(value) for name, value in options.items()}
            expected = defined(*args, prediction=prediction, **promoted)
            at = omega if isinstance(omega, torch.Tensor) else omega_at(omega, x)
            terms = truth(x, cond, uncond, at.expand(5), exact, y, prediction=prediction, **options)[2]
            testing.assert_sum(found, expected, terms)


@pytest.mark.parametrize("layout", ["sliced", "strided", "expanded", "permuted", "offset"])
@pytest.mark.parametrize("kind", ["tensor", "renoise"])
def test_takes_any_layout(target, layout, kind, generator):
    for dtype in dtypes(target, len(layout)):
        if dtype != torch.float64 or kind == "tensor":
            args, options = problem(generator, 3, 4, (5, 7), dtype, kind=kind, noise=True, layout=layout)
            check(target, args, options)


@pytest.mark.parametrize("layout", ["offset", "odd stride"])
def test_takes_whole_vectors_that_are_not_aligned(target, layout, generator):
    for dtype in dtypes(target, len(layout)):
        args, options = problem(generator, 3, 4, 64, dtype, noise=True, layout=layout)
        check(target, args, options)


def test_takes_particles_that_lie_apart(target, generator):
    """Slices of particles, one particle for all, and one item for all."""
    (x, cond, uncond, omega, levels, y), options = problem(generator, 6, 8, 31, noise=True)
    options["noise"] = options["noise"][:, :1].expand(-1, 3, -1)
    for views in (
        (x[:, ::2], cond[:, :3], uncond[:, 3:], y[:, 1::3]),
        (x[:, ::2], cond[:, :1].expand(-1, 3, -1), uncond[:, -3:], y[:1].expand(3, -1, -1)),
        (x[:, :3], cond[1:2, :3].expand(3, -1, -1), uncond[:, :3], y[:, :1].expand(-1, 2, -1)),
    ):
        check(target, (*views[:3], omega, levels, views[3]), options)


def test_takes_mixed_dtypes(target, generator):
    every = dtypes_of(target)
    for i, kind in itertools.product(range(len(every)), ("tensor", "renoise")):
        turned = tuple((every[i:] + every[:i] + every)[:5])
        if kind == "renoise":  # normals of float32 agree to 1e-6
            turned = tuple(torch.float16 if dtype == torch.float64 else dtype for dtype in turned)
        args, options = problem(generator, 3, 2, 110 if interpreted(target) else 1100, turned, kind=kind, noise=True)
        found = loss_and_slope(target, *args, **options)
        *expected, terms, slopes = truth(*args, **options)
        assert found[0].dtype == (torch.float64 if torch.float64 in turned else torch.float32)
        for kernel, exact, of in zip(found, expected, (terms, slopes), strict=True):
            testing.assert_sum(kernel, exact, of)


@pytest.mark.parametrize(("batch", "row"), [(0, (4,)), (3, (0,)), (0, ()), (2, (3, 0, 7))])
@pytest.mark.parametrize("kind", ["tensor", "renoise", "expected"])
def test_empty(target, batch, row, kind):
    """No items give no losses; no elements, points that coincide."""
    x = torch.empty((batch, 2, *row), device=target.device, requires_grad=True)
    omega = torch.ones(batch, device=target.device, requires_grad=True)
    levels = testing.moved(testing.step_levels(batch), target.device)
    y = {"tensor": x[:, :1], "renoise": lgd.Renoise(x[:, 0], 3, 0), "expected": lgd.Expected(x[:, 0])}[kind]
    options = {"beta": 2.0, "lam": 0.0} if kind == "expected" else {"churn": 1.0, "seed": 0}
    loss = lgd.guided_energy(x, x, x, omega, levels, y, impl=target.impl, **options)
    assert torch.equal(loss.cpu(), torch.zeros(batch))
    loss.sum().backward()
    assert torch.equal(omega.grad, torch.zeros_like(omega)) and x.grad.shape == x.shape
    if kind != "expected":
        curve = lgd.guided_energy_curve(x, x, x, levels, y, impl=target.impl, **options)
        assert torch.equal(curve.loss(1.0).cpu(), torch.zeros(batch, dtype=torch.float64))
        assert curve.minimize().shape == (batch,)
