"""Compare k-diffusion's samplers with the formulas of the papers and of its code, step by step in float64."""

import math

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.integrations import k_diffusion as k

BATCH, SHAPE = 3, (3, 4, 8, 8)


def sigmas_of(steps=20, last=0.0):
    ramp = torch.linspace(0, 1, steps)
    return torch.cat(((10 ** (1 / 7) + ramp * (0.03 ** (1 / 7) - 10 ** (1 / 7))) ** 7, torch.tensor([last])))


def model(x, sigma, shift=0.2):
    """Denoise with a smooth function of the sample, in the dtype of the sample."""
    sigma = sigma.to(x.dtype).view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + sigma * sigma) + shift)


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigma_row(x, sigma):
    return sigma.expand(x.shape[0])


def euler(x, sigmas, noises, eta):
    for t, s in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - model(x, sigma_row(x, t))) / t
        x = x + (s - t) * d
    return x


def ancestral(x, sigmas, noises, eta):
    for i, (t, s) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        up = min(s, eta * (s**2 * (t**2 - s**2) / t**2) ** 0.5)
        down = (s**2 - up**2) ** 0.5
        d = (x - model(x, sigma_row(x, t))) / t
        x = x + d * (down - t)
        if s > 0:
            x = x + up * noises[i].to(x.dtype)
    return x


def heun(x, sigmas, noises, eta):
    for t, s in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - model(x, sigma_row(x, t))) / t
        if s == 0:
            x = x + d * (s - t)
        else:
            ahead = x + d * (s - t)
            x = x + (d + (ahead - model(ahead, sigma_row(x, s))) / s) / 2 * (s - t)
    return x


def dpmpp_2m(x, sigmas, noises, eta):
    old = None
    for i, (t, s) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = model(x, sigma_row(x, t))
        h = -s.log() + t.log()
        if old is None or s == 0:
            used = denoised
        else:
            r = (-t.log() + sigmas[i - 1].log()) / h
            used = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = (s / t) * x - (-h).expm1() * used
        old = denoised
    return x


FORMULAS = {
    "euler": (euler, k.sample_euler),
    "ancestral": (ancestral, k.sample_euler_ancestral),
    "heun": (heun, k.sample_heun),
    "2m": (dpmpp_2m, k.sample_dpmpp_2m),
}
each_sampler = pytest.mark.parametrize("name", FORMULAS)


@pytest.mark.parametrize("name, eta", [*((name, 1.0) for name in FORMULAS), ("ancestral", 0.4)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("last", [0.0, 0.01])
def test_a_whole_run(name, dtype, limit, eta, last):
    formula, sampler = FORMULAS[name]
    options = {}
    sigmas, noises = sigmas_of(last=last), [noise(1 + i) for i in range(20)]
    if name == "ancestral":
        given = iter(noises)
        options = {"eta": eta, "noise_sampler": lambda t, s: next(given).to(dtype)}
    start = noise() * sigmas[0]
    found = sampler(model, start.to(dtype), sigmas.to(dtype), **options)
    expected = formula(start.double(), sigmas.double(), noises, eta)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("places", [(0, 0), (1, 2), (2, 2, 2), (5, 5)], ids=str)
@each_sampler
def test_sigmas_that_repeat(name, places):
    """Compare with the run without repeats. (k-diffusion's 2M divides by 0 in the step after one.)"""
    once = sigmas_of(5)
    again = torch.cat((once, once[list(places)])).sort(descending=True).values
    given = {float(t): noise(i) for i, t in enumerate(once)}
    options = {"noise_sampler": lambda t, s: given[float(t)]} if name == "ancestral" else {}
    expected, found = (FORMULAS[name][1](model, noise(), one, **options) for one in (once, again))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@each_sampler
def test_runs_of_one_sigma_and_runs_that_are_refused(name):
    sampler = FORMULAS[name][1]
    assert torch.equal(sampler(model, noise(), torch.tensor([3.0])), noise())
    for wrong in (
        sigmas_of(5).flip(0),
        torch.tensor([3.0, torch.nan, 0.0]),
        torch.tensor([torch.inf, 1.0]),
        noise()[:0, 0, 0, 0],
    ):
        with pytest.raises(ValueError, match="`(times|sigmas)`"):
            sampler(model, noise(), wrong)
    if name == "ancestral":
        for options in ({"eta": torch.nan}, {"s_noise": -1.0}, {"s_noise": torch.inf}):
            with pytest.raises(ValueError, match=f"sample_euler_ancestral: `{next(iter(options))}` is"):
                sampler(model, noise(), sigmas_of(5), **options)


@each_sampler
def test_the_callback_is_called_once_a_step(name):
    seen, sigmas = [], sigmas_of(5)
    FORMULAS[name][1](model, noise(), sigmas, callback=seen.append, extra_args={"shift": 0.0})
    assert [one["i"] for one in seen] == list(range(5))
    torch.testing.assert_close(torch.stack([one["sigma"] for one in seen]), sigmas[:-1])
    assert all({"x", "sigma_hat", "denoised"} < set(one) for one in seen)


def test_seeds_are_drawn_inside():
    """Compare a seed with the same noise passed as a tensor."""
    sigmas, seed = sigmas_of(6), 5
    given = (lgd.philox_normal(SHAPE, seed + (i << 32), stream=1) for i in range(6))
    expected = k.sample_euler_ancestral(model, noise(), sigmas, noise_sampler=lambda t, s: next(given))
    for one in (seed, torch.tensor(seed)):
        found = k.sample_euler_ancestral(model, noise(), sigmas, seed=one)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_randn_is_drawn_by_default():
    torch.manual_seed(3)
    found = k.sample_euler_ancestral(model, noise(), sigmas_of(6))
    torch.manual_seed(3)
    expected = k.sample_euler_ancestral(model, noise(), sigmas_of(6), noise_sampler=lambda t, s: torch.randn(SHAPE))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in dir(k) if name.startswith("sample_")])
def test_samplers_run_without_grad_unless_asked(name):
    """Check no_grad as in k-diffusion's decorators; with grad=True the caller's grad mode holds."""
    weight, sampler, seen = torch.ones((), requires_grad=True), getattr(k, name), []

    def learned(x, sigma):
        seen.append(torch.is_grad_enabled())
        return weight * model(x, sigma)

    assert not sampler(learned, noise(), sigmas_of(3)).requires_grad and not any(seen)
    assert torch.is_grad_enabled()
    sampler(learned, noise(), sigmas_of(3), grad=True).sum().backward()
    assert weight.grad != 0
    with torch.no_grad():
        assert not sampler(learned, noise(), sigmas_of(3), grad=True).requires_grad


def churned(x, sigmas, noises, corrected, s_churn, s_tmin, s_tmax, s_noise, called=None):
    """Run Algorithm 2 of Karras et al. with or without its correction, with one draw for each step, as in
    k-diffusion."""
    steps = len(sigmas) - 1
    for i, (t, s) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= t <= s_tmax else 0.0
        hat = t * (gamma + 1)
        if gamma > 0:
            x = x + s_noise * noises[i] * (hat**2 - t**2) ** 0.5
        d = (x - model(x, sigma_row(x, hat))) / hat
        ahead = x + (s - hat) * d
        if called is not None:
            called.append((x, t, hat))
        if corrected and s > 0:
            ahead = x + (s - hat) * (d + (ahead - model(ahead, sigma_row(x, s))) / s) / 2
        x = ahead
    return x


CHURNS = {
    "all": (5.0, 0.0, math.inf, 1.003),
    "capped": (100.0, 0.0, math.inf, 1.0),
    "window": (5.0, 0.05, 4.0, 1.003),  # the first step is below s_tmax: nothing is added before the first call
    "edges": (5.0, float(sigmas_of()[11]), float(sigmas_of()[4]), 1.0),
}
each_churn = pytest.mark.parametrize("churn", CHURNS)
churners = pytest.mark.parametrize("sampler, corrected", [(k.sample_euler, False), (k.sample_heun, True)])


@churners
@each_churn
@pytest.mark.parametrize("last", [0.0, 0.01])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_churn(sampler, corrected, churn, last, dtype, limit):
    """Check positional arguments and the global generator as in k-diffusion, which draws also in steps that add
    nothing."""
    sigmas, start = sigmas_of(last=last).to(dtype), noise() * 10
    torch.manual_seed(11)
    noises = [torch.randn(SHAPE, dtype=dtype) for _ in range(20)]
    after = torch.randn(1, dtype=dtype)
    torch.manual_seed(11)
    seen, called = [], []
    found = sampler(model, start.to(dtype), sigmas, None, seen.append, True, *CHURNS[churn])
    assert torch.equal(torch.randn(1, dtype=dtype), after)
    expected = churned(start.double(), sigmas.double(), noises, corrected, *CHURNS[churn], called=called)
    assert (found - expected).abs().max() <= limit * expected.abs().max()
    for i, (one, (x, t, hat)) in enumerate(zip(seen, called, strict=True)):
        assert set(one) == {"x", "i", "sigma", "sigma_hat", "denoised"} and one["i"] == i
        torch.testing.assert_close(one["sigma"].double(), t)
        torch.testing.assert_close(one["sigma_hat"].double(), hat, rtol=1e-6, atol=0)
        assert (one["x"] - x).abs().max() <= limit * x.abs().max()


@churners
def test_churn_from_a_seed(sampler, corrected):
    """Compare a seed with the same noise passed as a tensor, at every place where a plan adds noise."""
    sigmas, seed = sigmas_of(4), 5
    settings = (3.0, 0.0, math.inf, 1.0)
    calls = 2 if corrected else 1
    rows = [calls * (len(sigmas) - 1) - corrected, *(calls * (i + 1) - 1 for i in range(3))]
    noises = [lgd.philox_normal(SHAPE, seed + (row << 32), stream=1).double() for row in rows]
    expected = churned(noise().double(), sigmas.double(), noises, corrected, *settings)
    for one in (seed, torch.tensor(seed)):
        found = sampler(model, noise(), sigmas, None, None, None, *settings, seed=one)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_churn_nothing_is_drawn():
    torch.manual_seed(3)
    expected = torch.randn(1)
    torch.manual_seed(3)
    for name in ("euler", "heun", "2m"):
        FORMULAS[name][1](model, noise(), sigmas_of(4))
    assert torch.equal(torch.randn(1), expected)


def test_a_noise_sampler_is_not_asked_for_the_step_to_0():
    """Check that no noise is drawn for the step to 0, since a Brownian tree ends above 0."""
    asked, sigmas = [], sigmas_of(4)
    k.sample_euler_ancestral(model, noise(), sigmas, noise_sampler=lambda t, s: asked.append((t, s)) or noise(1))
    assert asked == list(zip(sigmas[:-2], sigmas[1:-1], strict=True))


@pytest.mark.parametrize("name", ["euler", "heun", "2m", "ancestral"])
def test_a_run_of_one_step_and_of_none(name):
    sampler, sigmas = FORMULAS[name][1], torch.tensor([3.0, 0.0])
    torch.testing.assert_close(sampler(model, noise(), sigmas), model(noise(), torch.full((BATCH,), 3.0)))
    assert torch.equal(sampler(model, noise(), sigmas[:1]), noise())


@pytest.mark.parametrize(
    "sigmas, error, said",
    [
        ([3.0, 0.0], TypeError, "`sigmas` is a list"),
        (torch.tensor([3, 0]), TypeError, "`sigmas` is a torch.int64"),
        (torch.zeros(0), ValueError, r"`sigmas` has shape \[0\]"),
        (torch.ones(3, 2), ValueError, r"`sigmas` has shape \[3, 2\]"),
    ],
)
def test_sigmas_that_are_refused(sigmas, error, said):
    for _, sampler in FORMULAS.values():
        with pytest.raises(error, match=f"{sampler.__name__}: {said}"):
            sampler(model, noise(), sigmas)
    with pytest.raises(error, match=f"GuidedDenoiser: {said}"):
        k.GuidedDenoiser(lambda x, sigma, cond: x, lambda c, s, t: t, sigmas)
    for churn in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`s_churn` is"):
            k.sample_euler(model, noise(), sigmas_of(3), s_churn=churn)
    for name in ("s_churn", "s_tmin", "s_tmax"):
        for bad in (math.nan, -1.0, "1", None):
            settings = {"s_churn": 1.0, name: bad}
            for sampler in (k.sample_euler, k.sample_heun):
                with pytest.raises((TypeError, ValueError), match=rf"^{sampler.__name__}: `{name}` is .*, expected"):
                    sampler(model, noise(), sigmas_of(3), **settings)
            if settings["s_churn"]:
                with pytest.raises((TypeError, ValueError), match=rf"^GuidedDenoiser: `{name}` is .*, expected"):
                    k.GuidedDenoiser(model, lambda c, s, t: t, sigmas_of(3), keyword="cond", **settings)
    with pytest.raises(TypeError, match="GuidedDenoiser: `denoiser` is a NoneType, expected a function"):
        k.GuidedDenoiser(None, 0.5)
    with pytest.raises(ValueError, match="`seed` was given, but `s_churn` is 0"):
        k.sample_heun(model, noise(), sigmas_of(3), seed=1)
