"""CFG-rescale compares spreads, which plain sums get wrong for a large mean or a constant prediction."""

import functools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules


def spread(tensor):
    return tensor.flatten(1).std(1)


def rescaled_steps(c, u, target, omega=2.0):
    """Return CFG-rescale in one call, on tensors and in x0 space, and the exact result."""
    rule = functools.partial(rules.rescale, phi=0.7)
    c, u = c.to(target.device), u.to(target.device)
    levels = testing.moved(lgd.RectifiedFlow().levels(torch.full((len(c),), 0.6), torch.full((len(c),), 0.2)), c.device)
    for leaf in (c, c.clone().requires_grad_()):
        yield lgd.guided_score(leaf, u, omega, rule=rule, impl=target.impl), c, u, "prediction"
        x = torch.zeros_like(c)
        for prediction, space in (("x0", "prediction"), ("flow", "x0")):
            found = lgd.guided_step(x, leaf, u, omega, levels, prediction=prediction, rule=rule, rule_space=space,
                                    impl=target.impl)  # fmt: skip
            scale = 1 if prediction == "x0" else -0.6  # x = 0: the step is 2/3 of x0, which is -0.6 times the flow
            yield found / (scale * (0.8 - 0.4 / 3)), c, u, space


@pytest.mark.parametrize("mean", [30.0, 1e3])
def test_rescale_about_a_large_mean(target, mean, generator):
    """Allow the spread of g a relative error of 1e-5 at a mean 1000 times as large."""
    c = testing.sample((3, 4, 33, 32), torch.float64, generator)
    u = c + 0.3 * testing.sample((3, 4, 33, 32), torch.float64, generator)
    for found, c_, u_, _ in rescaled_steps((c + mean).float(), (u + mean).float(), target):
        c_, u_ = c_.double().cpu(), u_.double().cpu()
        g = c_ + 2 * (c_ - u_)
        factor = 0.7 * spread(c_) / spread(g) + 0.3
        seen = (found.detach().double().cpu() / g).flatten(1).median(1).values
        assert ((seen - factor) / factor).abs().max() < 1e-6


@pytest.mark.parametrize("value", [0.1, 0.0, 1e4])
def test_rescale_of_a_constant(target, value, generator):
    """Leave g where both are constant; where only c is, std(c) = 0, and g keeps 1 - phi."""
    c, u = torch.full((2, 4, 9, 11), value), torch.full((2, 4, 9, 11), 0.5 * value)
    for found, c_, u_, _ in rescaled_steps(c, u, target):
        torch.testing.assert_close(found.detach(), c_ + 2 * (c_ - u_), rtol=1e-5, atol=0)
    u = testing.sample((2, 4, 9, 11), torch.float32, generator)
    for found, c_, u_, space in rescaled_steps(c, u, target):
        if space == "prediction":
            torch.testing.assert_close(found.detach(), 0.3 * (c_ + 2 * (c_ - u_)), rtol=1e-4, atol=1e-6)
        assert found.isfinite().all()
