"""k-diffusion's samplers against their formulas, step by step in float64 as the papers and its code state them."""

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.integrations import k_diffusion as k

BATCH, SHAPE = 3, (3, 4, 8, 8)


def sigmas_of(steps=20, last=0.0):
    ramp = torch.linspace(0, 1, steps)
    return torch.cat(((10 ** (1 / 7) + ramp * (0.03 ** (1 / 7) - 10 ** (1 / 7))) ** 7, torch.tensor([last])))


def model(x, sigma, shift=0.2):
    """A denoiser that depends on the sample gently; in the dtype of the sample."""
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
    """The run without them. (k-diffusion's 2M divides by 0 in the step after one.)"""
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
    """The same as the noise that they stand for."""
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


def conditional(x, sigma, c):
    return model(x, sigma, c.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", ["number", "each", "function", "table"])
def test_the_guided_denoiser(kind):
    """x0 by x0, omega at the sigmas of the step."""
    sigmas, labels = sigmas_of(6), torch.tensor([2, 0, 1])
    knots = torch.linspace(0, 11, 5)
    table = lgd.OmegaTable(torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)), knots, knots)
    asked = []

    def omega(c, s, t):
        asked.append((s, t))
        return c + s - t

    given = {"number": 1.5, "each": torch.tensor([0.0, 1.0, 2.0]), "function": omega, "table": table}[kind]
    cond, uncond = torch.tensor([0.5, 0.1, -0.4]), torch.zeros(3)
    guided = k.GuidedDenoiser(conditional, given, sigmas)
    extra = {"cond": cond, "uncond": uncond, "condition": labels}

    def plain(x, sigma):
        weight = {"number": 1.5, "each": given}.get(kind)
        if weight is None:
            step = int((sigmas == sigma[0]).nonzero()[0, 0])
            s = sigmas[step + 1].expand(BATCH)
            weight = labels + s - sigma if kind == "function" else table(labels, s, sigma)
        c, u = conditional(x, sigma, cond), conditional(x, sigma, uncond)
        return c + torch.as_tensor(weight).view(-1, 1, 1, 1) * (c - u)

    found = k.sample_euler(guided, noise(), sigmas, extra_args=extra)
    expected = k.sample_euler(plain, noise(), sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(asked) == (6 if kind == "function" else 0)


def test_without_guidance_there_is_one_call():
    calls = []
    guided = k.GuidedDenoiser(lambda x, sigma, c: calls.append(c) or x, 0.0)
    guided(noise(), torch.ones(3), cond="c", uncond="u")
    assert calls == ["c"]
    with pytest.raises(ValueError, match="`sigmas` is None"):
        k.GuidedDenoiser(conditional, lambda c, s, t: t)
