"""Test GuidedDenoiser: how it passes the condition, and which s it finds for the sigma of a call."""

import math

import pytest
import torch
from test_k_diffusion import BATCH, CHURNS, SHAPE, churned, churners, each_churn, model, noise, sigmas_of
from torch import nn

import lgd_kernels as lgd
from lgd_kernels.integrations import k_diffusion as k


def conditional(x, sigma, c):
    return model(x, sigma, c.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", ["number", "each", "function", "table"])
def test_the_guided_denoiser(kind):
    """Check the guided x0, with omega at the sigmas of the step."""
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


class Network(nn.Module):
    """Take what k-diffusion's wrappers pass: the input first, then sigma, then keywords."""

    def forward(self, input, sigma, aug_cond=0.0, class_cond=None):
        return model(input, sigma, class_cond.view(-1, 1, 1, 1)) + aug_cond


class Wrapper(nn.Module):
    """Pass keywords to the inner model, as k-diffusion's wrappers do."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model

    def forward(self, input, sigma, **kwargs):
        return self.inner_model(input, sigma, **kwargs)


def by_name(x, sigma, cond):
    return conditional(x, sigma, cond)


@pytest.mark.parametrize(
    "denoiser, options",
    [
        (by_name, {}),
        (lambda x, sigma, *, cond: by_name(x, sigma, cond), {}),
        (lambda x, sigma, c: by_name(x, sigma, c), {}),
        (lambda x, sigma, c, /: by_name(x, sigma, c), {}),
        (lambda x, sigma, c=None: by_name(x, sigma, c), {}),
        (lambda x, sigma, condition, scale=1.0: scale * by_name(x, sigma, condition), {}),
        (lambda *given: by_name(*given), {}),
        (Wrapper(by_name), {}),
        (Wrapper(Network()), {"keyword": "class_cond"}),
        (Network(), {"keyword": "class_cond"}),
    ],
    ids=["cond", "keyword only", "third", "by place", "optional", "more", "star", "wrapper", "named deep", "named"],
)
def test_the_condition_reaches_every_kind_of_denoiser(denoiser, options):
    cond, uncond = torch.tensor([0.5, 0.1, -0.4]), torch.zeros(3)
    guided = k.GuidedDenoiser(denoiser, 1.5, **options)
    c, u = (conditional(noise(), torch.ones(3), one) for one in (cond, uncond))
    expected = c + 1.5 * (c - u)
    torch.testing.assert_close(guided(noise(), torch.ones(3), cond=cond, uncond=uncond), expected)
    extra = {"cond": cond, "uncond": uncond}
    found = k.sample_euler(guided, noise(), torch.tensor([1.0, 0.0]), extra_args=extra)
    torch.testing.assert_close(found, expected)


def test_other_keywords_reach_the_denoiser():
    """Check that both calls get other keywords; `condition` goes to omega."""
    guided = k.GuidedDenoiser(Wrapper(Network()), 1.0, keyword="class_cond")
    given = {"cond": torch.ones(3), "uncond": torch.zeros(3), "condition": torch.tensor([1, 2, 3])}
    found = guided(noise(), torch.ones(3), **given, aug_cond=0.25)
    torch.testing.assert_close(found, guided(noise(), torch.ones(3), **given) + 0.25)
    assert isinstance(guided, nn.Module) and list(guided.children()) == [guided.denoiser]


def test_a_denoiser_that_does_not_say_where_the_condition_goes():
    said = r"takes \(input, sigma, aug_cond=0.0, class_cond=None\), expected \(x, sigma, cond\); keyword=... names"
    with pytest.raises(ValueError, match=said):
        k.GuidedDenoiser(Network(), 1.0)
    with pytest.raises(ValueError, match=r"takes \(x, sigma\)"):
        k.GuidedDenoiser(lambda x, sigma: x, 1.0)


def rounded(sigma, dtype):
    return sigma.to(dtype).to(sigma.dtype)


AROUND = {
    "exact": lambda sigma: sigma,
    "float32, up": lambda sigma: torch.nextafter(sigma, torch.tensor(math.inf)),
    "float32, down": lambda sigma: torch.nextafter(sigma, torch.tensor(0.0)),
    "logarithm": lambda sigma: sigma.log().neg().neg().exp(),
    "float64": lambda sigma: sigma.double(),
    "float64, up": lambda sigma: sigma.double() * (1 + 1e-15),
    "float16": lambda sigma: sigma.half(),
    "float16, widened": lambda sigma: rounded(sigma, torch.float16),
    "bfloat16": lambda sigma: sigma.bfloat16(),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("order", ["falling", "rising", "shuffled"])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("last", [0.0, 0.01])
def test_the_next_sigma_of_one_that_was_rounded(around, order, kept, last):
    """Check the next sigma of each sample, for a run in any order and dtype."""
    sigmas = sigmas_of(last=last)
    places = {"falling": range(21), "rising": range(20, -1, -1), "shuffled": torch.randperm(21).tolist()}[order]
    run = sigmas.to(kept)[list(places)]
    found = k.next_sigma(run, AROUND[around](sigmas[:-1]))
    expected = sigmas.to(kept)[1:].to(found.dtype)
    assert torch.equal(found, expected)
    assert found.dtype == (torch.float64 if "64" in around else torch.float32)


@pytest.mark.parametrize(
    "sigmas, sigma, expected",
    [
        ([8.0, 4.0, 2.0, 0.0], 3.0, 2.0),  # between two, as at the middle of a second order step
        ([8.0, 4.0, 2.0, 0.0], 1.0, 0.0),  # below the last
        ([8.0, 4.0, 2.0], 2.0, 0.0),
        ([8.0, 4.0, 2.0], 1.0, 0.0),
        ([8.0, 4.0, 2.0, 0.0], 9.0, 4.0),  # above the first: the step begins there with noise added
        ([8.0, 4.0, 4.0, 2.0], 4.0, 2.0),  # repeated
        ([8.0, 8.0, 4.0, 0.0], 9.0, 4.0),
        ([8.0], 8.0, 0.0),
        ([8.0, 0.0], 0.0, 0.0),
        ([1.0, 0.9999, 0.9998, 0.0], 0.9999, 0.9998),  # closer than the tolerance: the nearest counts
        ([1.0, 0.9999, 0.9998, 0.0], 0.99991, 0.9998),
    ],
)
def test_the_next_sigma(sigmas, sigma, expected):
    found = k.next_sigma(torch.tensor(sigmas), torch.tensor([sigma, sigma]))
    assert torch.equal(found, torch.tensor([expected, expected]))


class Recorder:
    """Record the s and t of the calls of omega."""

    def __init__(self):
        self.asked = []

    def __call__(self, c, s, t):
        self.asked.append((float(s[0]), float(t[0])))
        return torch.full_like(t, 0.5)


NAMES = ("s_churn", "s_tmin", "s_tmax")
GIVEN = {"cond": torch.tensor([0.5, 0.1, -0.4]), "uncond": torch.zeros(3)}


@churners
@each_churn
def test_s_with_churn(sampler, corrected, churn):
    """Check that a step from sigma_hat goes where a step from sigma goes; in Heun's second call t is a sigma."""
    settings, omega, sigmas = CHURNS[churn], Recorder(), sigmas_of()
    sampler(k.GuidedDenoiser(conditional, omega, sigmas), noise(), sigmas, GIVEN, None, None, *settings)
    calls = []
    churned(noise(), sigmas, [torch.zeros(SHAPE)] * 20, False, *settings, called=calls)
    expected = [[(float(s), float(hat))] for s, (_, _, hat) in zip(sigmas[1:], calls, strict=True)]
    if corrected:
        for i in range(19):
            expected[i].append((float(sigmas[i + 2]), float(sigmas[i + 1])))
    torch.testing.assert_close(torch.tensor(omega.asked), torch.tensor(sum(expected, [])))
    told = k.GuidedDenoiser(conditional, again := Recorder(), sigmas, **dict(zip(NAMES, settings[:3], strict=True)))
    for _, t in omega.asked:  # as k-diffusion's own samplers call
        told(noise(), torch.full((3,), t), **GIVEN)
    assert again.asked == omega.asked
    assert k.CHURNED.get() is None


@churners
def test_s_with_churn_inside_another_model(sampler, corrected):
    """Check churn in a run over the last part of the sigmas, as in image-to-image, also inside another model."""
    sigmas, omegas = sigmas_of(), (Recorder(), Recorder())
    for omega in omegas:
        guided = k.GuidedDenoiser(conditional, omega, sigmas)
        model = guided if omega is omegas[0] else lambda x, sigma, **given: guided(x, sigma, **given).clamp(-3, 3)  # noqa: B023
        sampler(model, noise(), sigmas[8:], GIVEN, None, None, 2.0)
    assert omegas[0].asked == omegas[1].asked
    firsts = [s for s, t in omegas[0].asked if not (sigmas == t).any()]
    torch.testing.assert_close(torch.tensor(firsts), sigmas[9:])


def test_s_in_ancestral_steps_of_second_order():
    """Check the middle of a step from t to sigma_down, which is s up to rounding: the result is the sigma after s."""
    sigmas, omega = sigmas_of(8), Recorder()
    guided = k.GuidedDenoiser(conditional, omega, sigmas)
    for t, s in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        up = torch.minimum(s, (s**2 * (t**2 - s**2) / t**2) ** 0.5)
        down = (s**2 - up**2) ** 0.5
        for middle in (t.log().lerp(down.log(), 0.5).exp(), (-(0.5 * (-t.log() - down.log()))).exp()):
            guided(noise(), middle.expand(3), **GIVEN)
    assert [s for s, _ in omega.asked] == [float(s) for s in sigmas[2:] for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sigmas_in_half_precision(dtype):
    """Check a sampler in half precision; tables take float32."""
    sigmas, knots = sigmas_of(6), torch.linspace(0, 11, 5)
    table = lgd.OmegaTable(torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(0)), knots, knots)
    guided = k.GuidedDenoiser(conditional, lambda c, s, t: table(None, s, t), sigmas)
    for t, s in zip(sigmas[:-1], sigmas[1:], strict=True):
        given = {name: one.to(dtype) for name, one in GIVEN.items()}
        found = guided(noise().to(dtype), (sigmas.new_ones(3) * t).to(dtype), **given)
        c, u = (conditional(noise().to(dtype), t.expand(3).to(dtype), one) for one in given.values())
        omega = table(None, s.expand(3), t.expand(3).to(dtype).float())
        assert torch.equal(found, lgd.guided_score(c, u, omega))


def test_a_compiled_denoiser():
    """Check that one graph finds s; with churn from the arguments."""
    sigmas, settings = sigmas_of(3), {"s_churn": 0.6}
    guided = k.GuidedDenoiser(conditional, lambda c, s, t: s + t / 10, sigmas, **settings)
    compiled = torch.compile(guided, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found = k.sample_euler(compiled, noise(), sigmas, GIVEN, **settings)
    torch.manual_seed(1)
    expected = k.sample_euler(k.GuidedDenoiser(conditional, guided.omega, sigmas), noise(), sigmas, GIVEN, **settings)
    torch.testing.assert_close(found, expected)
