"""Test plans at the edges of their arguments: repeated times, runs of one step and of none, and invalid arguments."""

import functools
import math

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance.stateful import Feedback
from lgd_kernels.learn.frozen import Frozen
from lgd_kernels.sampling import sampler, solvers
from lgd_kernels.sampling.log_prob import step_with_log_prob

FLOW, EDM = lgd.RectifiedFlow(), lgd.EDM()
TABLE = lgd.Discrete.ddpm(dtype=torch.float64)
SIGMAS = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.25, 0.0], dtype=torch.float64)
TIMES = torch.tensor([0.95, 0.7, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64)
BY_SCHEDULE = {  # solvers that take a schedule and times
    "one_step": solvers.one_step,
    "consistency": solvers.consistency,
    "dpm_solver_2m": solvers.dpm_solver_2m,
    "dpm_solver_2m, stochastic": functools.partial(solvers.dpm_solver_2m, stochastic=True),
    "deis": solvers.deis,
    "deis, 3": functools.partial(solvers.deis, order=3),
    "unipc": solvers.unipc,
    "unipc, bh1": functools.partial(solvers.unipc, variant="bh1"),
}
BY_SIGMAS = {
    "edm_euler": solvers.edm_euler,
    "edm_heun": solvers.edm_heun,
    "adams_bashforth": solvers.adams_bashforth,
    "adams_bashforth, 4": functools.partial(solvers.adams_bashforth, order=4),
}
PLANS = {name: functools.partial(make, FLOW) for name, make in BY_SCHEDULE.items()} | BY_SIGMAS
MOVING = {name: make for name, make in PLANS.items() if name not in ("consistency", "dpm_solver_2m, stochastic")}


def each(plans):
    return pytest.mark.parametrize("name", plans)


def times_of(name):
    return SIGMAS if name in BY_SIGMAS else TIMES


def guess(x, t):
    """Return a guess of x0 from x and the time."""
    return torch.tanh(2 * x) * (1 - 0.05 * t)


def end(plan, x, at=int, predict=guess):
    """Return the last samples of a run by our own loop."""
    kept = None
    for i, t in enumerate(plan.times):
        index = at(i)
        if not isinstance(index, int) and i == 0 and plan.remembers:
            kept = (torch.zeros_like(x),) * plan.depth
        x, kept = plan.step(index, x, predict(x, t.reshape(-1, 1)), kept=kept)
    return x


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("places", [(0, 1), (2, 3), (2, 2, 2), (4, 4), (5, 5), (0, 2, 4, 5)], ids=str)
@each(MOVING)
def test_a_time_that_repeats_changes_nothing(name, places, prediction):
    """Check that repeated times add calls, but change neither samples nor history: at the first time, in the middle,
    several times, at the data."""
    times = times_of(name)
    again = torch.cat((times, times[list(places)])).sort(descending=True).values
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    plan = PLANS[name](again, prediction=prediction)
    assert plan.table.isfinite().all()
    expected, found = end(PLANS[name](times, prediction=prediction), x), end(plan, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for i in range(len(plan)):
        if len(plan) == len(again) - 1 and again[i] == again[i + 1]:
            assert plan.table[i, 0].tolist() == [1.0] + [0.0] * (plan.table.shape[-1] - 1)


@each(MOVING)
def test_a_time_that_repeats_in_one_sample(name):
    """Check repeats in one sample of a batch with times for each sample; by an int, a tensor, and a tensor of
    indices."""
    once = times_of(name)
    rows = [torch.cat((once, once[[place]])).sort(descending=True).values for place in (0, 2, 3)]
    plan = PLANS[name](torch.stack(rows, 1))
    x = torch.linspace(-2, 2, 3, dtype=torch.float64)[:, None]
    alone = [end(PLANS[name](row), x[[b]]) for b, row in enumerate(rows)]
    for at in (int, torch.tensor, lambda i: torch.full((3,), i)):
        if name == "edm_heun" and at is not int:
            continue  # samples that have ended take no part in its last call
        torch.testing.assert_close(end(plan, x, at), torch.cat(alone), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(end(plan, x), end(PLANS[name](once), x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule, times", [(FLOW, TIMES), (EDM, SIGMAS), (TABLE, torch.tensor([900, 400, 0, -1]))])
def test_a_step_of_no_length_adds_no_noise(schedule, times, churn):
    again = torch.cat((times, times)).sort(descending=True).values
    plan = solvers.one_step(schedule, again, churn=churn)
    assert torch.equal(plan.table[::2, 0], torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).expand(len(times), 4))
    torch.testing.assert_close(plan.table[1::2], solvers.one_step(schedule, times, churn=churn).table, rtol=0, atol=0)
    stays = solvers.one_step(schedule, times, to=times, churn=churn).table
    assert torch.equal(stays, plan.table[::2])


def test_edm_churns_also_where_a_sigma_repeats():
    """Check that a repeated sigma goes up by gamma and down again, as in k-diffusion."""
    plan = solvers.edm_euler(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64), s_churn=0.2)
    assert plan.times.tolist() == pytest.approx([4.4, 4.4]) and plan.start > 0 and plan.table[0, 0, 3] > 0


@each(PLANS)
def test_runs_of_one_step_and_of_none(name):
    times = times_of(name)
    for pair in (times[[0, 2]], times[[0, 5]], times[[3, 3]], times[[5, 5]]):
        plan = PLANS[name](pair)
        assert plan.table.isfinite().all() and len(plan) in (1, 2)
        x = torch.ones(2, 3, dtype=torch.float64)
        found = sampler.sample(lambda x, t, c: c.expand_as(x), x, plan, 0.25 * torch.ones(2, 1).double(), seed=1)
        if pair[1] == 0 and pair[0] > 0:
            torch.testing.assert_close(found, 0.25 * x, rtol=1e-14, atol=0)
        elif pair[0] == pair[1] and name != "consistency":
            assert torch.equal(found, x)
    for none in (times[:1], times[:1, None].expand(1, 2)):
        plan = PLANS[name](none)
        assert len(plan) == 0 and torch.equal(sampler.sample(None, x, plan, None), x)


def times_that_are_wrong():
    nan, inf = math.nan, math.inf
    for name in PLANS:
        times = times_of(name)
        yield name, times[:0], ValueError, r"has shape \[0\], expected \[N \+ 1\]"
        yield name, times[None, :, None], ValueError, r"has shape \[1, 6, 1\], expected \[N \+ 1\], or \[N \+ 1, B\]"
        yield name, times.sum(), ValueError, r"has shape \[\], expected"
        yield name, times.tolist(), TypeError, "is a list, expected a tensor of times"
        yield name, times.flip(0), ValueError, r"rises at \w+\[1\], from 0 to .*, expected times from the noise"
        yield name, torch.stack((times, times.flip(0)), 1), ValueError, r"rises at \w+\[1\]"
        yield name, torch.cat((times[:2], times[:1] * nan)), ValueError, "must lie in .* got"
        yield name, torch.cat((times[:1] * inf, times)), ValueError, "must lie in .* got"
        yield name, times - 0.5, ValueError, "must lie in .* got"
        yield name, times.half(), TypeError, "has dtype torch.float16"
        yield name, times.long(), TypeError, "has dtype torch.int64"


@pytest.mark.parametrize("name, times, error, message", times_that_are_wrong())
def test_times_that_are_refused(name, times, error, message):
    argument = "sigmas" if name in BY_SIGMAS else "times"
    with pytest.raises(error, match=f"^{name.split(',')[0]}: `{argument}`.* {message}"):
        PLANS[name](times)


@pytest.mark.parametrize("name", PLANS)
def test_predictions_of_other_libraries(name):
    for theirs, ours in {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}.items():
        with pytest.raises(ValueError, match=f"^{name.split(',')[0]}: `prediction` is '{theirs}', .* mean '{ours}'?"):
            PLANS[name](times_of(name), prediction=theirs)
    for other in ("noise", None, ["eps"]):
        with pytest.raises(ValueError, match="expected one of x0, eps, v, flow$"):
            PLANS[name](times_of(name), prediction=other)


@pytest.mark.parametrize("name", BY_SCHEDULE)
@pytest.mark.parametrize("batch", [False, True])
def test_eps_says_nothing_where_the_signal_is_0(name, batch):
    times = torch.linspace(1, 0, 5)
    times = torch.stack((0.5 * times, times), 1) if batch else times
    with pytest.raises(
        ValueError, match=r"the signal is 0 at `times\[0\]`, where an eps prediction holds no information"
    ):
        BY_SCHEDULE[name](FLOW, times, prediction="eps")
    for prediction in ("x0", "v", "flow"):
        assert BY_SCHEDULE[name](FLOW, times, prediction=prediction).table.isfinite().all()
    noisiest = lgd.Discrete(torch.tensor([0.9, 0.5, 0.0]))
    with pytest.raises(ValueError, match=r"the signal is 0 at `times\[0\]`, where an eps prediction"):
        BY_SCHEDULE[name](noisiest, torch.tensor([2, 1, -1]), prediction="eps")


def test_a_step_whose_factors_are_nan_says_so():
    """Check the error for a plan that was made where its times were not readable."""
    x = torch.ones(2, 3)
    plan = solvers.one_step(FLOW, torch.linspace(1, 0, 5))
    plan.table[0] = torch.nan
    for options in ({}, {"seed": 1}, {"noise": x}):
        with pytest.raises(ValueError, match="factors of step 0 are NaN, .* an eps prediction holds no information"):
            plan.step(0, x, x, **options)
    assert plan.step(1, x, x)[0].isfinite().all()


BOOL = torch.zeros(5, dtype=torch.bool)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: solvers.one_step(FLOW, TIMES, churn=5.0), ValueError, r"one_step: `churn` is 5.0, .* in \[0, 1\]"),
        (lambda: solvers.one_step(FLOW, TIMES, churn=-0.1), ValueError, "one_step: `churn` is -0.1"),
        (lambda: solvers.one_step(FLOW, TIMES, churn=math.nan), ValueError, "one_step: `churn` is nan"),
        (lambda: solvers.one_step(FLOW, TIMES, churn="1"), TypeError, "one_step: `churn` is a str"),
        (lambda: solvers.one_step(FLOW, TIMES, churn=BOOL), TypeError, "one_step: `churn` has dtype torch.bool"),
        (lambda: solvers.one_step(FLOW, TIMES, churn=torch.tensor([0, 0, 2.0, 0, 0])), ValueError, "`churn` is"),
        (lambda: solvers.one_step(FLOW, TIMES, churn=torch.ones(6)), ValueError, r"shape \[6\], expected \[5\]"),
        (
            lambda: solvers.one_step(FLOW, TIMES[:, None].expand(6, 2), churn=torch.ones(5)),
            ValueError,
            r"`churn` has shape \[5\], expected \[5, 2\], .* churn\[:, None\] is the same for all samples",
        ),
        (lambda: solvers.one_step(FLOW, TIMES, to=TIMES[1:]), ValueError, r"`to` has shape \[5\], expected \[6\]"),
        (lambda: solvers.one_step(FLOW, TIMES, to=0.0), TypeError, "one_step: `to` is a float, expected a tensor"),
        (lambda: solvers.one_step(FLOW, TIMES[1:], to=TIMES[:-1]), ValueError, "one_step: `times`: RectifiedFlow"),
        (lambda: solvers.one_step(FLOW, TIMES, to=TIMES * math.nan), ValueError, "one_step: `times`: .* got s = .nan"),
        (lambda: solvers.one_step(lgd.RectifiedFlow, TIMES), TypeError, "one_step: `schedule` is RectifiedFlow"),
        (lambda: solvers.unipc("flow", TIMES), TypeError, "unipc: `schedule` is a str, expected a schedule"),
        (lambda: solvers.unipc(FLOW, TIMES, first_order=BOOL.long()), TypeError, "unipc: `first_order` has dtype"),
        (lambda: solvers.unipc(FLOW, TIMES, first_order=[True] * 5), TypeError, "unipc: `first_order` is a list"),
        (lambda: solvers.unipc(FLOW, TIMES, first_order=BOOL[1:]), ValueError, r"shape \[4\], expected \[N\] = \[5\]"),
        (lambda: solvers.dpm_solver_2m(FLOW, TIMES, first_order=BOOL.int()), TypeError, "dpm_solver_2m: `first_order`"),
        (lambda: solvers.dpm_solver_2m(FLOW, TIMES, first_order=BOOL[:, None]), ValueError, "`first_order` has shape"),
        (lambda: solvers.deis(FLOW, TIMES, order=4), ValueError, "deis: `order` is 4, expected 1 to 3"),
        (
            lambda: solvers.adams_bashforth(SIGMAS, order=0),
            ValueError,
            "adams_bashforth: `order` is 0, expected 1 to 4",
        ),
        (
            lambda: solvers.deis(FLOW, TIMES, order=2.0),
            TypeError,
            "deis: `order` is a float, expected an int from 1 to 3",
        ),
        (lambda: solvers.edm_euler(SIGMAS, s_churn=-1.0), ValueError, "edm_euler: `s_churn` is -1.0, expected 0"),
        (lambda: solvers.edm_heun(SIGMAS, s_churn=math.nan), ValueError, "edm_heun: `s_churn` is nan"),
        (lambda: solvers.edm_heun(SIGMAS, s_noise=math.inf), ValueError, "edm_heun: `s_noise` is inf, expected a"),
        (lambda: solvers.edm_heun(SIGMAS, s_noise=-1.0), ValueError, "edm_heun: `s_noise` is -1.0"),
        (lambda: solvers.edm_euler(SIGMAS, s_tmin=math.nan), ValueError, "edm_euler: `s_tmin` is nan"),
        (lambda: solvers.edm_euler(SIGMAS, s_tmax="1"), TypeError, "edm_euler: `s_tmax` is a str, expected a float"),
        (lambda: solvers.edm_euler(SIGMAS, churn=1.0), TypeError, "edm_euler: got `churn`, expected s_churn, s_tmin"),
        (lambda: solvers.edm_heun(torch.tensor([3e38, 1e-38]), s_churn=9.0), ValueError, "factors of call 0 are not"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_stays_allowed():
    """Check that numbers of any kind, one churn for all, and limits that churn never or always are valid."""
    for churn in (1, torch.tensor(0.5), torch.ones(5, dtype=torch.int64), torch.linspace(0, 1, 5)):
        assert solvers.one_step(FLOW, TIMES, churn=churn).table.isfinite().all()
    for churn in (torch.ones(5, 1), torch.ones(1, 2), torch.ones(5, 2)):
        assert solvers.one_step(FLOW, TIMES[:, None].expand(6, 2), churn=churn).table.shape == (5, 2, 1, 4)
    assert len(solvers.edm_euler(SIGMAS, s_churn=math.inf, s_tmin=0, s_tmax=math.inf, s_noise=0)) == 5
    assert solvers.unipc(FLOW, TIMES[:, None].expand(6, 2), first_order=BOOL).table.shape == (5, 2, 2, 5)


def test_values_elsewhere_are_never_read():
    """Check that no value is read on a device without data, where a read would raise."""
    for name, make in PLANS.items():
        if name not in ("edm_heun", "edm_euler"):  # these choose calls, and the first noise, by value
            assert make(times_of(name).to("meta")).table.is_meta


@pytest.mark.parametrize("op", ["guided_step", "guided_energy", "step_with_log_prob", "Feedback", "Frozen"])
def test_other_places_that_take_a_prediction(op):
    x, levels = torch.ones(2, 3, 4), testing.step_levels(2)
    calls = {
        "guided_step": lambda p: lgd.guided_step(x, x, x, 0.0, levels, prediction=p),
        "guided_energy": lambda p: lgd.guided_energy(x, x, x, 0.0, levels, x, prediction=p),
        "step_with_log_prob": lambda p: step_with_log_prob(x, x, x, 0.0, levels, prediction=p, churn=1.0, seed=1),
        "Feedback": lambda p: Feedback(2, pi=0.5).update(x, x, x, x, levels, p),
        "Frozen": lambda p: Frozen(lambda x, t, c: x, FLOW, p, 0),
    }
    with pytest.raises(ValueError, match=f"{op}.*: `prediction` is 'epsilon', expected .*; did you mean 'eps'?"):
        calls[op]("epsilon")
