"""Share between the tests of energy_mmd: the MMD kernels, the options, and a call as the operator takes it."""

import pytest

import lgd_kernels as lgd
from lgd_kernels import testing
from lgd_kernels.ops.energy_mmd import reference
from lgd_kernels.ops.energy_mmd.kernels import split_kernel
from lgd_kernels.ops.energy_mmd.structs import EnergyMmd

KERNELS = {
    "energy": lgd.Energy(),
    "energy 1.75": lgd.Energy(1.75),
    "energy 0.3": lgd.Energy(0.3),
    "energy 2": lgd.Energy(2.0),
    "gaussian": lgd.Gaussian(1.5),
    "mixture": lgd.Gaussian((0.5, 1.0, 4.0)),
    "laplace": lgd.Laplace(2.0),
    "inverse multiquadric": lgd.RationalQuadratic(1.5),
    "rational quadratic": lgd.RationalQuadratic(1.5, 2.0),
    "polynomial": lgd.Polynomial(),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
OPTIONS = [{}, {"unbiased": False}, {"lam": 0.5}, {"lam": 0.0}, {"target_term": False}]


def definition(x, y, kernel, x_weights=None, y_weights=None, lam=1.0, unbiased=True, target_term=True):
    """Return the struct of the operator, a batch of one that wants both gradients."""
    points = (one.flatten(1)[None] for one in (x, y))
    weights = (None if one is None else one[None] for one in (x_weights, y_weights))
    function = split_kernel(kernel, x[0].numel())
    return EnergyMmd(*points, *weights, function, lam, unbiased, True, target_term, None, [True, True])


def terms(x, y, kernel):
    """Compute the sum of |p_i q_j k| of all terms of the value."""
    x, y = testing.promoted(x), testing.promoted(y)
    size = kernel._replace(offset=abs(kernel.offset)) if isinstance(kernel, lgd.Polynomial) else kernel
    plus = [reference.energy_mmd(definition(a, b, size, lam=0.0)).abs() for a, b in ((x, y), (x, x), (y, y))]
    return plus[0] + plus[1] + plus[2]


def terms_of_slope(x, y, kernel):
    """Compute the largest sum over j of the lengths of what pairs add to the slope of a sample of x, weights up to
    2 / n."""
    x, y = x.detach().flatten(1), y.detach().flatten(1)
    total = 0.0
    for other in (y, x):
        if isinstance(kernel, lgd.Polynomial):
            kernel = kernel._replace(scale=1 / x.shape[1])
            slopes = kernel.slope((x @ other.t()).abs()) * other.norm(dim=1)
        else:
            squares = (x[:, None] - other[None]).square().sum(-1)
            slopes = 2 * kernel.slope(squares).abs() * squares.sqrt()
        total += slopes.mean(1).max().item()
    return 2 * 2 * total / len(x)
