"""Test tables of omega(c, s, t) by hand, and that every kernel reads the same value.

`guided_score(0, -1, omega)` is omega itself, so a test sees the value that a kernel looked up.
"""

import math

import pytest
import torch
from conftest import dtypes_of

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.guided_score import reference
from lgd_kernels.ops.guided_score.structs import GuidedScore
from lgd_kernels.runtime.arguments import Omega
from lgd_kernels.runtime.levels import OmegaLookup, omega_at, table_gradient

# [[omega(0, .6), omega(0, 1)], [omega(.4, .6), omega(.4, 1)]]: every corner is a step, s < t.
PLAIN = lgd.OmegaTable(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), torch.tensor([0.0, 0.4]), torch.tensor([0.6, 1.0]))

# One grid for s and t. Only (0, .5), (0, 1) and (.5, 1) are steps; no kernel may read the other values.
NAN = math.nan
DIAGONAL = lgd.OmegaTable(
    torch.tensor([[[NAN, 1.0, 2.0], [NAN, NAN, 4.0], [NAN, NAN, NAN]]]),
    torch.tensor([0.0, 0.5, 1.0]),
    torch.tensor([0.0, 0.5, 1.0]),
)
FILLED = [[1.0, 1.0, 2.0], [1.0, 1.0, 4.0], [1.0, 1.0, 4.0]]  # from the diagonal, down and to the left


def seen(target, lookup, dtype=torch.float32):
    """Return omega as a kernel reads it, `[B]`."""
    nothing = torch.zeros(lookup.c.shape, dtype=dtype, device=target.device)
    return lgd.guided_score(nothing, nothing - 1, testing.moved(lookup, target.device), impl=target.impl).cpu()


def at(table, c, s, t):
    """Look numbers up, also with s > t."""
    c, (s, t) = torch.as_tensor(c), (torch.as_tensor(time, dtype=table.s_knots.dtype) for time in (s, t))
    return OmegaLookup(table.values, table.s_knots, table.t_knots, c, s, t)


def random_table(generator, rows=5, columns=6, conditions=3, dtype=torch.float32, knots_dtype=torch.float32):
    """Return a table whose knots are at least 0.05 apart, on both sides of the diagonal."""
    s_knots, t_knots = (
        (torch.linspace(low, low + 0.2 * (count - 1), count) + 0.1 * torch.rand(count, generator=generator))
        for low, count in ((0.0, rows), (-0.1, columns))
    )
    values = 3 * torch.rand(conditions, rows, columns, generator=generator)
    return lgd.OmegaTable(values.to(dtype), s_knots.to(knots_dtype), t_knots.to(knots_dtype))


def random_lookup(table, generator, count=500, dtype=torch.float32):
    """Return a lookup anywhere around the table, also with s > t."""
    c = torch.randint(0, table.values.shape[0], (count,), generator=generator)
    s, t = (1.8 * torch.rand(2, count, generator=generator) - 0.4).to(dtype)
    return at(table, c, s, t)._replace(s=s, t=t)


@pytest.mark.parametrize(
    ("s", "t", "expected"),
    [
        (0.2, 0.8, 2.75),  # the middle: the mean
        (0.1, 0.7, 1.8125),  # 9/16 * 1 + 3/16 * 2 + 3/16 * 3 + 1/16 * 5
        (0.0, 0.9, 1.75),  # along an edge
        (-1.0, 2.0, 2.0),  # clamped to (0, 1)
        (0.9, 0.1, 3.0),  # clamped to (.4, .6)
        (0.2, 5.0, 3.5),  # clamped in t alone
    ],
)
def test_bilinear_by_hand(target, s, t, expected):
    assert seen(target, at(PLAIN, [0], [s], [t])).item() == pytest.approx(expected, rel=4e-7)
    assert omega_at(at(PLAIN, [0], [s], [t]), torch.empty(0)).item() == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize(
    ("s", "t", "expected"),
    [
        (0.25, 0.75, 2.0),  # between [1, 2] and [1, 4]: the lower left corner, (.5, .5), takes omega(0, .5)
        (0.75, 1.0, 4.0),  # (1, 1) takes omega(.5, 1)
        (0.1, 0.3, 1.0),  # column t = 0 holds no step: column t = .5 instead
        (0.5, 1.0, 4.0),
        (0.0, 0.5, 1.0),
        (1.0, 0.0, 1.0),  # far beyond the diagonal: still a number
    ],
)
def test_diagonal_by_hand(target, s, t, expected):
    assert seen(target, at(DIAGONAL, [0], [s], [t])).item() == pytest.approx(expected, rel=4e-7)
    assert omega_at(at(DIAGONAL, [0], [s], [t]), torch.empty(0)).item() == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize(
    ("s_knots", "t_knots", "values", "expected"),
    [
        ([0.2], [0.7], [[7.0]], [7.0, 7.0, 7.0]),
        ([0.2], [0.4, 0.8], [[1.0, 3.0]], [1.0, 2.0, 3.0]),
        ([0.1, 0.5], [0.9], [[1.0], [5.0]], [1.0, 3.0, 5.0]),
        ([0.5], [0.5], [[7.0]], [7.0, 7.0, 7.0]),  # no step at all: the only value
        ([0.6], [0.2, 0.4], [[1.0, 7.0]], [7.0, 7.0, 7.0]),  # likewise: the last column
    ],
)
def test_few_knots_by_hand(target, s_knots, t_knots, values, expected):
    table = lgd.OmegaTable(torch.tensor([values]), torch.tensor(s_knots), torch.tensor(t_knots))
    lookup = at(table, [0, 0, 0], [0.0, 0.3, 0.6], [0.3, 0.6, 1.0])
    assert seen(target, lookup).tolist() == pytest.approx(expected, rel=4e-7)
    assert omega_at(lookup, lookup.s).tolist() == pytest.approx(expected, rel=4e-7)


def test_exact_at_knots(target, generator):
    """Check that omega at the knots of a step is the value itself, to the last bit."""
    table = random_table(generator)
    steps = table.s_knots[:, None] < table.t_knots
    row, column = steps.nonzero().unbind(1)
    for c in range(3):
        lookup = table.at(torch.full_like(row, c), table.s_knots[row], table.t_knots[column])
        assert torch.equal(seen(target, lookup), table.values[c, row, column])
        assert torch.equal(omega_at(lookup, lookup.s), table.values[c, row, column])


def test_reproduces_what_is_linear(target, generator):
    """Check a + b s + c t inside the knots, where no corner lies beyond the diagonal."""
    s_knots, t_knots = torch.tensor([-1.0, -0.7, -0.2]), torch.tensor([0.1, 0.2, 0.6, 1.0])
    table = lgd.OmegaTable((2 + s_knots[:, None] + 3 * t_knots)[None], s_knots, t_knots)
    s, t = 0.8 * torch.rand(200, generator=generator) - 1, 0.9 * torch.rand(200, generator=generator) + 0.1
    lookup = table.at(torch.zeros(200, dtype=torch.int64), s, t)
    torch.testing.assert_close(seen(target, lookup), 2 + s + 3 * t, rtol=1e-6, atol=0)


def test_conditions_do_not_mix(target, generator):
    table = random_table(generator)
    lookup = random_lookup(table, generator)
    changed = lookup._replace(values=table.values + torch.tensor([0.0, 5.0, 0.0])[:, None, None])
    before, after = seen(target, lookup), seen(target, changed)
    torch.testing.assert_close(after, torch.where(lookup.c == 1, before + 5, before), rtol=1e-6, atol=0)


def filled(values, s_knots, t_knots):
    """Fill a table by the rule in words: the last row before the diagonal, or, where there is none, the first column
    that has one."""
    steps = [[row for row, s in enumerate(s_knots) if s < t] for t in t_knots]
    first = next(column for column, rows in enumerate(steps) if rows)
    table = values.clone()
    for column in range(len(t_knots)):
        source = max(column, first)
        for row in range(len(s_knots)):
            table[:, row, column] = values[:, min(row, steps[source][-1]), source]
    return table


def test_filling_by_hand():
    assert filled(DIAGONAL.values, DIAGONAL.s_knots, DIAGONAL.t_knots)[0].tolist() == FILLED


@pytest.mark.parametrize("shape", [(5, 6), (2, 2), (7, 3), (3, 9)], ids=str)
def test_filling_is_all_that_the_diagonal_does(target, shape, generator):
    """Compare with a table filled beforehand, whose s is so far below that no corner lies beyond the diagonal."""
    table = random_table(generator, *shape)
    lookup = random_lookup(table, generator)
    below = lookup._replace(
        values=filled(table.values, table.s_knots, table.t_knots), s_knots=table.s_knots - 8, s=lookup.s - 8
    )
    torch.testing.assert_close(seen(target, lookup), omega_at(below, lookup.s), rtol=0, atol=4e-5)  # s - 8 rounds


@pytest.mark.parametrize("times", [torch.float32, torch.float64])
@pytest.mark.parametrize("knots", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", testing.DTYPES)
def test_agrees_with_float64(target, values, knots, times, generator):
    """Compare all dtypes with the same numbers in float64, within the rounding of the arithmetic."""
    lookup = random_lookup(random_table(generator, dtype=values, knots_dtype=knots), generator, dtype=times)
    truth = omega_at(testing.promoted(lookup), torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(seen(target, lookup).double(), truth, rtol=0, atol=4e-6)
    if torch.float64 in dtypes_of(target):
        found = seen(target, lookup, torch.float64)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-14)


@pytest.mark.parametrize("times", [torch.float32, torch.float64])
@pytest.mark.parametrize("knots", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", testing.DTYPES)
def test_reference_keeps_float64(values, knots, times, generator):
    """Check that the reference computes in float64 for float64 data, even if table and times are float32."""
    lookup = random_lookup(random_table(generator, dtype=values, knots_dtype=knots), generator, dtype=times)
    like = torch.empty(0, dtype=torch.float64)
    truth = omega_at(testing.promoted(lookup), like)
    torch.testing.assert_close(omega_at(lookup, like), truth, rtol=0, atol=1e-14)


def test_layouts(target, generator):
    """Check transposed values, strided times and an expanded condition against contiguous copies."""
    table = random_table(generator)
    lookup = random_lookup(table, generator)
    spread = lookup._replace(
        values=table.values.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        c=lookup.c[:1].expand(500),
        s=lookup.s.repeat_interleave(2)[::2],
    )
    plain = lookup._replace(c=lookup.c[:1].repeat(500))
    assert torch.equal(seen(target, spread), seen(target, plain))


def test_calling_a_table(generator):
    table = random_table(generator, dtype=torch.bfloat16)
    lookup = random_lookup(table, generator)
    lookup = table.at(lookup.c, torch.minimum(lookup.s, lookup.t), lookup.t)
    found = table(*lookup[3:])
    assert found.dtype == torch.float32 and torch.equal(found, omega_at(lookup, torch.empty(0)))
    assert random_table(generator, dtype=torch.float64)(*lookup[3:]).dtype == torch.float64
    assert table(lookup.c.int(), lookup.s, lookup.t).shape == (500,)


@pytest.mark.parametrize("impl", ["cpu", "reference", "direct"])
def test_gradient_by_hand(impl):
    """Check two samples in one cell: the sum of the corners' weights times each sample's gradient."""
    lookup = at(PLAIN, [0, 0], [0.1, 0.2], [0.7, 0.8])
    upstream = torch.tensor([16.0, 4.0])
    expected = [[9 + 1, 3 + 1], [3 + 1, 1 + 1]]
    assert gradient(impl, lookup, upstream)[0].flatten().tolist() == pytest.approx(sum(expected, []), rel=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference", "direct"])
def test_gradient_across_the_diagonal_by_hand(impl):
    """Check that the gradient of a filled corner goes to the cell it was filled from, and none to cells without a
    step."""
    expected = [[0, 0.5, 0.25], [0, 0, 0.25], [0, 0, 0]]  # (.5, .5) was filled from (0, .5)
    assert gradient(impl, at(DIAGONAL, [0], [0.25], [0.75]), torch.ones(1))[0].tolist() == expected


def gradient(impl, lookup, upstream):
    """Return d <upstream, omega> / d values."""
    if impl == "direct":
        return table_gradient(lookup, upstream)
    values = lookup.values.clone().requires_grad_()
    nothing = torch.zeros_like(upstream)
    guided = lgd.guided_score(nothing, nothing - 1, lookup._replace(values=values), impl=impl)
    return torch.autograd.grad(guided, values, upstream)[0]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck(impl, generator):
    table = random_table(generator, 3, 4, 2, dtype=torch.float64, knots_dtype=torch.float64)
    lookup = random_lookup(table, generator, 7, torch.float64)
    cond, uncond = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator)
    inputs = [tensor.clone().requires_grad_() for tensor in (cond, uncond, table.values)]

    def score(cond, uncond, values):
        return lgd.guided_score(cond, uncond, lookup._replace(values=values), impl=impl)

    assert torch.autograd.gradcheck(score, inputs)
    assert torch.autograd.gradgradcheck(score, inputs)
    assert torch.autograd.gradcheck(lambda values: omega_at(lookup._replace(values=values), cond), inputs[2:])


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_gradient_agrees_with_float64(target, dtype, generator):
    """Compare gradients in the dtype of the values, each cell within the rounding of its own sum."""
    lookup = random_lookup(random_table(generator, dtype=dtype), generator)
    cond, uncond, upstream = torch.randn(3, 500, 4, generator=generator)
    values, cond, uncond, upstream, *rest = (
        tensor.to(target.device) for tensor in (lookup.values, cond, uncond, upstream, *lookup[1:])
    )
    values.requires_grad_()
    guided = lgd.guided_score(cond, uncond, OmegaLookup(values, *rest), impl=target.impl)
    (found,) = torch.autograd.grad(guided, values, upstream)
    assert found.dtype == table_gradient(lookup, upstream[:, 0].cpu()).dtype == dtype

    wide = testing.promoted(lookup)._replace(values=values.detach().cpu().double().requires_grad_())
    cond, uncond, upstream = (tensor.cpu().double() for tensor in (cond, uncond, upstream))
    (truth,) = torch.autograd.grad(
        reference.guided_score(GuidedScore(cond, uncond, Omega.of(wide, cond))), wide.values, upstream
    )
    terms = table_gradient(wide, (upstream * (cond - uncond)).abs().sum(1))
    unit = max(torch.finfo(dtype).eps, 8 * 2.0**-24)
    assert ((found.cpu().double() - truth).abs() <= unit * terms + 1e-12).all()


def test_gradient_is_the_same_every_time(target, generator):
    """Check 2000 samples in four cells, float32: another order would change the last bits."""
    s, t, upstream = torch.randn(3, 2000, generator=generator)
    lookup, upstream = at(PLAIN, [0] * 2000, s, t), upstream.to(target.device)
    lookup = testing.moved(lookup, target.device)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(gradient(target.impl, lookup, upstream))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_compiles_in_one_graph(generator):
    """Compare the compiled forward and backward with eager mode."""
    lookup = random_lookup(random_table(generator), generator, 6)
    cond, uncond, upstream = torch.randn(3, 6, 5, generator=generator)

    def loss(values):
        return (lgd.guided_score(cond, uncond, lookup._replace(values=values)) * upstream).sum()

    leaf = lookup.values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("c", [-1, 1, 2**40])
def test_unknown_condition_is_nan(target, c):
    """Check c that is not readable beforehand: its neighbour is unchanged, and no kernel reads outside the table."""
    lookup = at(PLAIN, [0, 0], [0.2, 0.2], [0.8, 0.8])._replace(c=torch.tensor([c, 0]))
    for omega in (seen(target, lookup), omega_at(lookup, lookup.s)):
        assert omega[0].isnan() and omega[1] == pytest.approx(2.75)


def test_nan_time_is_nan(target):
    """Check that a NaN time gives NaN, and is not clamped into the table."""
    lookup = at(PLAIN, [0, 0, 0], [NAN, 0.2, 0.2], [0.8, NAN, 0.8])
    for omega in (seen(target, lookup), omega_at(lookup, lookup.s)):
        assert omega.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("upstream", [1.0, math.nan])
@pytest.mark.parametrize("impl", ["cpu", "reference", "direct"])
def test_unknown_condition_has_no_gradient(impl, upstream):
    """Check that an unknown condition reads no cell and adds no gradient, not even to condition 0."""
    lookup = at(PLAIN, [0, 0], [0.2, 0.2], [0.8, 0.8])._replace(c=torch.tensor([1, 0]))
    found = gradient(impl, lookup, torch.tensor([upstream, 1.0]))
    assert found.flatten().tolist() == pytest.approx([0.25] * 4)
