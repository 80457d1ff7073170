"""Test the self-consistency loss, its times, and learning with a denoiser that is known exactly."""

import pytest
import torch
from torch.nn.functional import one_hot

import lgd_kernels as lgd
from benchmarks.learning import eager_loss
from examples.shared import guidance
from lgd_kernels import learn
from lgd_kernels.learn import Frozen, Settings, particle_energy, sample_s, sample_times
from lgd_kernels.metrics import energy_distance

# x1 = (0, 0), x2 = (3, 4); y1 = (0, 0), y2 = (3, 0): distances 0, 3, 5, 4, and 5 between the particles
X = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
Y = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "beta, lam, unbiased, expected",
    [
        (1.0, 0.0, True, 3.0),  # (0 + 3 + 5 + 4) / 4
        (1.0, 1.0, True, 0.5),  # 3 - 1/2 * (5 + 5) / 2
        (1.0, 0.5, True, 1.75),  # 3 - 1/4 * (5 + 5) / 2
        (1.0, 1.0, False, 1.75),  # 3 - 1/2 * (5 + 5) / 4
        (2.0, 0.0, True, 12.5),  # (0 + 9 + 25 + 16) / 4
        (2.0, 1.0, True, 0.0),  # 12.5 - 1/2 * 25
        (1.75, 1.0, True, (3**1.75 + 5**1.75 + 4**1.75) / 4 - 5**1.75 / 2),
    ],
)
def test_hand_worked_values(beta, lam, unbiased, expected):
    torch.testing.assert_close(particle_energy(X, Y, beta, lam, unbiased), torch.tensor([expected]))


def test_defaults_are_the_papers():
    assert torch.equal(particle_energy(X, Y), particle_energy(X, Y, 1.75, 1.0, True))


def test_one_item_moves_no_other():
    x, y = torch.randn(3, 4, 5, generator=seeded()), torch.randn(3, 2, 5, generator=seeded(1))
    before = particle_energy(x, y)
    x[1], y[1] = 7 * x[1], -y[1]
    after = particle_energy(x, y)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and before[1] != after[1]


def test_invariances():
    x, y = (torch.randn(3, m, 2, 3, generator=seeded(m), dtype=torch.float64) for m in (4, 5))
    loss = particle_energy(x, y)
    assert loss.shape == (3,)
    torch.testing.assert_close(particle_energy(x[:, [2, 0, 3, 1]], y[:, [4, 0, 1, 3, 2]]), loss)  # order
    torch.testing.assert_close(particle_energy(x.flatten(2), y.flatten(2)), loss)  # trailing shape
    torch.testing.assert_close(particle_energy(x + 1.5, y + 1.5), loss)  # translation
    torch.testing.assert_close(particle_energy(3 * x, 3 * y), 3**1.75 * loss)  # scale


def test_the_targets_own_law_has_the_least_loss():
    y, x = torch.randn(2, 20000, 4, 2, generator=seeded())
    loss = [particle_energy(scale * x + shift, y).mean() for scale, shift in ((1, 0), (0.8, 0), (1.2, 0), (1, 0.3))]
    assert min(loss) == loss[0]
    # lam = 0 has no such optimum: it rewards particles that huddle together
    assert particle_energy(0.8 * x, y, lam=0.0).mean() < particle_energy(x, y, lam=0.0).mean()


@pytest.mark.parametrize("beta, lam, unbiased", [(1.75, 1.0, True), (1.0, 0.5, False), (2.0, 0.0, True)])
def test_gradient_against_finite_differences(beta, lam, unbiased):
    x, y = (torch.randn(2, m, 3, generator=seeded(m), dtype=torch.float64, requires_grad=True) for m in (3, 4))
    assert torch.autograd.gradcheck(lambda x, y: particle_energy(x, y, beta, lam, unbiased), (x, y))


def test_nan_is_not_taken_for_coincidence():
    loss = particle_energy(torch.cat([X, X * torch.nan]), Y.expand(2, -1, -1))
    assert loss[0] == particle_energy(X, Y) and loss[1].isnan()


def test_points_of_one_number():
    x, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0]])  # [B, m], [B, k]
    torch.testing.assert_close(particle_energy(x, y, beta=1.0), torch.tensor([1.0]))  # (3 + 1) / 2 - 1/2 * 2


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.75, 2.0])
def test_coincident_particles_have_gradient_zero(beta):
    x = torch.zeros(1, 3, 2, requires_grad=True)
    y = torch.zeros(1, 2, 2, requires_grad=True)
    particle_energy(x, y, beta).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(y.grad, torch.zeros_like(y))


def test_precision_of_the_result():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert particle_energy(X.to(dtype), Y.to(dtype)).dtype == expected


@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (X, Y[..., :1], {}, "same trailing shape"),
        (X, Y.expand(2, -1, -1), {}, "x_s holds 1 items, targets 2"),
        (X, Y, {"beta": 2.5}, "`beta` is 2.5"),
        (X, Y, {"lam": -1.0}, "`lam` is -1"),
        (X[:, :1], Y, {}, "pass two or more particles"),
    ],
)
def test_loss_refuses(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        particle_energy(x, y, **options)


def test_times_fill_their_triangle():
    s, t = sample_times(20000, delta=0.2, zeta=0.05, s_min=0.1, generator=seeded())
    assert s.shape == t.shape == (20000,)
    assert s.min() >= 0.1 and s.max() <= 0.75 + 1e-6 and (t - s).min() >= 0.2 - 1e-6 and t.max() <= 0.95 + 1e-6
    assert abs(s.mean() - 0.425) < 0.005  # U[0.1, 0.75]
    assert abs((t - s).mean() - (0.2 + 0.95 - 0.425) / 2) < 0.005  # U[0.2, 0.95 - s]
    again = sample_times(20000, delta=0.2, zeta=0.05, s_min=0.1, generator=seeded())
    assert torch.equal(s, again[0]) and torch.equal(t, again[1])
    with pytest.raises(ValueError, match="leave no times"):
        sample_times(4, delta=0.9, zeta=0.05, s_min=0.1)


# A 2-D mixture: two classes of two Gaussians each, whose posterior mean is known.
MEANS = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])  # the first two are class 0
STD, SCHEDULE, STEPS = 0.3, lgd.RectifiedFlow(), 25


def draw(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    component = torch.randint(0, 4, (n,), generator=generator)
    return MEANS[component] + STD * torch.randn(n, 2, generator=generator), component // 2


def exact_denoiser(wrong: float) -> Frozen:
    """E[x0 | x_t, label], where a label names the other class with probability `wrong`; exact at 0. Label 2 is none."""

    def estimate(x, u, weights):  # [N, 2], [N], [N, 4]
        signal, noise = (level[:, None] for level in SCHEDULE.signal_noise(u))
        variance = (signal * STD).square() + noise.square()
        offset = x[:, None] - signal[..., None] * MEANS
        posterior = (weights.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)
        mean = MEANS + (signal * STD**2 / variance)[..., None] * offset
        return (posterior[..., None] * mean).sum(1)

    def denoiser(x, u, c):
        own = one_hot(c, 3)[:, :2].repeat_interleave(2, 1) / 2
        noisy = own * (1 - wrong) + (0.5 - own) * wrong
        return estimate(x, u, torch.where((c == 2)[:, None], 0.25, noisy))

    return Frozen(denoiser, SCHEDULE, null=2)


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["exact", "label-noisy"])
def learned(request):
    """(wrong, denoiser, the last checkpoint): the same start and the same data for both denoisers."""
    torch.manual_seed(0)
    frozen, settings = exact_denoiser(request.param), Settings(batch=128, s_min=0.02, ema=0.9)
    checkpoints = guidance.learn_omega(frozen, draw(2000, seeded()), settings, classes=2, steps=200, every=100)
    assert len(checkpoints) == 2
    return request.param, frozen, checkpoints[-1]


def test_learning_leaves_an_exact_denoiser_alone_and_guides_a_noisy_one(learned):
    wrong, _, net = learned
    u_s, u_t = sample_times(1000, delta=0.04, generator=seeded(1))
    omega = guidance.omega_grid(net, SCHEDULE, u_s, u_t, 2).mean()
    assert omega < 0.05 if wrong == 0 else 0.5 < omega < 4


def test_learned_guidance_lowers_the_distance_to_real_data(learned):
    wrong, frozen, net = learned
    generator = seeded(2)
    tables = torch.stack([torch.zeros(STEPS, 2), guidance.path_table(net, SCHEDULE, STEPS, 2)])
    samples = guidance.sample_classes(frozen.predict, tables, 500, 2, SCHEDULE, generator)  # [2, 2, 500, 2]
    x, c = draw(2000, generator)
    unguided, guided = (
        sum(float(energy_distance(group[label], x[c == label])) for label in (0, 1)) / 2 for group in samples
    )
    if wrong == 0:
        assert guided < 0.02  # not spoiled
    else:
        assert guided < unguided / 3 and unguided > 0.05


def test_the_eager_loss_of_the_benchmark_has_the_law_of_the_fused_one():
    """It is what the time of a step is measured against: the same mean and slope, on noise of its own."""
    x0, c = (part[:1].expand(40000, *part.shape[1:]) for part in draw(1, seeded()))
    s, t = torch.full((40000,), 0.3), torch.full((40000,), 0.7)
    particles = learn.draw(exact_denoiser(0.3), x0, c, s, t, seed=6)
    torch.manual_seed(0)
    found = []
    for loss in (learn.self_consistency_loss, eager_loss):
        omega = torch.full((40000,), 0.8, requires_grad=True)
        each = loss(particles, omega)
        found.append((each.detach(), torch.autograd.grad(each.sum(), omega)[0]))
    for fused, eager in zip(*found, strict=True):
        error = float((fused - eager).std()) / 200
        assert abs(float((fused - eager).mean())) < 4 * error < 0.1 * abs(float(eager.mean()))


def test_the_loss_itself_prefers_omega_zero_for_an_exact_denoiser():
    """Not the ReLU: weights on both sides of 0 are worse, under common noise."""
    s, t = sample_times(10000, s_min=0.02, generator=seeded(4))
    curve = learn.curve(learn.draw(exact_denoiser(0.0), *draw(10000, seeded(3)), s, t, seed=5))
    omega = torch.tensor([-0.5, 0.0, 0.5, 1.0])
    assert int(curve.loss(omega.expand(10000, -1)).mean(0).argmin()) == 1
    assert abs(float(curve.minimize(bracket=(-2, 4), group=torch.zeros(10000, dtype=torch.int64)))) < 0.25


@pytest.mark.parametrize("delta", [0.02, 0.1, 0.3])
def test_other_s_of_the_same_t(delta, generator):
    """As likely as those that t came with: the same means of s, of its square and of its product with t, and never
    within delta of t."""
    s, t = sample_times(400_000, delta, generator=generator)
    other = sample_s(t, delta, generator=generator)
    assert bool((t - other > 0.999 * delta).all() and (other > 0.0099).all())
    for f in (lambda s: s, lambda s: s * s, lambda s: s * t, lambda s: (s < 0.2).float()):
        assert abs(float(f(s).mean() - f(other).mean())) < 5 * float(f(s).std()) / 400_000**0.5
