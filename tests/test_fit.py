"""omega without a network: that fits are minima, by brute force and by hand, and what they do where data is thin."""

import itertools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.learn.fit import fit_constant, fit_interval, fit_table
from lgd_kernels.learn.objective import sample_times
from lgd_kernels.learn.pooled import joined
from lgd_kernels.runtime.levels import OmegaLookup, omega_at

FLOW = lgd.RectifiedFlow()
KNOTS = torch.linspace(0, 1, 5)


def items(count, truth, classes=2, dim=6, seed=0):
    """(curve, c, s, t) of particles for which `omega = truth(c, s, t)` repairs the prediction, whatever the noise."""
    generator = torch.Generator().manual_seed(seed)
    s, t = sample_times(count, delta=0.05, generator=generator)
    c = torch.randint(classes, (count,), generator=generator)
    x0, z = torch.randn(count, dim, generator=generator), torch.randn(count, 4, dim, generator=generator)
    x_t = (1 - t)[:, None, None] * x0[:, None] + t[:, None, None] * z
    uncond = 0.2 * x0[:, None].expand_as(x_t)
    cond = uncond + 0.8 * x0[:, None] / (1 + truth(c, s, t))[:, None, None]  # uncond + (1 + omega) (cond - uncond) = x0
    levels = FLOW.levels(t, s)
    curve = lgd.guided_energy_curve(x_t, cond, uncond, levels, lgd.Renoise(x0, 4, seed + 1), churn=1.0, seed=seed + 1)
    return curve, c, s, t


def made(values):
    return lgd.OmegaTable(torch.as_tensor(values), KNOTS, KNOTS)


def smooth_truth(c, s, t):
    return 0.3 + c + 1.5 * t - s


@pytest.fixture(scope="module")
def data():
    return items(3000, smooth_truth)


def test_a_known_omega_comes_back(data):
    """That of the data lies in the space of tables: bilinear, here even linear."""
    curve, c, s, t = data
    table = fit_table(curve, c, s, t, KNOTS, KNOTS, smooth=1.0)
    assert table.values.shape == (2, 5, 5) and table.values.dtype == torch.float32
    again = items(2000, smooth_truth, seed=7)
    wrong = table(*again[1:]) - smooth_truth(*again[1:])
    assert wrong.square().mean().sqrt() < 0.12 and abs(wrong.mean()) < 0.05
    loss = [float(again[0].loss(omega).mean()) for omega in (table(*again[1:]), smooth_truth(*again[1:]))]
    constant = fit_constant(curve)
    assert loss[0] - loss[1] < 0.02 * (float(again[0].loss(constant(*again[1:]).detach()).mean()) - loss[1])


def test_the_fit_is_a_minimum(data):
    """Of loss and springs as the docstring has them: no value can be moved to gain, and autograd sees no slope."""
    curve, c, s, t = data
    knots = KNOTS.double()
    table = fit_table(curve, c, s, t, knots, knots, smooth=5.0, shared=3.0)
    whole = fit_table(curve, None, s, t, knots, knots, smooth=5.0)
    held = KNOTS[:, None] < KNOTS[None, :]

    def bending(values):
        found = 0.0
        for stiff, pattern in ((1.0, (1, -2, 1)), (0.03, (1, -1))):
            for i, j, along in itertools.product(range(5), range(5), (True, False)):
                row = [(i + n, j) if along else (i, j + n) for n in range(len(pattern))]
                if all(max(one) < 5 and held[one] for one in row):
                    parts = [weight * values[:, k, m] for weight, (k, m) in zip(pattern, row, strict=True)]
                    found = found + stiff * sum(parts).square().sum()
        return found

    def objective(values, bend, rest, smooth=5.0, shared=3.0):
        apart = values - rest
        stretch = smooth * bending(apart) + shared * apart[:, held].square().sum()
        at = c if len(values) > 1 else torch.zeros_like(c)
        return curve.loss(lgd.OmegaTable(values, knots, knots)(at, s, t)).sum() + bend / 2 * stretch

    start = _best_constants(curve, 0 * c)
    bends = curve.hessian(whole(0 * c, s, t)).mean(), curve.hessian(start[0 * c]).mean()
    for fitted, bend, rest, shared in ((table, bends[0], whole.values, 3.0), (whole, bends[1], 0.0, 0.0)):
        values = fitted.values.clone().requires_grad_()
        least = objective(values, bend, rest, shared=shared)
        (slope,) = torch.autograd.grad(least, values)
        free = (fitted.values > 1e-3) & held
        assert free.sum() >= 8 and slope[free].abs().max() < 1e-3 * bend  # Newton's step would be 1e-3 / items
        assert bool((slope[~free & held] >= 0).all())
        for shift in torch.randn(6, *values.shape, generator=torch.Generator().manual_seed(0)).double():
            assert objective((fitted.values + 0.05 * shift).clamp(0, 10), bend, rest, shared=shared) > least


def _best_constants(curve, c):
    """The best of 33 for each condition."""
    grid = torch.linspace(0, 10, 33, dtype=torch.float64)
    losses = curve.loss(grid.expand(len(c), -1))
    return grid[torch.stack([losses[c == k].sum(0) for k in range(int(c.max()) + 1)]).argmin(1)]


@pytest.mark.parametrize(
    "beta, lam, unbiased", [(1.75, 1.0, True), (1.0, 0.5, False), (0.5, 1.0, True), (2.0, 0.0, True)]
)
def test_constants_are_the_curves_own_minimum(data, beta, lam, unbiased):
    curve, c, s, t = data
    options = {"beta": beta, "lam": lam, "unbiased": unbiased}
    everything = curve.minimize(group=torch.zeros_like(c), **options)
    assert fit_constant(curve, **options).omega.item() == pytest.approx(float(everything), abs=1e-4)
    each = curve.minimize(group=c, **options)
    table = fit_table(curve, c, s, t, torch.zeros(1), torch.ones(1), smooth=0.0, shared=0.0, **options)
    torch.testing.assert_close(table.values.flatten().double(), each, atol=1e-4, rtol=0)


def test_an_interval_by_brute_force():
    curve, c, s, t = items(400, lambda c, s, t: torch.where((t > 0.5) & (t <= 0.75), 1.5, 0.0) + 1e-6)
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    found = []
    for low, high in itertools.combinations(edges.tolist(), 2):
        inside = (t > low) & (t <= high)
        group = (~inside).long()  # group 0 is inside
        best = curve.minimize(group=group)[0]
        found.append((float(curve.loss(torch.where(inside, best, 0.0)).sum()), low, high, float(best)))
    loss, low, high, omega = min(found)
    best = fit_interval(curve, t, edges)
    assert (float(best.low), float(best.high)) == (low, high) == (0.5, 0.75)
    assert float(best.omega) == pytest.approx(omega, abs=1e-4) and abs(omega - 1.5) < 0.2
    assert float(curve.loss(best(c, s, t).detach()).sum()) == pytest.approx(loss, abs=1e-3)
    assert float(fit_interval(curve, t, torch.tensor([0.0, 1.0])).omega) == pytest.approx(
        float(fit_constant(curve).omega), abs=1e-5
    )


def test_an_interval_takes_its_upper_end_and_not_its_lower():
    curve, _, s, t = items(3, lambda c, s, t: 1 + 0 * t)
    t = torch.tensor([0.25, 0.5, 0.75])  # as the fit sees them
    assert fit_interval(curve, t, torch.tensor([0.5, 0.75])).high == 0.75
    inside = only(curve, [2])
    assert float(fit_interval(curve, t, torch.tensor([0.5, 0.75])).omega) == pytest.approx(
        float(fit_constant(inside).omega), abs=1e-5
    )


def only(curve, chosen):
    return type(curve)(type(curve.statistics)(*(field[chosen] for field in curve.statistics)))


def test_guidance_that_harms_is_left_out(data):
    """The bracket ends at 0: where less would be better still, the table holds exactly 0."""
    curve, c, s, t = items(500, lambda c, s, t: torch.where(c == 0, -0.5, 1.0))
    table = fit_table(curve, c, s, t, KNOTS, KNOTS, shared=0.0)
    seen = KNOTS[:, None] < KNOTS[None, :]
    assert bool((table.values[0] == 0).all()) and bool((table.values[1][seen] > 0.5).all())
    assert float(fit_constant(only(curve, c == 0)).omega) == 0


def test_where_there_are_no_items(data):
    """A condition without items is the table of all; a knot without goes on as its neighbours do."""
    curve, c, s, t = data
    chosen = (t > 0.6) & (c == 0)
    part = only(curve, chosen), c[chosen], s[chosen], t[chosen]
    table = fit_table(*part, KNOTS, KNOTS, conditions=3, smooth=1.0)
    whole = fit_table(part[0], None, *part[2:], KNOTS, KNOTS, smooth=1.0)
    assert torch.equal(table.values[1:], whole.values.expand(2, -1, -1))
    first, second, third = table.values[0, 0, 1:4]  # t = .25, which no item reads, .5 and .75
    assert 0 < first < second < third and abs(first - 2 * second + third) < 0.2


def test_conditions_share(data):
    """With few items of its own a condition is nearer to the truth for knowing the others'."""
    curve, c, s, t = items(2000, lambda c, s, t: 0.5 + t + 0.02 * c, classes=20)
    again = items(4000, lambda c, s, t: 0.5 + t + 0.02 * c, classes=20, seed=5)[1:]
    wrong = [
        (fit_table(curve, c, s, t, KNOTS, KNOTS, shared=shared)(*again) - (0.5 + again[2] + 0.02 * again[0]))
        .square()
        .mean()
        for shared in (0.0, 2.0)
    ]
    assert wrong[1] < 0.8 * wrong[0]


def test_a_table_holds_what_a_lookup_reads(data):
    table = fit_table(data[0], *data[1:], KNOTS, KNOTS)
    i, j = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    c, s, t = torch.zeros(25, dtype=torch.int64), KNOTS[i.flatten()], KNOTS[j.flatten()]  # s after t too
    read = omega_at(OmegaLookup(table.values, KNOTS, KNOTS, c, s, t), table.values).view(5, 5)
    assert torch.equal(read, table.values[0])
    assert torch.equal(read[3, :4], torch.stack([read[0, 1], read[0, 1], read[1, 2], read[2, 3]]))  # from the diagonal


def test_smoothing(data):
    curve, c, s, t = data
    rough, middle, stiff = (fit_table(curve, c, s, t, KNOTS, KNOTS, smooth=v) for v in (0.0, 30.0, 1e9))
    spread = [float(table.values[:, 0, 1:].std(1).mean()) for table in (rough, middle, stiff)]
    assert spread[0] > spread[1] > 10 * spread[2] and spread[2] < 1e-3  # in the end, a constant for each class
    losses = [float(curve.loss(table(c, s, t)).sum()) for table in (rough, middle, stiff)]
    assert losses == sorted(losses)
    chosen = fit_table(curve, c, s, t, KNOTS, KNOTS, smooth=(0.0, 30.0, 1e9))
    assert any(torch.equal(chosen.values, table.values) for table in (rough, middle))  # never the constant


def test_batches_are_as_good_as_one(data):
    (curve, c, s, t), count = data, 600
    curve, c, s, t = only(curve, slice(0, count)), c[:count], s[:count], t[:count]
    apart = [only(curve, slice(0, 200)), only(curve, slice(200, count))]
    torch.set_num_threads(1)
    one = fit_table(curve, c, s, t, KNOTS, KNOTS)
    torch.set_num_threads(2)
    assert torch.equal(fit_table(apart, c, s, t, KNOTS, KNOTS).values, one.values)
    assert torch.equal(fit_interval(apart, t, KNOTS).omega, fit_interval(curve, t, KNOTS).omega)
    assert torch.equal(fit_constant(apart).omega, fit_constant(curve).omega)


def test_conditions_need_not_see_each_other(data):
    curve, c, s, t = data
    both = fit_table(curve, c, s, t, KNOTS, KNOTS, smooth=0.0, shared=0.0)
    first = c == 0
    alone = fit_table(only(curve, first), None, s[first], t[first], KNOTS, KNOTS, smooth=0.0)
    torch.testing.assert_close(alone.values[0], both.values[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v, c, s, t: fit_table([], c, s, t, KNOTS, KNOTS), "`curves` must be an EnergyCurve .*, not empty"),
        (lambda v, c, s, t: fit_table(v, c[1:], s, t, KNOTS, KNOTS), r"`c` has shape \[9\], expected \[N\] = \[10\]"),
        (lambda v, c, s, t: fit_table(v, c, s, t[1:], KNOTS, KNOTS), r"`t` has shape \[9\]"),
        (lambda v, c, s, t: fit_table(v, c, s, t, KNOTS.flip(0), KNOTS), "`s_knots` must increase strictly"),
        (lambda v, c, s, t: fit_table(v, c, s, t, KNOTS, KNOTS, smooth=-1), "`smooth` is -1, expected numbers"),
        (lambda v, c, s, t: fit_table(v, c, s, t, KNOTS, KNOTS, shared=-1), "`shared` is -1, expected a number"),
        (lambda v, c, s, t: fit_table(v, c, s, t, KNOTS, KNOTS, conditions=1), r"expected conditions in \[0, 1\)"),
        (lambda v, c, s, t: fit_table(v, c, s, t, KNOTS, KNOTS, bracket=(-1, 1)), r"`bracket` is \(-1, 1\), expected"),
        (lambda v, c, s, t: fit_constant(v, bracket=(2, 1)), r"`bracket` is \(2, 1\)"),
        (lambda v, c, s, t: fit_constant(v, beta=3.0), "`beta` is 3.0"),
        (lambda v, c, s, t: fit_interval(v, t, KNOTS.flip(0)), "`edges` is .*, expected two or more times"),
        (lambda v, c, s, t: fit_interval(v, t[1:], KNOTS), r"`t` has shape \[9\]"),
    ],
)
def test_refuses(call, message, data):
    curve, c, s, t = data
    with pytest.raises((TypeError, ValueError), match=message):
        call(only(curve, slice(0, 10)), *(part[:10] for part in (c, s, t)))


def test_refuses_items_that_are_not_finite(data):
    broken = only(data[0], list(range(10)))  # a copy
    broken.statistics.P0[3] = torch.nan
    with pytest.raises(ValueError, match="hold 1 of 10 items that are not finite, first item 3"):
        fit_constant(broken)
    with pytest.raises(ValueError, match=r"have \(particles, targets\) of \[\(2, 4\), \(4, 4\)\]"):
        x = torch.zeros(1, 2, 6)
        joined(
            [data[0], lgd.guided_energy_curve(x, x, x, FLOW.levels(torch.ones(1), torch.zeros(1)), x.repeat(1, 2, 1))]
        )
