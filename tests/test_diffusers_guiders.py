"""Compare diffusers' own guider classes with rules.py, on the same predictions, in their precision and conventions.

diffusers counts w = 1 + omega from u, and with use_original_formulation omega from c; its rescaling is `rules.rescale`
around any rule. Its CFG-Zero* and TCFG compute in float32 for every dtype; the others compute in the dtype of the
predictions.
"""

import functools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.guidance import rules, weights
from lgd_kernels.guidance.stateful import Momentum

diffusers = pytest.importorskip("diffusers")
guiders = pytest.importorskip("diffusers.guiders")

SHAPE = 3, 4, 8, 8
W = 5.0
EXACT, SINGLE, SVD = 1e-11, 3e-6, 1e-5  # of the largest value; the last is that of a float32 SVD of the data


def predictions(generator, count=2, shape=SHAPE):
    """Return predictions with a direction that all samples share, and one for each sample."""
    shared = testing.sample(shape, torch.float64, generator)
    return [0.8 * shared + 0.5 * testing.sample(shape, torch.float64, generator) + 0.1 for _ in range(count)]


def guided_by(guider, *predictions, step=5, steps=20):
    guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(500))
    return guider.forward(*predictions).pred


def assert_same(found, theirs, limit):
    assert (found - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("original", [False, True])
def test_cfg_and_rescale(original, phi, generator):
    c, u = predictions(generator)
    guider = guiders.ClassifierFreeGuidance(
        guidance_scale=W - original, guidance_rescale=phi, use_original_formulation=original
    )
    rule = functools.partial(rules.rescale, phi=phi)
    assert_same(lgd.guided_score(c, u, W - 1, rule=rule), guided_by(guider, c, u), EXACT)


@pytest.mark.parametrize("options", [{}, {"eta": 0.4, "radius": 6.0}], ids=["plain", "bounded"])
@pytest.mark.parametrize("momentum", [None, -0.5])
def test_apg(options, momentum, generator):
    """Compare three steps of a run, which pass the momentum on."""
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=W,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=options.get("radius", 0.0),
        eta=options.get("eta", 0.0),
        use_original_formulation=True,
    )
    rule = functools.partial(rules.apg, **options)
    if momentum is not None:
        rule = Momentum(rule, momentum)
        guider.momentum_buffer = guiders.adaptive_projected_guidance.MomentumBuffer(momentum)
    for step in range(1, 4):
        c, u = predictions(generator)
        assert_same(lgd.guided_score(c, u, W, rule=rule), guided_by(guider, c, u, step=step), EXACT)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_cfg_zero_star(step, generator):
    """Compare with zero_init_steps=1: step 0 is zero."""
    c, u = predictions(generator)
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=W, zero_init_steps=1)
    rule = functools.partial(rules.cfg_zero_star, zero=step < 1)
    theirs = guided_by(guider, c, u, step=step)
    assert_same(lgd.guided_score(c, u, W - 1, rule=rule), theirs, SINGLE)
    assert step or not theirs.any()


@pytest.mark.parametrize("original", [False, True])
def test_tcfg(original, generator):
    c, u = predictions(generator)
    guider = guiders.TangentialClassifierFreeGuidance(guidance_scale=W - original, use_original_formulation=original)
    assert_same(lgd.guided_score(c, u, W - 1, rule=rules.tcfg), guided_by(guider, c, u), SVD)


@pytest.mark.parametrize("original", [False, True])
def test_mambo_g(original, generator):
    """Compare samples of two dimensions: torch's norm refuses three at once."""
    c, u = predictions(generator, shape=(3, 16, 20))
    guider = guiders.MagnitudeAwareGuidance(guidance_scale=W - original, alpha=0.5, use_original_formulation=original)
    rule = functools.partial(rules.mambo_g, alpha=0.5)
    assert_same(lgd.guided_score(c, u, W - 1, rule=rule), guided_by(guider, c, u), EXACT)


PERTURBED = {
    "pag": lambda **options: guiders.PerturbedAttentionGuidance(
        perturbed_guidance_scale=2.5,
        perturbed_guidance_layers=[1],
        perturbed_guidance_start=0.01,
        perturbed_guidance_stop=0.9,
        **options,
    ),
    "slg": lambda **options: guiders.SkipLayerGuidance(
        skip_layer_guidance_scale=2.5,
        skip_layer_guidance_layers=[1],
        skip_layer_guidance_start=0.01,
        skip_layer_guidance_stop=0.9,
        **options,
    ),
    "seg": lambda **options: guiders.SmoothedEnergyGuidance(
        seg_guidance_scale=2.5,
        seg_guidance_layers=[1],
        seg_guidance_start=0.01,
        seg_guidance_stop=0.9,
        **options,
    ),
}


@pytest.mark.parametrize("kind", PERTURBED)
@pytest.mark.parametrize("w", [W, 1.0])
def test_perturbed_predictions(kind, w, generator):
    """Compare with u and without: at w = 1 diffusers takes c and p alone, and adds to p."""
    c, u, p = predictions(generator, 3)
    guider = PERTURBED[kind](guidance_scale=w)
    omega, scale = torch.full((3,), w - 1, dtype=torch.float64), torch.full((3,), 2.5, dtype=torch.float64)
    if w == 1:
        theirs = guided_by(guider, c, None, p)
        scale = scale - 1
    else:
        theirs = guided_by(guider, c, u, p)
    found = lgd.combine((c, u, p), weights.perturbed(omega, scale), columns=(0, (0, 1), (0, 2)))
    assert_same(found, theirs, EXACT)
