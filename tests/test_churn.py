"""Test churn_from_eta: the churn whose step adds the noise of DDIM's eta."""

import decimal
import math

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.runtime.levels import step_coefficients

SCHEDULES = {
    "rectified flow": lgd.RectifiedFlow(),
    "vp cosine": lgd.VPCosine(),
    "edm": lgd.EDM(),
    "discrete": lgd.Discrete.stable_diffusion(dtype=torch.float64),
}
Q = (0.0, 1e-12, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)
ETAS = (0.0, 1e-6, 0.3, 0.7, 1 - 1e-6, 1.0)


def levels_at(q, dtype=torch.float64):
    """Return levels with r = 1 - q, where only q is rounded."""
    q = torch.tensor(q, dtype=dtype)
    one = torch.ones_like(q)
    return lgd.Levels(one, one, one, 1 - q, q)


def test_by_hand():
    """Check r = 1/3, eta^2 = 1/2: h = sqrt(5) / 3, churn^2 = (3 - sqrt(5)) / 2, the square of the golden ratio less
    one; and s = 0, r = 0, eta = 3/5: h = 4/5, churn^2 = 1/5."""
    levels = lgd.RectifiedFlow().levels(torch.tensor([0.5, 0.5]).double(), torch.tensor([0.25, 0.0]).double())
    found = lgd.churn_from_eta(torch.tensor([math.sqrt(0.5), 0.6], dtype=torch.float64), levels)
    assert found.tolist() == pytest.approx([(math.sqrt(5) - 1) / 2, math.sqrt(0.2)], rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", ETAS)
def test_agrees_with_the_definition(eta, dtype):
    """Compare with churn^2 = (1 - sqrt(1 - eta^2 (1 - r^2))) / (1 - r) in 60 digits, from r = 0 to the limit eta^2 at r
    = 1."""
    levels = levels_at(Q, dtype)
    found = lgd.churn_from_eta(eta, levels)
    assert found.dtype == dtype
    with decimal.localcontext(decimal.Context(prec=60)):
        for churn, q in zip(found.tolist(), map(decimal.Decimal, levels.gap.tolist()), strict=True):
            exact = decimal.Decimal(eta)
            if q:
                exact = ((1 - (1 - exact**2 * (1 - (1 - q) ** 2)).sqrt()) / q).sqrt()
            assert churn == pytest.approx(float(exact), rel=2 * torch.finfo(dtype).eps, abs=0)
            assert churn <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(dtype):
    """Check 0 and 1 at every r, with s = t and the ends of a schedule included."""
    q = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    at = torch.tensor([0.0, 0.4, 1.0], dtype=dtype)
    still = lgd.Levels(1 - at, at, 1 - at, at, torch.zeros_like(at))
    for levels in (levels_at(q.tolist(), dtype), levels_at(Q, dtype), still):
        for end in (0.0, 1.0):
            assert torch.equal(lgd.churn_from_eta(end, levels), torch.full_like(levels.gap, end))
            assert torch.equal(lgd.churn_from_eta(torch.full_like(levels.gap, end), levels), levels.gap * 0 + end)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_noise_is_that_of_eta(name):
    """Check V = eta noise_s sqrt(1 - r^2), DDIM's sigma, with eta and times for each sample."""
    at = SCHEDULES[name].from_unit(torch.linspace(0, 0.999, 40, dtype=torch.float64))
    levels = SCHEDULES[name].levels(at[1:], at[:-1])
    eta = torch.linspace(0, 1, 39, dtype=torch.float64)
    noise = step_coefficients(levels, "x0", lgd.churn_from_eta(eta, levels)).noise
    r = levels.signal_t * levels.noise_s / (levels.signal_s * levels.noise_t)
    torch.testing.assert_close(noise, eta * levels.noise_s * torch.sqrt((1 - r) * (1 + r)), rtol=1e-12, atol=0)


def test_half_etas_empty_batches_and_compilation():
    levels = levels_at(Q, torch.float32)
    eta = torch.linspace(0, 1, len(Q)).bfloat16()
    assert torch.equal(lgd.churn_from_eta(eta, levels), lgd.churn_from_eta(eta.float(), levels))
    assert lgd.churn_from_eta(0.5, levels_at([])).shape == (0,)
    compiled = torch.compile(lgd.churn_from_eta, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(0.3, levels), lgd.churn_from_eta(0.3, levels))


TWO = levels_at([0.5, 0.25], torch.float32)


@pytest.mark.parametrize(
    ("eta", "levels", "error", "message"),
    [
        (1.5, TWO, ValueError, r"churn_from_eta: `eta` is 1.5, expected values in \[0, 1\]"),
        (torch.tensor([0.5, -1.0]), TWO, ValueError, r"`eta` is \[0.5, -1\], expected values in \[0, 1\]"),
        (math.nan, TWO, ValueError, r"`eta` is nan, expected values in \[0, 1\]"),
        (torch.tensor([0.5]), TWO, ValueError, r"`eta` has shape \[1\], expected \[B\] = \[2\].*eta.expand\(2\)"),
        (torch.tensor([1, 0]), TWO, TypeError, r"`eta` has dtype torch.int64, expected float32.*\.float\(\)"),
        ("1", TWO, TypeError, r"`eta` is a str, expected a float or a tensor \[B\]"),
        (torch.ones(2, device="meta"), TWO, ValueError, r"`eta` is on meta, expected cpu like `levels.gap`"),
        (0.5, lgd.RectifiedFlow(), TypeError, r"`levels` is a RectifiedFlow, expected lgd_kernels.Levels, as a sched"),
        (0.5, TWO._replace(gap=0.5), ValueError, r"`levels.gap` is 0.5, expected a tensor \[B\]; schedule.levels"),
        (0.5, TWO._replace(gap=torch.tensor(0.5)), ValueError, r"`levels.gap` is \[0.5\], expected a tensor \[B\]"),
        (0.5, TWO._replace(noise_t=torch.ones(1)), ValueError, r"`levels.noise_t` has shape \[1\]"),
        (0.5, TWO._replace(gap=-TWO.gap), ValueError, r"`levels.gap` is -0.5 in one sample, expected 0 or more"),
    ],
)
def test_refuses(eta, levels, error, message):
    with pytest.raises(error, match=message):
        lgd.churn_from_eta(eta, levels)
