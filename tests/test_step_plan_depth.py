"""Test plans whose steps use the history of several calls."""

import pytest
import torch

from lgd_kernels import testing
from lgd_kernels.sampling.step_plan import StepPlan

BATCH = 3


def plan_of(depth, calls=6, **options):
    """Make a plan that keeps g, with the factors 1, 10, 100, ... of the history, the newest first."""
    table = torch.zeros(calls, 2, 3 + depth, dtype=torch.float64)
    table[:, 1, 1] = 1.0
    places = (2, 4, 5, 6)[:depth]
    for call in range(calls):
        for n, place in enumerate(places[:call]):
            table[call, 0, place] = 10.0**n
    return StepPlan(torch.arange(calls, 0, -1.0), table, **options)


@pytest.mark.parametrize("depth, expected", [(1, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 12, 123, 1234, 2345])])
@pytest.mark.parametrize("at", [int, torch.tensor, lambda i: torch.full((1,), i)], ids=["int", "tensor", "[B]"])
def test_a_history_that_moves_on(depth, expected, at):
    """Check by hand: call n keeps n + 1, and the next sample has the last `depth` of these as its digits."""
    plan, kept, found = plan_of(depth), None, []
    assert plan.depth == depth and plan.deep == (depth > 1) and plan.remembers
    x = torch.zeros(1, 1, dtype=torch.float64)
    for n in range(6):
        end, kept = plan.step(at(n), x, x + n + 1, kept=kept)
        found.append(int(end.item()))
    assert found == expected
    assert (len(kept) if depth > 1 else 1) == depth


def test_calls_that_stay():
    """Check a sample that keeps its whole history in a call, while others move on."""
    stays = torch.zeros(6, 2, dtype=torch.bool)
    stays[3, 1] = True
    table = plan_of(3).table.unsqueeze(1).repeat(1, 2, 1, 1)
    table[3, 1, 1] = torch.eye(6, dtype=torch.float64)[2]  # it keeps the newest as it is
    plan, kept = StepPlan(torch.zeros(6, 2), table, stays=stays), None
    x = torch.zeros(2, 1, dtype=torch.float64)
    for n in range(5):
        end, kept = plan.step(n, x, x + n + 1, kept=kept)
    assert end.flatten().tolist() == [4 + 30 + 200, 3 + 20 + 100]
    assert [one.flatten().tolist() for one in kept] == [[5, 5], [4, 3], [3, 2]]


def test_with_guidance_and_noise(target, generator):
    """Check the largest step, which reads all eight tensors that a combine takes, by the short and the general way."""
    table = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64)
    plan = StepPlan(torch.arange(3.0), table).to(target.device)
    given = testing.sample((8, BATCH, 40), torch.float32, generator)
    x, c, u, z, *kept = given.to(target.device).unbind(0)
    omega = torch.tensor([0.5, 1.0, 2.0], device=target.device)
    short = plan.step(2, x, c, u, omega, tuple(kept), noise=z, impl=target.impl)
    general = plan.step(torch.tensor(2, device=target.device), x, c, u, omega, tuple(kept), noise=z, impl=target.impl)
    x, c, u, z, *kept = given.double().unbind(0)
    guided = c + torch.tensor([[0.5], [1.0], [2.0]]) * (c - u)
    columns = torch.stack((x, guided, kept[0], z, *kept[1:]), -1)
    for row, a, b in ((0, short[0], general[0]), (1, short[1][0], general[1][0])):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.cpu().double(), columns @ table[2, row], rtol=1e-5, atol=1e-5)
    assert len(short[1]) == 4 and all(torch.equal(a.cpu(), b.float()) for a, b in zip(short[1][1:], kept, strict=False))


def test_gradients(generator):
    plan = plan_of(4)
    leaves = [one.requires_grad_() for one in testing.sample((7, 2, 3), torch.float64, generator).unbind(0)]

    def step(x, c, u, *kept):
        end, after = plan.step(5, x, c, u, 0.7, kept)
        return end, *after

    assert torch.autograd.gradcheck(step, leaves)


def test_a_history_that_is_too_short_or_too_long():
    plan, x = plan_of(4), torch.ones(BATCH, 5)
    with pytest.raises(ValueError, match="`kept` is what three steps returned in step 4, expected what the step bef"):
        plan.step(4, x, x, kept=(x, x, x))
    with pytest.raises(ValueError, match="`kept` is what two steps returned in step 3"):
        plan.step(3, x, x, kept=(x, x))
    plan.step(2, x, x, kept=(x, x))
    for at in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="`kept` is a tuple of 5, expected at most four, the newest first"):
            plan.step(at, x, x, kept=(x,) * 5)
