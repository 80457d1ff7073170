"""Test schedules: levels against known values, and the float32 gap of times that are close."""

import math

import pytest
import torch

import lgd_kernels as lgd

CONTINUOUS = {
    "rectified flow": lgd.RectifiedFlow(),
    "cosine": lgd.VPCosine(),
    "ddpm, continuous": lgd.VPLinear.ddpm(),
    "stable diffusion, continuous": lgd.VPLinear.stable_diffusion(),
    "edm": lgd.EDM(),
}
DISCRETE = {"ddpm": lgd.Discrete.ddpm(), "stable diffusion": lgd.Discrete.stable_diffusion()}
ALL = CONTINUOUS | DISCRETE
VARIANCE_PRESERVING = {name: schedule for name, schedule in ALL.items() if name not in ("rectified flow", "edm")}


def each(schedules):
    return pytest.mark.parametrize("schedule", schedules.values(), ids=schedules.keys())


def times(schedule, dtype=torch.float64, count=101):
    """Return times over the whole span of a schedule, from the data to the noise: integers for a discrete one."""
    return schedule.from_unit(torch.linspace(0, 1, count, dtype=dtype))


def wide(schedule):
    """Return the schedule whose levels are float64 for the times of `times`."""
    return lgd.Discrete(schedule.alphas_cumprod, torch.float64) if isinstance(schedule, lgd.Discrete) else schedule


@pytest.mark.parametrize(
    ("schedule", "t", "s", "expected"),
    [  # signal_t, noise_t, signal_s, noise_s, gap
        (lgd.RectifiedFlow(), 0.75, 0.25, (0.25, 0.75, 0.75, 0.25, 0.5)),
        (lgd.VPCosine(), 2 / 3, 1 / 3, (0.5, 0.75**0.5, 0.75**0.5, 0.5, 0.5)),  # 60 and 30 degrees
        (lgd.EDM(), 2.0, 0.5, (1.0, 2.0, 1.0, 0.5, 1.5)),
    ],
    ids=["rectified flow", "cosine", "edm"],
)
def test_levels_by_hand(schedule, t, s, expected):
    levels = schedule.levels(torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64))
    assert torch.cat(levels).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "t", "integral"),
    [
        (lgd.VPLinear.ddpm(), 1.0, 10.05),  # 0.1 + 19.9 / 2
        (lgd.VPLinear.ddpm(), 0.5, 2.5375),  # 0.05 + 19.9 / 8
        (lgd.VPLinear.stable_diffusion(), 1.0, (0.85 + 10.2**0.5 + 12) / 3),  # the mean of (a + (b - a) u)^2
        (lgd.VPLinear(3.0, 3.0), 0.25, 0.75),  # a constant beta
        (lgd.VPLinear(3.0, 3.0, scaled=True), 0.25, 0.75),
    ],
)
def test_linear_beta_by_hand(schedule, t, integral):
    signal, noise = schedule.signal_noise(torch.tensor([t], dtype=torch.float64))
    assert signal.item() == pytest.approx(math.exp(-integral / 2), rel=1e-14)
    assert noise.item() == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-14)


@pytest.mark.parametrize(
    ("schedule", "index", "alpha"),
    [  # alphas_cumprod of trained models
        (lgd.Discrete.ddpm(), -1, 1.0),
        (lgd.Discrete.ddpm(), 0, 0.9999),
        (lgd.Discrete.ddpm(), 1, 0.9999 * (1 - 1e-4 - 0.0199 / 999)),
        (lgd.Discrete.ddpm(), 999, 4.0358e-05),  # signal 0.00635
        (lgd.Discrete.stable_diffusion(), 0, 0.99915),
        (
            lgd.Discrete.stable_diffusion(),
            999,
            1 / (1 + 14.6146**2),
        ),  # signal 0.0683; 14.6146 is the first sigma of its samplers
    ],
)
def test_discrete_tables_by_hand(schedule, index, alpha):
    signal, noise = schedule.signal_noise(torch.tensor([index]))
    assert signal.item() == pytest.approx(alpha**0.5, rel=1e-5)
    assert noise.item() == pytest.approx((1 - alpha) ** 0.5, rel=1e-5)


def test_discrete_levels_by_hand():
    table = lgd.Discrete(torch.tensor([0.64, 0.36], dtype=torch.float64), dtype=torch.float64)
    levels = table.levels(torch.tensor([1, 1, 0]), torch.tensor([0, -1, -1]))
    expected = [[0.6, 0.6, 0.8], [0.8, 0.8, 0.6], [0.8, 1, 1], [0.6, 0, 0], [0.28, 0.8, 0.6]]
    torch.testing.assert_close(torch.stack(levels), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_edm_spacing_by_hand():
    """Check the first and last of the 18 sigmas of Karras et al., and the middle in sigma^(1/7)."""
    sigma = lgd.EDM().from_unit(torch.tensor([0.0, 1e-12, 0.5, 16 / 17, 1.0], dtype=torch.float64))
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    assert sigma.tolist() == pytest.approx([0.0, 0.002, middle, 57.586, 80.0], rel=1e-4)


@each(VARIANCE_PRESERVING)
def test_variance_is_preserved(schedule):
    signal, noise = wide(schedule).signal_noise(times(schedule))
    assert (signal**2 + noise**2 - 1).abs().max() < 1e-15
    signal, noise = schedule.signal_noise(times(schedule, torch.float32))
    assert signal.dtype == torch.float32 and (signal**2 + noise**2 - 1).abs().max() < 4e-7


@each(ALL)
def test_unit_interval_runs_from_data_to_noise(schedule):
    signal, noise = schedule.signal_noise(times(schedule))
    assert signal[0] == 1 and noise[0] == 0
    ratio = noise / signal
    assert (ratio.diff() > 0).all()
    at = times(schedule)
    assert at[0] == max(schedule.span[0], -1) and at[-1] == (80.0 if schedule == lgd.EDM() else schedule.span[1])


@each(ALL)
def test_levels_of_the_whole_way(schedule):
    """Check a step from the largest time to the data: the last levels are those of the data, and none is NaN."""
    t, s = times(schedule, torch.float32, 2).flip(0)[:1], times(schedule, torch.float32, 2)[:1]
    levels = schedule.levels(t, s)
    assert levels.signal_s.item() == 1 and levels.noise_s.item() == 0
    assert levels.gap.item() == pytest.approx(levels.noise_t.item(), rel=2e-7)
    assert torch.isfinite(torch.stack(levels)).all() and (torch.stack(levels) >= 0).all()


@each(CONTINUOUS)
def test_gap_is_antisymmetric(schedule):
    at = times(schedule)[1:]
    assert torch.equal(schedule.gap(at, at), torch.zeros_like(at))
    torch.testing.assert_close(schedule.gap(at[1:], at[:-1]), -schedule.gap(at[:-1], at[1:]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("limit", "table"),
    [
        (lgd.VPLinear.ddpm(), lgd.Discrete.ddpm(100_000)),
        (lgd.VPLinear.stable_diffusion(), lgd.Discrete.stable_diffusion(100_000)),
    ],
    ids=["ddpm", "stable diffusion"],
)
def test_fine_tables_approach_continuous_time(limit, table):
    unit = torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=torch.float64)
    fine = lgd.Discrete(table.alphas_cumprod, torch.float64).signal_noise(table.from_unit(unit))
    torch.testing.assert_close(torch.stack(fine), torch.stack(limit.signal_noise(unit)), rtol=1e-3, atol=0)


@each(ALL)
def test_log_snr(schedule):
    at = times(schedule)
    found = wide(schedule).log_snr(at)
    signal, noise = wide(schedule).signal_noise(at)
    torch.testing.assert_close(found[1:-1], 2 * torch.log(signal / noise)[1:-1], rtol=1e-12, atol=1e-12)
    assert (found.diff() < 0).all()
    assert found[0] == math.inf
    if isinstance(schedule, (lgd.RectifiedFlow, lgd.VPCosine)):
        assert found[-1] == -math.inf  # no signal is left there
    else:
        assert found[-1] == pytest.approx(2 * math.log(signal[-1] / noise[-1]), rel=1e-12)


@each(CONTINUOUS)
def test_log_snr_in_float32(schedule):
    at = times(schedule, torch.float32)[1:-1]
    torch.testing.assert_close(schedule.log_snr(at).double(), schedule.log_snr(at.double()), rtol=4e-7, atol=4e-7)


def far_and_close(schedule, distance):
    """Return float32 times, `distance` apart, over the whole span."""
    t = torch.linspace(1.01 * distance, 1, 5001)
    return t, (t - distance).clamp(min=0)


def relative_gap_errors(schedule, t, s):
    """Return the largest relative error of the gap, and of `signal_s noise_t - signal_t noise_s` from the same rounded
    levels.

    The reference is this difference in float64, which keeps 11 digits at these distances and does not use the formula
    of the gap.
    """
    (signal_t, noise_t), (signal_s, noise_s) = schedule.signal_noise(t.double()), schedule.signal_noise(s.double())
    truth = signal_s * noise_t - signal_t * noise_s
    levels = schedule.levels(t, s)
    naive = levels.signal_s * levels.noise_t - levels.signal_t * levels.noise_s
    return tuple(((found.double() - truth) / truth).abs().max().item() for found in (levels.gap, naive))


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 0.1, 0.9])
@each(CONTINUOUS)
def test_gap_in_float32(schedule, distance):
    t, s = far_and_close(schedule, distance)
    error, _ = relative_gap_errors(schedule, t, s)
    assert error <= 4e-7


@each({name: schedule for name, schedule in CONTINUOUS.items() if name != "edm"})  # whose signal is 1: nothing cancels
def test_naive_gap_would_be_ten_times_worse(schedule):
    t, s = far_and_close(schedule, 1e-4)
    error, naive = relative_gap_errors(schedule, t, s)
    assert naive > 10 * max(error, 4e-7)


@pytest.mark.parametrize("distance", [1e-4, 0.1])
@each(CONTINUOUS)
def test_gap_in_float64(schedule, distance):
    t, s = (time.double() for time in far_and_close(schedule, distance))
    error, _ = relative_gap_errors(schedule, t, s)
    assert error <= 1e-15 / distance  # what the difference itself loses


@each(DISCRETE)
def test_discrete_gap(schedule):
    """Check, for neighbours in the table and -1, that the float32 gap is the rounded float64 gap."""
    t = torch.arange(1000)
    exact, rounded = wide(schedule).levels(t, t - 1), schedule.levels(t, t - 1)
    difference = exact.signal_s * exact.noise_t - exact.signal_t * exact.noise_s
    torch.testing.assert_close(exact.gap, difference, rtol=1e-15, atol=0)
    assert torch.equal(rounded.gap, exact.gap.float())
    naive = rounded.signal_s * rounded.noise_t - rounded.signal_t * rounded.noise_s
    assert ((naive.double() - exact.gap) / exact.gap).abs().max() > 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each(CONTINUOUS)
def test_levels_have_the_dtype_of_the_times(schedule, dtype):
    t = torch.tensor([0.9, 0.5], dtype=dtype)
    assert {level.dtype for level in schedule.levels(t, t / 2)} == {dtype}
    assert schedule.log_snr(t).dtype == schedule.from_unit(t).dtype == dtype


@pytest.mark.parametrize("times_dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_levels_have_the_dtype_of_the_table(times_dtype, dtype):
    table = lgd.Discrete.ddpm(50, dtype=dtype)
    levels = table.levels(torch.tensor([9, 5], dtype=times_dtype), torch.tensor([5, -1], dtype=times_dtype))
    assert {level.dtype for level in levels} == {dtype} and levels.noise_s[1] == 0


@each(ALL)
def test_numbers_stand_for_every_sample(schedule):
    unit = torch.tensor([0.5, 0.75, 1.0])
    t, data = schedule.from_unit(unit), schedule.from_unit(torch.zeros(3))
    for found, expected in zip(schedule.levels(t, data[0].item()), schedule.levels(t, data), strict=True):
        assert torch.equal(found, expected)
    last = t[-1].item()
    for found, expected in zip(schedule.levels(last, t[:2]), schedule.levels(t[[2, 2]], t[:2]), strict=True):
        assert torch.equal(found, expected)


@each(ALL)
def test_empty_batch(schedule):
    t = schedule.from_unit(torch.empty(0))
    assert all(level.shape == (0,) for level in schedule.levels(t, t))


@each(ALL)
def test_values_elsewhere_are_never_read(schedule):
    """Check that `levels` reads no values on a meta tensor, which has none; on a GPU a read would be a device sync."""
    t = schedule.from_unit(torch.ones(3)).to("meta")
    levels = schedule.levels(t, schedule.from_unit(torch.zeros(3)).to("meta"))
    assert all(level.is_meta and level.shape == (3,) for level in levels)


@each(CONTINUOUS)
def test_gradients_to_the_times(schedule):
    t = torch.tensor([0.9, 0.5], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.4, 0.3], dtype=torch.float64, requires_grad=True)
    assert schedule.levels(t, s).gap.requires_grad
    assert torch.autograd.gradcheck(lambda t, s: tuple(schedule.levels(t, s)), (t, s))


@each(ALL)
def test_compiles_in_one_graph(schedule):
    compiled = torch.compile(lambda t, s: schedule.levels(t, s), fullgraph=True, backend="aot_eager")
    t, s = schedule.from_unit(torch.tensor([0.5, 1.0])), schedule.from_unit(torch.tensor([0.0, 0.75]))
    for found, expected in zip(compiled(t, s), schedule.levels(t, s), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


def test_schedules_compare_by_what_they_are():
    assert lgd.VPLinear.ddpm() == lgd.VPLinear(0.1, 20.0) != lgd.VPLinear.stable_diffusion()


HALF, THIRD = torch.tensor([0.5, 0.5]), torch.tensor([0.3, 0.3])
FLOW, TABLE = lgd.RectifiedFlow(), lgd.Discrete(torch.linspace(0.9, 0.1, 10))
FOUR = torch.tensor([4, 4])
SOME = torch.tensor([0.3, torch.nan])
NAN = [(SOME, THIRD), (HALF, SOME), (HALF, torch.nan), (SOME, SOME)]


@pytest.mark.parametrize(
    ("schedule", "t", "s", "error", "message"),
    [
        (FLOW, THIRD, HALF, ValueError, r"or equal to it, in every sample; got s = \[0.5, 0.5\], t = \[0.3, 0.3\]"),
        (FLOW, HALF, torch.tensor([0.3, 0.6]), ValueError, r"`s` must be nearer the data than `t`"),
        (TABLE, FOUR, FOUR + 1, ValueError, r"Discrete.levels: `s` must be nearer the data"),
        *((one, *pair, ValueError, "times must lie in") for one in (FLOW, lgd.EDM(), lgd.VPCosine()) for pair in NAN),
        (lgd.EDM(), HALF + torch.inf, THIRD, ValueError, r"times must lie in \[0, inf\] and be finite; got"),
        (TABLE, FOUR, float("nan"), TypeError, "a time is nan, expected an integer"),
        (TABLE, FOUR, float("inf"), TypeError, "a time is inf, expected an integer"),
        (FLOW, HALF, "0.3", TypeError, r"a time is a str, expected a tensor \[B\] or a number"),
        (FLOW, 0.5, 0.3, TypeError, r"`t` and `s` are numbers, expected tensors \[B\]: torch.full"),
        (FLOW, HALF, THIRD[:1], ValueError, r"`s` is \[1\] torch.float32 on cpu, expected that of `t`: \[2\]"),
        (FLOW, HALF, THIRD.double(), ValueError, r"`s` is \[2\] torch.float64 .* `t`: \[2\] torch.float32"),
        (FLOW, HALF, THIRD.to("meta"), ValueError, r"on meta, expected that of `t`: .* on cpu"),
        (FLOW, HALF.half(), THIRD.half(), TypeError, r"`t` has dtype torch.float16, .* \(t.float\(\); half would lose"),
        (FLOW, HALF.bfloat16(), THIRD.bfloat16(), TypeError, r"`t` has dtype torch.bfloat16"),
        (FLOW, torch.ones(1, dtype=torch.int64), 0, TypeError, r"`t` has dtype torch.int64, expected float32"),
        (TABLE, FOUR.bool(), FOUR.bool(), TypeError, r"`t` has dtype torch.bool"),
        (FLOW, HALF + 1, THIRD, ValueError, r"times must lie in \[0, 1\]; got s = \[0.3, 0.3\], t = \[1.5, 1.5\]"),
        (FLOW, HALF, -THIRD, ValueError, r"times must lie in \[0, 1\]"),
        (lgd.EDM(), HALF, -THIRD, ValueError, r"EDM.levels: times must lie in \[0, inf\]"),
        (TABLE, FOUR + 6, FOUR, ValueError, r"times must lie in \[-1, 9\]"),
        (TABLE, FOUR, -FOUR, ValueError, r"times must lie in \[-1, 9\]"),
        (TABLE, HALF, THIRD, TypeError, r"torch.float32, expected integers \(t.long\(\)\); -1 is the data"),
    ],
)
def test_refuses_times(schedule, t, s, error, message):
    with pytest.raises(error, match=message):
        schedule.levels(t, s)


def test_refuses_a_fraction_of_an_index():
    """Check that 0.7 raises, since a silent cast to an integer would make it 0."""
    with pytest.raises((TypeError, ValueError), match="integer"):
        TABLE.levels(FOUR, 0.7)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        (torch.ones(2, 2), r"`alphas_cumprod` has shape \[2, 2\], expected \[N\]"),
        (torch.ones(0), r"`alphas_cumprod` has shape \[0\], expected \[N\]"),
        (torch.tensor([0.5, 1.5]), r"`alphas_cumprod` reaches from 0.5 to 1.5, expected values in \[0, 1\]"),
        (torch.tensor([0.5, torch.nan]), r"`alphas_cumprod` reaches from nan to nan, expected values in \[0, 1\]"),
        (torch.tensor([0.1, 0.5, 0.9]), "`alphas_cumprod` must decrease"),
    ],
)
def test_refuses_tables(alphas, message):
    with pytest.raises(ValueError, match=message):
        lgd.Discrete(alphas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each(ALL)
def test_a_step_of_no_length_is_the_identity(schedule, dtype):
    """Check s = t at every time, both ends included, in a batch with steps that move."""
    at = times(schedule, dtype, 11)
    levels = wide(schedule).levels(at, at) if dtype == torch.float64 else schedule.levels(at, at)
    assert torch.equal(levels.gap, torch.zeros_like(levels.gap)) and torch.stack(levels).isfinite().all()
    x, g = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind(0)
    for churn in (0.0, 1.0):
        assert torch.equal(lgd.guided_step(x, g, g, 0.0, levels, prediction="flow", churn=churn, seed=1), x)
    mixed = schedule.levels(at[1:], torch.where(torch.arange(10) % 2 == 0, at[1:], at[:-1]))
    assert (mixed.gap[::2] == 0).all() and (mixed.gap[1::2] > 0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lgd.EDM(sigma_min=-1.0), ValueError, "EDM: `sigma_min` is -1.0, expected a positive finite number"),
        (lambda: lgd.EDM(sigma_min=0.0), ValueError, "EDM: `sigma_min` is 0"),
        (lambda: lgd.EDM(sigma_min=math.nan), ValueError, "EDM: `sigma_min` is nan"),
        (lambda: lgd.EDM(sigma_max=math.inf), ValueError, "EDM: `sigma_max` is inf"),
        (lambda: lgd.EDM(sigma_min=80.0, sigma_max=0.002), ValueError, "`sigma_min` is 80, expected less than"),
        (lambda: lgd.EDM(rho=0.0), ValueError, "EDM: `rho` is 0"),
        (lambda: lgd.EDM(rho="7"), TypeError, "EDM: `rho` is a str, expected a float"),
        (lambda: lgd.VPLinear(beta_min=math.nan), ValueError, "VPLinear: `beta_min` is nan"),
        (lambda: lgd.VPLinear(beta_min=-0.1), ValueError, "VPLinear: `beta_min` is -0.1"),
        (lambda: lgd.VPLinear(beta_max=math.inf), ValueError, "VPLinear: `beta_max` is inf"),
        (lambda: lgd.VPLinear(20.0, 0.1), ValueError, "VPLinear: `beta_min` is 20, expected at most `beta_max`, 0.1"),
        (lambda: lgd.VPLinear(0.1, 20.0, scaled=1), TypeError, "VPLinear: `scaled` is 1, expected True or False"),
        (lambda: lgd.Discrete([0.9, 0.5]), TypeError, "`alphas_cumprod` is a list, expected a tensor"),
        (lambda: lgd.Discrete(torch.tensor([1, 0])), TypeError, "`alphas_cumprod` has dtype torch.int64"),
        (lambda: lgd.Discrete(torch.tensor([0.9, 0.5]), torch.float16), TypeError, "`dtype` is torch.float16"),
        (lambda: lgd.Discrete(torch.tensor([0.9, 0.9])), ValueError, "must decrease"),
        (lambda: lgd.Discrete.ddpm(0), ValueError, "Discrete.ddpm: `steps` is 0, expected 1 or more"),
        (lambda: lgd.Discrete.stable_diffusion(-5), ValueError, "Discrete.stable_diffusion: `steps` is -5"),
    ],
)
def test_refuses_numbers_of_no_schedule(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_edm_refuses_a_rho_whose_powers_overflow():
    with pytest.raises(ValueError, match="EDM: `rho` is 0.01, too small"):
        lgd.EDM(rho=0.01)
    assert lgd.EDM(rho=0.05).from_unit(torch.tensor([1.0])).isfinite().all()


@pytest.mark.parametrize("time", [1e300, 10**400, 2**64], ids=["float", "integer", "index"])
def test_a_number_that_no_time_can_be(time):
    """Check that the error names the schedule and the argument, unlike torch's own."""
    t = torch.tensor([5]) if time == 2**64 else torch.tensor([5.0])
    schedule = lgd.Discrete.ddpm(20) if time == 2**64 else lgd.EDM()
    with pytest.raises(ValueError, match=rf"{type(schedule).__name__}.levels: a time is .*, expected a number that"):
        schedule.levels(t, time)
