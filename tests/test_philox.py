"""Test the noise: the integers of every implementation are those of Random123, the normals agree to 1e-6."""

import math

import numpy as np
import pytest
import torch
from conftest import address

import lgd_kernels as lgd
from lgd_kernels.runtime import impls
from lgd_kernels.runtime.philox import STREAM_STEP, STREAM_TARGETS, STREAM_USER, box_muller, normal, philox

if impls.triton_interpreted() or torch.cuda.is_available():
    import triton
    import triton.language as tl

    from lgd_kernels.runtime import triton_common

    @triton.jit
    def words_kernel(words, counters, N: tl.constexpr):
        """Store words [4, N] of counters and keys [6, N], uint32 held in int64."""
        at = tl.arange(0, N)
        c0, c1, c2, c3 = (
            tl.load(counters + at).to(tl.uint32),
            tl.load(counters + N + at).to(tl.uint32),
            tl.load(counters + 2 * N + at).to(tl.uint32),
            tl.load(counters + 3 * N + at).to(tl.uint32),
        )
        k0, k1 = tl.load(counters + 4 * N + at).to(tl.uint32), tl.load(counters + 5 * N + at).to(tl.uint32)
        w0, w1, w2, w3 = triton_common.philox(c0, c1, c2, c3, k0, k1)
        tl.store(words + at, w0.to(tl.int64))
        tl.store(words + N + at, w1.to(tl.int64))
        tl.store(words + 2 * N + at, w2.to(tl.int64))
        tl.store(words + 3 * N + at, w3.to(tl.int64))

    @triton.jit
    def normals_kernel(out, keys, samples, stream, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Store out [ROWS, BLOCK], elements first to first + BLOCK of each sample."""
        rows = tl.arange(0, ROWS)
        key, sample = tl.load(keys + rows), tl.load(samples + rows).to(tl.uint32)
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        z = triton_common.philox_tile(low, high, sample, stream.to(tl.uint32), tl.load(first), ROWS, BLOCK)
        tl.store(out + rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], z)


def extension():
    return impls.extension() or pytest.skip(impls.extension_error())


def words_of(target, counters, keys):
    """Return four words for each row of counters `[N, 4]` and keys `[N, 2]`."""
    if target.impl == "cpu":
        draw = extension().philox_words
        return torch.tensor([draw(c, k) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)])
    count = triton.next_power_of_2(len(counters))
    arguments = torch.zeros(6, count, dtype=torch.int64, device=target.device)
    arguments[:, : len(counters)] = torch.cat((counters, keys), 1).T
    words = torch.empty(4, count, dtype=torch.int64, device=target.device)
    words_kernel[(1,)](words, arguments, N=count)
    return words.T[: len(counters)].cpu()


def words_of_reference(counters, keys):
    return torch.stack(philox(counters.unbind(1), keys.unbind(1)), 1)


def quads_of(target, key, quad, samples, stream, count):
    """Return normals [samples, 4 count] of consecutive samples, from quad (element >> 2) on."""
    if target.impl == "cpu":
        out = torch.empty(len(samples), 4 * count)
        extension().philox_normal(out, 4 * quad, stream, (None, key, int(samples[0])), 1)
        return out
    out = torch.empty(len(samples), 4 * count, device=target.device)
    keys = torch.full((len(samples),), key, device=target.device)
    first = torch.tensor(4 * quad, device=target.device)  # the interpreter misreads a number between 2^31 and 2^32
    normals_kernel[(1,)](out, keys, samples.to(target.device), stream, first, ROWS=len(samples), BLOCK=4 * count)
    return out.cpu()


def quads_of_reference(key, quad, samples, stream, count):
    quads = quad + torch.arange(count)
    counter = (quads & 0xFFFFFFFF, quads >> 32, samples[:, None], torch.tensor(stream))
    words = philox(counter, (torch.tensor(key & 0xFFFFFFFF), torch.tensor((key >> 32) & 0xFFFFFFFF)))
    return torch.stack(box_muller(words), -1).flatten(1)


def assert_same_normals(found, expected):
    error = (found - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= 1e-6, f"{error.max():.1e}"


# kat_vectors of Random123, philox4x32 with 10 rounds: zeros, ones, and digits of pi
ONES, PI = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
KNOWN_COUNTERS = torch.tensor([[0, 0, 0, 0], ONES, PI])
KNOWN_KEYS = torch.tensor([[0, 0], ONES[:2], [0xA4093822, 0x299F31D0]])
KNOWN_WORDS = [
    [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
]


def test_known_answers_of_the_reference():
    assert words_of_reference(KNOWN_COUNTERS, KNOWN_KEYS).tolist() == KNOWN_WORDS


def test_known_answers(target):
    assert words_of(target, KNOWN_COUNTERS, KNOWN_KEYS).tolist() == KNOWN_WORDS


def test_box_muller_by_hand():
    """Words of a half, a quarter and an eighth turn: u = (word + 1/2) 2^-32 is that fraction in float32."""
    half, quarter, eighth = torch.tensor(2**31), torch.tensor(2**30), torch.tensor(2**29)
    z = box_muller((half, quarter, quarter, eighth))
    r_half, r_quarter = math.sqrt(2 * math.log(2)), math.sqrt(2 * math.log(4))
    expected = [0, r_half, r_quarter * math.sqrt(0.5), r_quarter * math.sqrt(0.5)]
    assert torch.stack(z).tolist() == pytest.approx(expected, abs=1e-7)


def test_normals_of_seed_zero_by_hand():
    """Element 0 to 3 of sample 0 on stream 0 with seed 0 are the first known answer, through Box-Muller in float64."""
    u = [(word + 0.5) / 2**32 for word in KNOWN_WORDS[0]]
    expected = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r = math.sqrt(-2 * math.log(radius))
        expected += [r * math.cos(2 * math.pi * angle), r * math.sin(2 * math.pi * angle)]
    assert lgd.philox_normal((1, 4), 0)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_layout_by_hand():
    """Seed 2^32 + 3, stream 2, sample 5, element 6 (row 1, column 2): key (3, 1), counter (1, 0, 5, 2), lane 2."""
    z = lgd.philox_normal((6, 2, 4), (1 << 32) + 3, stream=2)
    words = philox(tuple(torch.tensor([1, 0, 5, 2])), tuple(torch.tensor([3, 1])))
    assert_same_normals(z[5, 1, 2], box_muller(words)[2])


@pytest.mark.parametrize("shape", [(3,), (2, 1), (5, 3, 7), (3, 255), (2, 256), (2, 257), (2, 8195), (1, 40000)])
@pytest.mark.parametrize("seed", [0, 1234567890123456789])
def test_normals_by_default(shape, seed, poisoned):
    """Rows around a quad (4), a vectorised group (256) and a chunk (8192), and enough work for two threads."""
    extension()
    found = lgd.philox_normal(shape, seed, stream=3, first_sample=11)
    assert found.dtype == torch.float32 and found.shape == shape and address(found) in poisoned
    assert_same_normals(found, normal(shape, seed, 3, 11, torch.device("cpu")))


def random_counters():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (1000, 4), generator=generator)
    return counters, torch.randint(0, 2**32, (1000, 2), generator=generator)


def test_words_of_random_counters_in_the_reference():
    """Against the algorithm in Python's own integers."""
    mask = 0xFFFFFFFF
    counters, keys = random_counters()
    found = words_of_reference(counters, keys).tolist()
    for c, k, words in zip(counters.tolist(), keys.tolist(), found, strict=True):
        for _ in range(10):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [second >> 32 ^ c[1] ^ k[0], second & mask, first >> 32 ^ c[3] ^ k[1], first & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        assert words == c


def test_words_of_random_counters(target):
    counters, keys = random_counters()
    assert torch.equal(words_of(target, counters, keys), words_of_reference(counters, keys))


@pytest.mark.parametrize(
    "first", [0, 2**31, 2**33, 2**34 - 16, 2**34, 2**40 + 4, 2**62], ids=lambda first: f"2^{math.log2(first or 1):.2f}"
)
def test_elements_far_out(target, first):
    """Element 2^34 is the first whose quad needs the counter's second word."""
    samples = torch.tensor([2**32 - 4, 2**32 - 3, 2**32 - 2, 2**32 - 1])
    arguments = -123456789012345, first // 4, samples, 2, 128  # two of the vectorised groups
    assert_same_normals(quads_of(target, *arguments), quads_of_reference(*arguments))


def counter_that_gives(words, key):
    """Run Philox backwards: for a given key, counters and words correspond one to one."""
    mask = 0xFFFFFFFF
    w0, w1, w2, w3 = words
    k0, k1 = (key + 10 * 0x9E3779B9) & mask, ((key >> 32) + 10 * 0xBB67AE85) & mask
    for _ in range(10):
        k0, k1 = (k0 - 0x9E3779B9) & mask, (k1 - 0xBB67AE85) & mask
        c0 = w3 * pow(0xD2511F53, -1, 2**32) & mask
        c2 = w1 * pow(0xCD9E8D57, -1, 2**32) & mask
        w0, w1, w2, w3 = c0, w0 ^ (0xCD9E8D57 * c2 >> 32) ^ k0, c2, w2 ^ (0xD2511F53 * c0 >> 32) ^ k1
    return w0, w1, w2, w3


# Words at the ends and at the quarter turns, where a logarithm, a root or the choice of a quadrant could go wrong.
EXTREMES = [
    (0, 0, 0, 0xFFFFFFFF),
    (0xFFFFFFFF, 0, 0xFFFFFFFF, 0xFFFFFFFF),
    (0xFFFFFF7F, 0x80000000, 0xFFFFFF80, 0x7FFFFFFF),
    (1, 0x20000000, 2, 0x1FFFFFFF),
    (0x80000000, 0x40000000, 0x7FFFFFFF, 0xC0000000),
    (0xB504F333, 0xE0000000, 0xB504F334, 0xDFFFFFFF),  # the square root of a half, where the logarithm's pieces meet
]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_words_in_the_reference(extreme):
    z = torch.stack(box_muller(tuple(torch.tensor(extreme))))
    assert torch.isfinite(z).all() and z.abs().max() < 6.8  # sqrt(-2 ln 2^-33) = 6.76


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_words(target, extreme):
    for key in range(1000):  # an element index has 62 bits for its quad: look for a key whose counter fits
        low, high, sample, stream = counter_that_gives(extreme, key)
        if high < 2**29 and stream < 2**31:
            break
    arguments = key, (high << 32) + low, torch.tensor([sample]), stream, 1
    words = philox(tuple(torch.tensor([low, high, sample, stream])), tuple(torch.tensor([key, 0])))
    assert tuple(int(word) for word in words) == extreme
    assert_same_normals(quads_of(target, *arguments)[0], torch.stack(box_muller(words)))


@pytest.mark.parametrize("start", [1, 2, 5, 2**32 - 1])
def test_first_sample_splits_a_batch(start):
    """Each process of a sharded batch draws its own part of the whole; the index is a uint32 and wraps."""
    whole = lgd.philox_normal((8, 6), 7, first_sample=start - 1)
    assert torch.equal(lgd.philox_normal((7, 6), 7, first_sample=start), whole[1:])
    if start == 2**32 - 1:
        assert torch.equal(whole[2], lgd.philox_normal((1, 6), 7)[0])


def test_a_seed_for_each_sample():
    """A row is a batch of one with that seed, wherever it stands and whatever `first_sample` says."""
    seeds = torch.tensor([5, -1, 2**62, 5])
    whole = lgd.philox_normal((4, 9), seeds, stream=1, first_sample=3)
    for row, seed in zip(whole, seeds.tolist(), strict=True):
        assert torch.equal(row, lgd.philox_normal((1, 9), seed, stream=1)[0])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(lgd.philox_normal((4, 9), seeds[order], stream=1), whole[order])
    assert torch.equal(whole, lgd.philox_normal((4, 9), seeds.repeat_interleave(2)[::2], stream=1))  # strided
    assert_same_normals(whole, normal((4, 9), seeds, 1, 3, torch.device("cpu")))


@pytest.mark.parametrize("seed", [0, 7, -7, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_seed_in_a_tensor(seed):
    """A captured graph reads its seed from memory: the same noise, sample index included."""
    expected = lgd.philox_normal((3, 5), seed, first_sample=2)
    assert torch.equal(lgd.philox_normal((3, 5), torch.tensor(seed), first_sample=2), expected)
    assert_same_normals(expected, normal((3, 5), torch.tensor(seed), 0, 2, torch.device("cpu")))


def test_everything_that_names_noise_matters():
    """Seeds (all 64 bits), streams, samples and elements: no two draws are the same."""
    draws = [lgd.philox_normal((4, 4), seed) for seed in (0, 1, 2**31, 2**32, 2**33, 2**63 - 1, -1, -(2**63))]
    draws += [lgd.philox_normal((4, 4), 0, stream=stream) for stream in (STREAM_STEP, STREAM_TARGETS, 2**32 - 1)]
    draws += [lgd.philox_normal((4, 4), 0, first_sample=first) for first in (4, 2**31)]
    numbers = torch.cat(draws).flatten()
    assert numbers.unique().numel() == numbers.numel()
    assert torch.equal(lgd.philox_normal((4, 4), 0, stream=STREAM_USER), draws[0])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 0, 5)])
def test_empty(shape):
    assert lgd.philox_normal(shape, 1).shape == normal(shape, 1, 0, 0, torch.device("cpu")).shape == shape


# Statistics of fixed seeds. They hold or fail for good: a limit of 4 standard errors is no flaky test.
COUNT = 1 << 18


@pytest.fixture(scope="module", params=[(1, COUNT), (COUNT, 1)], ids=["along elements", "along samples"])
def drawn(request):
    return lgd.philox_normal(request.param, 20251000815).flatten().double().numpy()


@pytest.mark.parametrize(("power", "mean", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)])
def test_moments(drawn, power, mean, variance):
    assert abs((drawn**power).mean() - mean) < 4 * math.sqrt(variance / COUNT)


def test_distribution(drawn):
    """Kolmogorov-Smirnov at 1 %, each of the four lanes by itself too."""
    for values in (drawn, *(drawn[lane::4] for lane in range(4))):
        below = 0.5 * (1 + torch.erf(torch.from_numpy(np.sort(values)) / math.sqrt(2))).numpy()
        steps = np.arange(len(values) + 1) / len(values)
        distance = max((below - steps[:-1]).max(), (steps[1:] - below).max())
        assert distance < 1.63 / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"seed": 3}, {"seed": 4}),
        ({"seed": 3}, {"seed": 3 + (1 << 32)}),
        ({"seed": 3}, {"seed": 3, "stream": STREAM_STEP}),
        ({"seed": 3, "stream": STREAM_STEP}, {"seed": 3, "stream": STREAM_TARGETS}),
        ({"seed": 3}, {"seed": 3, "first_sample": 1}),
    ],
    ids=["seeds", "high seeds", "streams", "step and targets", "samples"],
)
def test_draws_do_not_correlate(first, second):
    a, b = (lgd.philox_normal((1, COUNT), **options).double() for options in (first, second))
    for one, other in ((a, b), (a.abs(), b.abs()), (a**2, b**2)):
        assert abs(np.corrcoef(one.numpy(), other.numpy())[0, 1]) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 1024])
def test_neighbours_do_not_correlate(drawn, distance):
    """The lanes of a quad among them: cos and sin of one radius, whose squares must not correlate either."""
    for values in (drawn, drawn**2):
        assert abs(np.corrcoef(values[:-distance], values[distance:])[0, 1]) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("shape", [(7, 8200), (1, 100_003), (70_000, 1)])
def test_same_bits_on_any_thread_count(shape):
    torch.set_num_threads(1)
    one = lgd.philox_normal(shape, 5)
    torch.set_num_threads(2)
    assert torch.equal(lgd.philox_normal(shape, 5), one)


def test_compiles_for_every_seed():
    """Seeds are taken whole (one cut to its low 32 bits draws other noise), and a new seed compiles nothing new."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda seed: lgd.philox_normal((3, 5), seed), fullgraph=True, backend=count)
    for seed in (3, 4, 5, 6, -1, 2**40 + 1, 2**62 + 3):
        assert_same_normals(compiled(seed), lgd.philox_normal((3, 5), seed))
        assert_same_normals(compiled(torch.tensor(seed)), lgd.philox_normal((3, 5), seed))
    assert len(graphs) <= 3  # the first number, every number, every tensor


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), 1), ValueError, r"`shape` is \(\), expected \(B, ...\)"),
        ((5, 1), ValueError, r"`shape` is 5, expected \(B, ...\)"),
        (((2, -3), 1), ValueError, r"`shape` is \(2, -3\), expected .*, integers of 0 or more"),
        (((2, 3), 1.0), TypeError, r"`seed` is a float, expected an int or an int64 tensor"),
        (((2, 3), True), TypeError, r"`seed` is a bool"),
        (((2, 3), 2**63), ValueError, r"`seed` is 9223372036854775808, expected a value in \[-2\^63, 2\^63\)"),
        (((2, 3), torch.tensor(1, dtype=torch.int32)), TypeError, r"`seed` has dtype torch.int32, expected int64"),
        (((2, 3), torch.tensor([1, 2, 3])), ValueError, r"`seed` has shape \[3\], expected \[\] .* or \[B\] = \[2\]"),
        (((2, 3), torch.tensor([[1], [2]])), ValueError, r"`seed` has shape \[2, 1\]"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=f"philox_normal: {message}"):
        lgd.philox_normal(*arguments)


@pytest.mark.parametrize("first_sample", [1.0, True, torch.tensor(1)])
def test_refuses_first_samples(first_sample):
    with pytest.raises(TypeError, match="philox_normal: `first_sample` is a (float|bool|Tensor), expected an int"):
        lgd.philox_normal((2, 3), 1, first_sample=first_sample)


@pytest.mark.parametrize("stream", [-1, 2**32, 1.5])
def test_refuses_streams(stream):
    with pytest.raises(ValueError, match=rf"`stream` is {stream}, expected an integer from 0 to 2\^32 - 1"):
        lgd.philox_normal((2, 3), 1, stream=stream)
