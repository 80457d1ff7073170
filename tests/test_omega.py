"""Test sources of omega: the network, its table, and the formulas."""

from functools import partial

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.guidance import rules
from lgd_kernels.omega.floor import above_zero
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import TableModule

FLOW = lgd.RectifiedFlow()
SCHEDULES = [FLOW, lgd.VPCosine(), lgd.VPLinear.stable_diffusion(), lgd.EDM(sigma_max=10.0), lgd.Discrete.ddpm(20)]


def times(count, schedule=FLOW):
    """Return times s < t, with both ends of the schedule."""
    u = torch.rand(2, count, generator=torch.Generator().manual_seed(1)) * 0.45 + torch.tensor([[0.0], [0.5]])
    u[0, 0], u[1, 0] = 0.0, 1.0
    return schedule.from_unit(u[0]), schedule.from_unit(u[1])


@pytest.fixture(params=["classes", "embedding", "neither"])
def network(request):
    """Return (network, conditions for 12 samples)."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    if request.param == "classes":
        return OmegaNetwork(FLOW, classes=3, initial=2.0), torch.arange(3).repeat(4)
    if request.param == "embedding":
        return OmegaNetwork(FLOW, embedding=5, initial=2.0), torch.randn(12, 5, generator=generator)
    return OmegaNetwork(FLOW, initial=2.0), None


def test_network_is_non_negative_finite_and_alive(network):
    net, c = network
    s, t = times(12)  # log-SNR infinite at both ends
    omega = net(c, s, t)
    assert omega.shape == (12,) and bool((omega - 2).abs().max() < 1)
    omega.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in net.parameters())
    with torch.no_grad():
        net.head[-1].bias.fill_(-9)
    assert torch.equal(net(c, s, t), torch.zeros(12))


def test_the_floor_lets_nothing_far_down_and_all_come_up():
    value = torch.tensor([-1.0, -1.0, -0.1, 0.0, 2.0, 2.0], requires_grad=True)
    upstream = torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0])
    assert above_zero(value).tolist() == [0, 0, 0, 0, 2, 2]
    (slope,) = torch.autograd.grad(above_zero(value), value, upstream)
    assert slope.tolist() == [0, -3, 3, -3, 3, -3]
    each = torch.vmap(torch.func.grad(lambda one, weight: above_zero(one) * weight))(value.detach(), upstream)
    assert each.tolist() == slope.tolist()
    _, tangent = torch.func.jvp(above_zero, (value.detach(),), (upstream,))
    assert tangent.tolist() == [0, 0, 0, 0, 3, -3]
    (slope,) = torch.autograd.grad(above_zero(value), value, torch.full_like(value, torch.nan))
    assert slope.isnan().all()


@pytest.mark.parametrize("make", [lambda: OmegaNetwork(FLOW), lambda: Constant(1.0), lambda: ClampLinear(1.0, 0.0)])
def test_a_weight_that_was_pushed_to_0_comes_back(make):
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in ("head.10.bias", "omega", "intercept"):
                parameter -= 3
    s, t = torch.rand(2, 32).sort(0).values
    assert not module(None, s, t).any()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (module(None, s, t) - 1).square().mean().backward()
        optimizer.step()
    assert (module(None, s, t) - 1).abs().max() < 0.2


def test_the_noise_of_batches_does_not_lift_a_weight_off_0(generator):
    """Check that a loss whose mean rises with omega ends at 0, and stays there."""
    module, seen = Constant(1.0), []
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        (module(None, torch.zeros(1), torch.ones(1)) * (0.5 + torch.randn(1, generator=generator))).sum().backward()
        optimizer.step()
        seen.append(module(None, torch.zeros(1), torch.ones(1)).item())
    assert max(seen[-200:]) == 0 and module.omega > -0.5


@pytest.mark.parametrize("initial", [0.01, 1.0, 7.5])
def test_network_starts_alive_however_small_omega_is(initial):
    s, t = times(200)
    for seed in range(5):
        torch.manual_seed(seed)
        c = 100 * torch.randn(200, 16)  # embeddings of any scale
        omega = OmegaNetwork(FLOW, embedding=16, hidden=32, initial=initial)(c, s, t)
        assert bool(((omega - initial).abs() < 0.6 * initial).all())


def test_network_sees_embeddings_in_any_scale():
    torch.manual_seed(0)
    net, c, (s, t) = OmegaNetwork(FLOW, embedding=768), torch.randn(8, 768), times(8)
    torch.testing.assert_close(net(c, s, t), net(0.04 * c, s, t), rtol=1e-3, atol=1e-4)
    assert net(c, s, t)[1:].std() > 0 and not torch.equal(net(c, s, t), net(c.flip(0), s, t))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_network_takes_the_times_of_its_schedule(schedule):
    torch.manual_seed(0)
    net, (s, t) = OmegaNetwork(schedule, classes=2), times(6, schedule)
    c = torch.tensor([0, 1] * 3)
    assert bool(net(c, s, t).isfinite().all())
    torch.testing.assert_close(net(c, s, t)[1:2], net(c[1:2], s[1:2], t[1:2]))  # alone as in a batch


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OmegaNetwork("flow"), "`schedule` is a str, expected a Schedule"),
        (lambda: OmegaNetwork(FLOW, 3, 4), "classes = 3 and embedding = 4, expected one"),
        (lambda: OmegaNetwork(FLOW, 0), "classes is 0, expected a number of 1 or more"),
        (lambda: OmegaNetwork(FLOW, hidden=2.5), "hidden is 2.5"),
        (lambda: OmegaNetwork(FLOW, 3, initial=0.0), "the last weights are scaled by it"),
        (lambda: OmegaNetwork(FLOW, 3)(None, *times(2)), "`c` is None, expected int64 labels"),
        (lambda: OmegaNetwork(FLOW, 3)(torch.zeros(2), *times(2)), "`c` is torch.float32 .*, expected int64 labels"),
        (lambda: OmegaNetwork(FLOW, None, 4)(torch.zeros(2, 3), *times(2)), r"expected embeddings \[B, E\] = \[2, 4\]"),
        (lambda: OmegaNetwork(FLOW)(None, torch.zeros(2), torch.ones(3)), "`s` and `t` have shapes"),
        (lambda: OmegaNetwork(FLOW, None, 4).bake(torch.zeros(1), torch.ones(1)), "`conditions` is missing"),
        (lambda: Interval(1.0, 0.8, 0.2), "low = 0.8 and high = 0.2"),
        (lambda: Constant(float("nan")), "omega is nan, expected a finite number"),
        (lambda: Constant(None), "Constant: omega is a NoneType, expected a number"),
        (lambda: Constant("1"), "Constant: omega is a str, expected a number"),
        (lambda: Interval(1.0, None, 0.2), "Interval: low is a NoneType, expected a number"),
        (lambda: Interval(1.0, 0.2, "1"), "Interval: high is a str, expected a number"),
        (lambda: ClampLinear(1.0, torch.zeros(2)), "ClampLinear: slope is a Tensor, expected a number"),
        (lambda: OmegaNetwork(FLOW, initial=float("inf")), "`initial` is inf, expected above 0"),
        (lambda: OmegaNetwork(FLOW, initial="1"), "`initial` is '1', expected above 0"),
        (lambda: TableModule(None), "TableModule: `table` is a NoneType, expected an OmegaTable"),
    ],
)
def test_refuses(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_baked_table_is_the_network_at_its_knots(network):
    net, c = network
    conditions = None if c is None or not c.is_floating_point() else c[:3]
    s_knots, t_knots = torch.linspace(0, 0.4, 5), torch.linspace(0.5, 1, 6)  # every corner is a step
    table, error = net.bake(s_knots, t_knots, conditions)
    count = 1 if c is None else 3
    assert table.values.shape == (count, 5, 6) and not table.values.requires_grad
    i, j = torch.randint(5, (12,)), torch.randint(6, (12,))
    k = torch.arange(12) % count
    own = None if c is None else (k if conditions is None else conditions[k])
    torch.testing.assert_close(table(k, s_knots[i], t_knots[j]), net(own, s_knots[i], t_knots[j]).detach())
    finer = net.bake(torch.linspace(0, 0.4, 17), torch.linspace(0.5, 1, 21), conditions)[1]
    assert 0 <= finer < error / 4 < 0.05  # the error of a bilinear table falls with the square of the cell


def test_baking_reports_the_error_that_is_there():
    """Compare the error with brute force at the middles of cells, on a grid that the diagonal cuts."""
    torch.manual_seed(0)
    net, knots = OmegaNetwork(FLOW, classes=2).requires_grad_(False), torch.linspace(0, 1, 6)
    table, error = net.bake(knots, knots)
    middles = [(float(s) + 0.1, float(t) + 0.1) for s in knots[:-1] for t in knots[:-1] if s < t]
    s, t = torch.tensor(middles).T
    worst = max(float((table(c, s, t) - net(c, s, t)).abs().max()) for c in torch.arange(2)[:, None].expand(2, len(s)))
    assert error == pytest.approx(worst, abs=1e-6) and error > 0


def test_baking_counts_where_the_schedule_counts():
    torch.manual_seed(0)
    schedule = lgd.Discrete.ddpm(20)
    net = OmegaNetwork(schedule, classes=2)
    table, error = net.bake(torch.arange(-1, 19, 4), torch.arange(3, 20, 4))
    s, t = torch.tensor([-1, 3, 7]), torch.tensor([3, 11, 19])  # integers, looked up as they are
    c = torch.tensor([0, 1, 1])
    torch.testing.assert_close(table(c, s, t), net(c, s, t).detach())
    assert 0 < error < 0.1


def test_a_table_of_one_condition_needs_none():
    table = lgd.OmegaTable(torch.tensor([[[1.0, 3.0]]]), torch.tensor([0.0]), torch.tensor([0.5, 1.0]))
    assert table(None, torch.zeros(2), torch.tensor([0.5, 0.75])).tolist() == [1.0, 2.0]
    with pytest.raises(TypeError, match="`c` is a NoneType"):
        lgd.OmegaTable(torch.zeros(2, 1, 1), torch.zeros(1), torch.ones(1))(None, torch.zeros(1), torch.ones(1))


def test_forms_say_what_they_are():
    s, t = torch.zeros(4), torch.tensor([0.0, 0.2, 0.5, 0.8])
    assert Constant(0.5)(None, s, t).tolist() == [0.5] * 4
    assert Interval(2.0, 0.2, 0.8)(None, s, t).tolist() == [0.0, 0.0, 2.0, 2.0]  # (low, high]
    assert ClampLinear(1.0, -2.0)(None, s, t).tolist() == [1.0, pytest.approx(0.6), 0.0, 0.0]
    for form in (Constant(-1.0), Interval(-1.0, 0.0, 1.0), ClampLinear(-1.0, 0.0)):
        assert torch.equal(form(None, s, t), torch.zeros(4))  # never below 0


KNOTS = torch.linspace(0, 1, 4)
EACH_OMEGA = {
    "network": OmegaNetwork(FLOW, classes=2),
    "table": lgd.OmegaTable(torch.rand(2, 4, 4), KNOTS, KNOTS),
    "table, learned": TableModule(lgd.OmegaTable(torch.rand(2, 4, 4), KNOTS, KNOTS)),
    "constant": Constant(1.0),
    "interval": Interval(1.0, 0.2, 0.8),
    "clamp-linear": ClampLinear(1.0, -0.5),
}


@pytest.mark.parametrize("name", EACH_OMEGA)
def test_the_end_of_a_step_comes_first(name):
    """Check that s and t in the order of levels(t, s), not omega(c, s, t), raise where they are readable."""
    omega, c = EACH_OMEGA[name], torch.tensor([0, 1])
    s, t = torch.tensor([0.1, 0.6]), torch.tensor([0.5, 0.6])  # s = t: a step of length 0
    expected = omega(c, s, t)
    assert torch.equal(omega(c, t=t, s=s), expected)
    with pytest.raises(ValueError, match="`s` is 0.5 and `t` is 0.1 in sample 0, expected s <= t: .* takes s first"):
        omega(c, t, s)
    hidden = torch.vmap(lambda t, s: omega(c, t, s))(t[None], s[None])  # a transform reads no values
    assert hidden.shape == (1, 2) and hidden.isfinite().all()


def test_a_picture_has_t_to_the_right(tmp_path):
    """Draw omega = t from the second knot on: values rise to the right, and the image is blank where s >= t."""
    table = lgd.OmegaTable(KNOTS.expand(2, 4, 4), KNOTS, KNOTS)
    figure = table.plot(tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TypeError, match="plot: `schedule` is a str, expected a schedule"):
        table.plot(schedule="flow")
    *panels, _ = figure.axes  # the last is the bar of colours
    assert [panel.get_xlabel() for panel in panels] == ["t", "t"] and panels[0].get_ylabel() == "s"
    for panel in panels:
        sheet = torch.tensor(panel.images[0].get_array().filled(float("nan")))  # [row: s, column: t]
        assert torch.equal(sheet.isnan(), ~torch.ones_like(sheet, dtype=torch.bool).triu(1))
        torch.testing.assert_close(sheet[0, 14:], torch.linspace(0, 1, 41)[14:].double(), check_dtype=False)


def test_a_picture_of_other_times():
    """Check the axes: to the last knots, or in the unit times of a schedule."""
    sigmas = torch.tensor([0.0, 1.0, 80.0])
    table = lgd.OmegaTable(torch.ones(1, 3, 2), sigmas, sigmas[1:])
    assert table.plot().axes[0].images[0].get_extent() == [0, 80, 0, 80]
    assert table.plot(schedule=lgd.EDM()).axes[0].images[0].get_extent() == [0, 1, 0, 1]
    steps = torch.tensor([-1.0, 500.0, 999.0])
    table = lgd.OmegaTable(torch.ones(1, 3, 2), steps, steps[1:])
    assert table.plot(schedule=lgd.Discrete.ddpm()).axes[0].images[0].get_extent() == [0, 1, 0, 1]


def test_an_interval_is_the_rule_of_that_name():
    t = torch.linspace(0, 1, 11)
    rule = partial(rules.interval, t=t, low=0.3, high=0.7)
    guided = lgd.guided_score(torch.zeros(11, 1), -torch.ones(11, 1), torch.full((11,), 1.5), rule=rule)
    assert torch.equal(Interval(1.5, 0.3, 0.7)(None, torch.zeros(11), t).detach(), guided[:, 0])


@pytest.mark.parametrize("form", [Constant(0.5), Interval(0.5, 0.2, 0.8), ClampLinear(1.0, -0.5)], ids=repr)
def test_forms_are_learned(form):
    s, t = torch.zeros(50), torch.linspace(0, 1, 50)
    before = form(None, s, t).detach()
    optimizer = torch.optim.SGD(form.parameters(), 0.05)
    (form(None, s, t) - 2 * before).square().mean().backward()
    assert all(p.grad.abs() > 0 for p in form.parameters())
    optimizer.step()
    assert (form(None, s, t) - 2 * before).square().mean() < before.square().mean()


def test_a_table_is_baked_in_full_precision_under_autocast():
    network, knots = (
        OmegaNetwork(FLOW, classes=3),
        (torch.linspace(0, 0.9, 5), torch.linspace(0.1, 1, 5)),
    )
    table, error = network.bake(*knots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, told = network.bake(*knots)
    assert torch.equal(found.values, table.values) and told == error > 0
