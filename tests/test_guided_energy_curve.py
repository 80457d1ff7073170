"""The loss as a function of omega, from one pass: it is guided_energy at every omega, beta and lam."""

import itertools
import math

import pytest
import torch
from energy import dtypes, guided_energy, interpreted, on, points, problem

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.learn.objective import particle_energy
from lgd_kernels.ops.guided_energy.curve import EnergyCurve
from lgd_kernels.ops.guided_energy.statistics import Statistics, energy

POWERS = list(itertools.product((0.1, 0.5, 1.0, 1.5, 1.75, 2.0), ((0.0, True), (0.5, False), (1.0, True))))


def curve_of(target, x, cond, uncond, omega, levels, y, **options):
    return on(target, lgd.guided_energy_curve, x, cond, uncond, levels, y, **options)


def each_omega(generator, batch, count):
    return torch.rand(batch, count, generator=generator, dtype=torch.float64) * 8 - 2


@pytest.fixture
def curve(generator):
    args, options = problem(generator, 4, 3, 30, torch.float64, batch=5, noise=True)
    return lgd.guided_energy_curve(*args[:3], *args[4:], **options, impl="reference")


def test_hand_worked(target):
    """x_s = 2 + 3 omega and 1, y = 8: ||.||^2 = 9 omega^2 - 36 omega + 36 and 49; between them (1 + 3 omega)^2."""
    levels = lgd.RectifiedFlow().levels(torch.ones(1), torch.zeros(1))
    cond, uncond, y = torch.tensor([[2.0, 1.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([[8.0]])
    curve = curve_of(target, cond, cond, uncond, None, levels, y)
    assert repr(curve) == "EnergyCurve(1 items, 2 particles, 1 targets)"
    at = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    for name, beta, lam, expected in (
        ("loss", 2.0, 0.0, [85 / 2, 58 / 2, 58 / 2]),
        ("loss", 1.0, 1.0, [13 / 2 - 1 / 2, 10 / 2 - 4 / 2, 10 / 2 - 10 / 2]),
        ("grad", 2.0, 0.0, [-18, -9, 9]),
        ("grad", 1.0, 1.0, [-3 / 2 - 3 / 2, -3 / 2 - 3 / 2, 3 / 2 - 3 / 2]),
        ("hessian", 2.0, 1.0, [9 - 9, 9 - 9, 9 - 9]),
        ("hessian", 1.0, 1.0, [0, 0, 0]),  # lengths along a line
        ("hessian", 1.5, 0.0, [1.5 * 0.5 * 9 / 2 * distance**-0.5 for distance in (6, 3, 3)]),
    ):  # fmt: skip
        found = getattr(curve, name)(at.to(target.device), beta, lam).cpu()
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert math.isclose(curve.minimize(2.0, 0.0).item(), 2.0, rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "renoise"])
@pytest.mark.parametrize(("m", "k", "row"), [(1, 1, 5), (2, 3, 127), (4, 4, 1031), (8, 2, 37)])
def test_is_guided_energy_at_every_omega(target, m, k, row, kind, generator):
    """Relative to the sum of the terms, at a hundred omegas: 1e-5 in float32, 1e-12 in float64."""
    for dtype in dtypes(target, m):
        args, options = problem(generator, m, k, row, dtype, batch=2, kind=kind, noise=kind == "tensor")
        if kind == "renoise":
            options = {"churn": 0.5, "seed": 3}
        at = each_omega(generator, 2, 100)
        curve = curve_of(target, *args, **options)
        x, cond, uncond, _, levels, y = (testing.promoted(value) for value in args)
        wide = {name: testing.promoted(value) for name, value in options.items()}
        base, y = points(x, cond, uncond, 0.0, levels, y, **wide)
        turn = points(x, cond, uncond, 1.0, levels, y, **wide)[0] - base
        x_s = (base[:, None] + at[:, :, None, None] * turn[:, None]).flatten(0, 1)  # each omega is an item
        y = y.repeat_interleave(100, 0)
        for beta, (lam, unbiased) in POWERS[::4] if dtype == torch.float32 else POWERS[-2:]:
            lam = lam if m > 1 else 0.0
            found = curve.loss(at.to(target.device), beta, lam, unbiased).cpu()
            direct, terms = (particle_energy(x_s, y, beta, w, unbiased).view(2, 100) for w in (lam, 0.0))
            budget = 1e-12 if dtype == torch.float64 and kind == "tensor" else 1e-5
            assert ((found - direct).abs() / terms).max() < budget


def test_kernels_agree_with_it(target, generator):
    """And with float32 arithmetic of their own."""
    args, options = problem(generator, 2, 3, 100, noise=True)
    curve = curve_of(target, *args, **options)
    for beta, (lam, unbiased) in POWERS[::6] if interpreted(target) else POWERS:
        found = curve.loss(args[3].to(target.device), beta, lam, unbiased).cpu()
        direct = guided_energy(target, *args, **options, beta=beta, lam=lam, unbiased=unbiased).cpu()
        torch.testing.assert_close(found.float(), direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("beta", "how"), POWERS, ids=str)
def test_grad_and_hessian_are_the_derivatives(curve, beta, how, generator):
    at = each_omega(generator, 5, 20).requires_grad_()
    slope = torch.autograd.grad(curve.loss(at, beta, *how).sum(), at, create_graph=True)[0]
    torch.testing.assert_close(curve.grad(at, beta, *how), slope, rtol=1e-10, atol=1e-10)
    bend = torch.autograd.grad(curve.grad(at, beta, *how).sum(), at)[0]
    torch.testing.assert_close(curve.hessian(at, beta, *how), bend, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), at)[0], bend, rtol=1e-9, atol=1e-9)


def test_omega_may_be_a_number_one_each_or_many_each(curve, generator):
    many = each_omega(generator, 5, 4)
    for of in (curve.loss, curve.grad, curve.hessian):
        all_at_once = of(many)
        assert torch.equal(of(many[:, 2]), all_at_once[:, 2]) and all_at_once.dtype == torch.float64
        assert torch.equal(of(0.75), of(torch.full((5,), 0.75))) and torch.equal(of(2), of(2.0))
        assert of(many[:, :0]).shape == (5, 0)
        torch.testing.assert_close(of(many.float()), all_at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.extension
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 1.75, 2.0])
@pytest.mark.parametrize("points", [1, 7, 65, 130])
def test_the_cpu_loop_is_the_formula(curve, beta, points, generator, poisoned):
    """From the smallest distance to the largest, coincident pairs (nothing, but for beta = 2) and NaN included."""
    at = Statistics(*(part.clone() for part in curve.statistics))
    at.P0[0], at.P1[0], at.P2[0] = 0.0, 0.0, 0.0
    at.Q0[1], at.Q1[1], at.Q2[1] = 1e-290, 1e-300, 1e-310
    at.P0[2] *= 1e250
    at.P0[3, 0, 0] = math.nan
    shifts = each_omega(generator, 5, points)
    for lam, unbiased in ((1.0, True), (0.5, False), (0.0, True)):
        for order, name in enumerate(("loss", "grad", "hessian")):
            expected = energy(at, shifts, beta, lam, unbiased, order)
            terms = energy(at, shifts, beta, 0.0, unbiased, order).abs() + expected.abs()
            found = getattr(EnergyCurve(at), name)(shifts, beta, lam, unbiased)
            error = (found - expected).abs() / (terms + expected[4].abs().max())
            assert torch.equal(found.isnan(), expected.isnan()) and error.nan_to_num().max() < 1e-12


@pytest.mark.extension
def test_the_cpu_loop_gives_the_same_bits_on_one_thread_and_on_two(curve, generator):
    shifts = each_omega(generator, 5, 300)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(curve.loss(shifts))
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(threads)


def test_is_evaluated_in_parts_that_fit(curve, generator, monkeypatch):
    from lgd_kernels.ops.guided_energy import curve as module

    many = each_omega(generator, 5, 50)
    whole = curve.loss(many)
    monkeypatch.setattr(module, "MEMORY", 500)
    assert torch.equal(curve.loss(many), whole)


def least(curve, beta, lam, low, high, group=None):
    """The least loss on a dense grid, and where."""
    grid = torch.linspace(low, high, 4001, dtype=torch.float64)
    batch = curve.statistics.P0.shape[0]
    losses = curve.loss(grid.expand(batch, -1), beta, lam)
    if group is not None:
        losses = torch.zeros(int(group.max()) + 1, grid.numel(), dtype=torch.float64).index_add(0, group, losses)
    least, at = losses.min(1)
    return least, grid[at]


@pytest.mark.parametrize(("beta", "lam"), [(1.75, 1.0), (1.0, 0.5), (0.5, 0.0), (0.1, 1.0), (2.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("row", [1, 8, 64])
def test_minimize_finds_the_least_of_a_dense_grid(beta, lam, row, generator):
    """Few elements and lam = 1: losses with several minima, and some without any but an end of the bracket."""
    args, _ = problem(generator, 4, 4, row, torch.float64, batch=12)
    curve = lgd.guided_energy_curve(*args[:3], *args[4:], impl="reference")
    low, high = -3.0, 9.0
    for group in (None, torch.arange(12) % 3):
        found = curve.minimize(beta, lam, (low, high), group)
        assert found.shape == (12 if group is None else 3,) and bool(((found >= low) & (found <= high)).all())
        loss = curve.loss(found if group is None else found[group], beta, lam)
        if group is not None:
            loss = torch.zeros(3, dtype=torch.float64).index_add(0, group, loss)
        expected, where = least(curve, beta, lam, low, high, group)
        # of a group, a dip of beta < 1 may lie between the points that are looked at
        budget = 1e-4 if group is not None and beta < 1 else 1e-9
        assert bool((loss <= expected + budget * expected.abs()).all())
        if beta >= 1:
            assert bool(((found - where).abs() < 1e-2).all()) or lam > 0  # one minimum, or several that are as good


def test_minimize_of_several_minima():
    """Two targets on the particle's way, at omega 1 and 3, and the one it meets last is met twice."""
    levels = lgd.RectifiedFlow().levels(torch.ones(1), torch.zeros(1))
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)  # x_s = 1 + omega
    curve = lgd.guided_energy_curve(one, one, zero, levels, torch.tensor([[2.0, 4.0, 4.0]]))
    assert abs(curve.minimize(0.5, 0.0, (0.0, 10.0)).item() - 3) < 1e-5
    assert abs(curve.minimize(0.5, 0.0, (0.0, 2.0)).item() - 1) < 1e-5
    assert abs(curve.minimize(2.0, 0.0, (0.0, 10.0)).item() - 7 / 3) < 1e-6
    assert curve.minimize(2.0, 0.0, (0.0, 2.0)).item() == 2.0


def test_closed_form_is_where_the_slope_vanishes(curve):
    for group in (None, torch.tensor([0, 1, 0, 1, 1])):
        best = curve.minimize(2.0, 0.0, (-1e3, 1e3), group)
        slopes = curve.grad(best if group is None else best[group], 2.0, 0.0)
        if group is not None:
            slopes = torch.zeros(2, dtype=torch.float64).index_add(0, group, slopes)
        assert slopes.abs().max() < 1e-10


def test_items_without_guidance_stay_at_the_lower_end():
    """cond = uncond: the loss does not depend on omega."""
    levels = testing.step_levels(2)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    curve = lgd.guided_energy_curve(x, x, x, levels, x[:, :1] + 1)
    for beta, lam in ((2.0, 0.0), (1.0, 1.0)):
        assert torch.equal(curve.minimize(beta, lam, (0.5, 2.0)), torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 1.75, 2.0])
def test_points_that_coincide(beta):
    """Particles on top of each other and of their target, at one omega or at all: no NaN; loss and slope 0."""
    levels = lgd.RectifiedFlow().levels(torch.ones(2), torch.zeros(2))
    cond = torch.tensor([[[1.0, 2.0]] * 2] * 2)
    uncond = torch.stack((cond[0], torch.tensor([[0.0, 2.0], [0.0, 2.0]])))
    curve = lgd.guided_energy_curve(cond, cond, uncond, levels, cond[:, :1])
    at = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    for order, of in enumerate((curve.loss, curve.grad, curve.hessian)):
        assert torch.equal(of(at, beta)[:, 0], torch.tensor([0.0, 2.0 if order == 2 and beta == 2 else 0.0]).double())
    for _ in range(2):
        slope = torch.autograd.grad(curve.loss(at, beta).sum(), at, create_graph=True)[0]
        assert torch.equal(slope.detach(), torch.zeros_like(slope))
    bend = torch.autograd.grad(slope.sum(), at)[0]
    assert torch.equal(bend[:, 0], torch.tensor([0.0, 2.0 if beta == 2 else 0.0]).double())
    assert torch.equal(curve.minimize(beta, bracket=(0.0, 4.0)), torch.zeros(2, dtype=torch.float64))


def test_nan_stays_in_its_item(target, generator):
    args, _ = problem(generator, 3, 2, 40)
    args[0][1, 0, 7] = torch.nan
    curve = curve_of(target, *args)
    for of in (curve.loss, curve.grad, curve.hessian):
        for beta in (1.75, 2.0):
            assert of(1.0, beta).isnan().tolist() == [False, True, False]
    group = torch.tensor([0, 1, 1], device=target.device)
    for beta, lam in ((1.75, 1.0), (2.0, 0.0)):
        assert curve.minimize(beta, lam).isnan().tolist() == [False, True, False]
        assert curve.minimize(beta, lam, group=group).isnan().tolist() == [False, True]


def test_costs_one_pass(monkeypatch, generator):
    """Afterwards the data is not needed: here it is gone."""
    args, _ = problem(generator, 2, 2, 40)
    curve = lgd.guided_energy_curve(*args[:3], *args[4:])
    before = curve.loss(1.0)
    for tensor in (*args[:3], args[5]):
        tensor.fill_(torch.nan)
    assert torch.equal(curve.loss(1.0), before)


REFUSED = {
    "bracket": (lambda c: c.minimize(bracket=(1.0, 1.0)), r"`bracket` is \(1.0, 1.0\), expected \(low, high\)"),
    "bracket infinite": (lambda c: c.minimize(bracket=(0.0, math.inf)), "`bracket` is .* expected"),
    "bracket NaN": (lambda c: c.minimize(bracket=(0.0, math.nan)), "`bracket` is .* expected .* low < high"),
    "group shape": (lambda c: c.minimize(group=torch.zeros(4, dtype=torch.int64)), r"`group` is .* \[4\], expected"),
    "group dtype": (lambda c: c.minimize(group=torch.zeros(5)), "`group` is torch.float32 .* expected int64"),
    "omega": (lambda c: c.loss(torch.zeros(4)), r"`omega` has shape \[4\], expected a float, \[B\] or \[B, K\]"),
    "omega dimensions": (lambda c: c.grad(torch.zeros(5, 1, 1)), r"`omega` has shape \[5, 1, 1\]"),
    "beta": (lambda c: c.loss(0.0, beta=2.5), r"`beta` is 2.5, expected a power in \(0, 2\]"),
    "beta 0": (lambda c: c.hessian(0.0, beta=0.0), r"`beta` is 0.0, expected a power in \(0, 2\]"),
    "lam": (lambda c: c.grad(0.0, lam=1.5), r"`lam` is 1.5, expected a weight in \[0, 1\]"),
    "lam of minimize": (lambda c: c.minimize(lam=-1.0), r"`lam` is -1.0, expected a weight in \[0, 1\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, curve):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(curve)


def test_refuses_repulsion_of_one_particle():
    x = torch.zeros(2, 1, 3)
    curve = lgd.guided_energy_curve(x, x, x, testing.step_levels(2), x)
    with pytest.raises(ValueError, match="`lam` is 1.0 but one particle has no partner"):
        curve.loss(0.0)
    assert torch.equal(curve.loss(0.0, unbiased=False), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="`target` is Expected, which fixes beta and lam; pass Renoise"):
        lgd.guided_energy_curve(x, x, x, testing.step_levels(2), lgd.Expected(x[:, 0]))
