"""Test the tables of diffusers' own recurrences: by hand, by quadrature, and by how they converge."""

import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from lgd_kernels.integrations import diffusers_plans as plans  # noqa: E402
from lgd_kernels.integrations import diffusers_tables as tables  # noqa: E402

STEPS = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64)


def close(found, expected, digits=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=digits, atol=digits)


def test_equal_steps_are_those_of_adams_and_bashforth():
    """Check LMS with equal steps: the weights of Adams and Bashforth, one order more in each of the first calls."""
    table = tables.lms(STEPS, "eps", since=3)  # the slope is eps itself
    for call, row in enumerate(table):
        assert row[0, 0] == 1 and row[1].tolist() == [0, 1, 0, 0, 0, 0]
        weights = tables.ADAMS[call] + [0.0] * (3 - call)
        close(-row[0, [1, 2, 4, 5]], weights)


def test_lms_without_a_whole_history():
    """Check that diffusers' weights stay those of order 4, and the missing slopes are left out."""
    for since in range(3):
        row = tables.lms(STEPS, "eps", since)[3, 0]
        close(-row[[1, 2, 4, 5]], [one if n <= since else 0.0 for n, one in enumerate(tables.ADAMS[3])])


def test_lms_integrates_a_cubic():
    """Check, by hand, that a slope that is a polynomial of degree 3 in sigma is integrated exactly, at any sigmas."""
    sigmas = torch.tensor([9.0, 5.0, 2.5, 1.0, 0.25], dtype=torch.float64)
    row = tables.lms(sigmas, "eps", since=3)[3, 0, [1, 2, 4, 5]]
    for degree in range(4):
        close(row @ sigmas[:4].flip(0) ** degree, (0.25 ** (degree + 1) - 1) / (degree + 1))


def integral(function, start, end, parts=4000):
    """Integrate by Simpson's rule."""
    at = torch.linspace(start, end, 2 * parts + 1, dtype=torch.float64)
    weights = torch.ones_like(at)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * function(at)).sum() * (end - start) / (6 * parts))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_integrates_a_polynomial(order):
    """Check that the noise may be any polynomial of ln(rho) of a degree below the order, by quadrature over rho. The
    step is x / signal plus the integral, times the signal."""
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    sigmas = torch.tensor([9.0, 5.0, 2.5, 1.0, 0.25], dtype=torch.float64)
    table = tables.deis(scheduler, plans.VPSigma(), sigmas, "eps", since=3)
    call = 3
    places = [1, 2, 4][:order] if order > 1 else [1]
    signal = torch.rsqrt(1 + sigmas**2)
    close(table[call, 0, 0], signal[4] / signal[3])
    for degree in range(order):
        noise = [float(torch.log(sigmas[call - j])) ** degree for j in range(order)]
        found = sum(float(table[call, 0, place]) * one for place, one in zip(places, noise, strict=True))
        expected = float(signal[4]) * integral(lambda rho, p=degree: torch.log(rho) ** p, 1.0, 0.25)
        assert found == pytest.approx(expected, rel=1e-9)


def end_of(make, steps, slow):
    """Return where a run ends, from sigma 3 to 0.3 with equal steps in ln(sigma). With `slow` three steps as short as
    their square come first: the first step is Euler's, and would limit the order to 2."""
    length = math.log(10) / steps
    start = torch.arange(3 * slow, dtype=torch.float64) * length**2
    low = math.log(3) - 3 * slow * length**2
    at = torch.cat((math.log(3) - start, torch.linspace(low, math.log(0.3), steps + 1, dtype=torch.float64)))
    sigmas = torch.exp(at)
    plan = plans.StepPlan(sigmas[:-1], make(sigmas))
    x, kept = torch.ones(1, 1, dtype=torch.float64), None
    for i, sigma in enumerate(sigmas[:-1]):
        signal = torch.rsqrt(1 + sigma * sigma)
        x, kept = plan.step(i, x, torch.tanh(2 * signal * x) * (1 - 0.05 * sigma), kept=kept)
    return x.item()


class Config(dict):
    """Stand for a scheduler that has this configuration."""

    @property
    def config(self):
        return self

    order_list = property(lambda self: self["orders"])


def dpm(**options):
    config = {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": False,
        "euler_at_final": False,
        "final_sigmas_type": "sigma_min",
    }
    return Config(config | options)


MAKERS = {
    "2m": (lambda s: tables.dpm_multistep(dpm(solver_order=2), plans.VPSigma(), s, "x0", 4), 2),
    "2m heun": (
        lambda s: tables.dpm_multistep(dpm(solver_order=2, solver_type="heun"), plans.VPSigma(), s, "x0", 4),
        2,
    ),
    "3m": (lambda s: tables.dpm_multistep(dpm(solver_order=3), plans.VPSigma(), s, "x0", 4), 2),
    "singlestep 2": (lambda s: singlestep(s, 2, "midpoint"), 2),
    "singlestep 3": (lambda s: singlestep(s, 3, "heun"), 3),
    "deis 2": (lambda s: tables.deis(dpm(solver_order=2), plans.VPSigma(), s, "x0", 4), 2),
    "deis 3": (lambda s: tables.deis(dpm(solver_order=3), plans.VPSigma(), s, "x0", 4), 3),
}


def singlestep(sigmas, order, solver_type):
    orders = list(range(1, order + 1)) * (len(sigmas) // order)
    scheduler = dpm(solver_order=order, solver_type=solver_type, orders=orders)
    return tables.dpm_singlestep(scheduler, plans.VPSigma(), sigmas, "x0", 4)


@pytest.mark.parametrize("name", MAKERS)
def test_order_of_convergence(name):
    """Check that half the step divides the error by 2^order. In "3m" diffusers halves the second difference, so its
    order is 2."""
    make, order = MAKERS[name]
    ends = [end_of(make, steps, slow=name == "deis 3") for steps in (48, 96, 192, 1536)]
    ratio = (ends[1] - ends[3]) / (ends[2] - ends[3])
    assert 0.75 * 2**order < ratio < 1.4 * 2**order, ratio
