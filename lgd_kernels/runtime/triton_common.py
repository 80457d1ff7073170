"""Device functions that the Triton kernels share: noise, omega in a table, the coefficients of a step, tiles.

The formulas are those of `csrc/common/philox.h` and `levels.h`. `philox.py` and `levels.py` specify them.

What follows a `return` inside an `if` is compiled too, even where the condition is a constexpr. The place of an absent
tensor is held by one of another dtype, so what reads it stands in the other branch, never after the `if`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Compute Philox4x32-10 on uint32 tensors of one shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """Return (word + 1/2) 2^-32, below 1."""
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return tl.minimum(u, 0.99999994)


@triton.jit
def _log(u):
    """Return ln u for 0 < u < 1, from u = 2^e (1 + f) and ln(1 + f) = f + f^2 P(f). (No libdevice when interpreted.)"""
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # sqrt(1/2)
    e = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.0873475968837738 - 0.14307497441768646
    p = p * f + 0.14917992055416107
    p = p * f - 0.1657051295042038
    p = p * f + 0.19962070882320404
    p = p * f - 0.25001755356788635
    p = p * f + 0.33333951234817505
    p = p * f - 0.49999991059303284
    return e * 0.6931471805599453 + (f + f * f * p)


@triton.jit
def _turn(u):
    """Return (cos, sin) of u turns. The nearest quarter turn is subtracted exactly: the angle keeps every bit of u."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    f = u - quarter.to(tl.float32) * 0.25
    square = f * f
    c = square * 59.2459602355957 - 85.44374084472656
    c = c * square + 64.93932342529297
    c = c * square - 19.739208221435547
    c = c * square + 1.0
    s = square * -75.39356231689453 + 81.59235382080078
    s = s * square - 41.3416633605957
    s = (s * square + 6.2831854820251465) * f
    odd = (quarter & 1) != 0
    along, across = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -along, along), tl.where((quarter & 2) != 0, -across, across)


@triton.jit
def _box_muller(word0, word1):
    r = tl.sqrt(-2.0 * _log(_uniform(word0)))
    cosine, sine = _turn(_uniform(word1))
    return r * cosine, r * sine


@triton.jit
def philox_quads(key_low, key_high, sample, stream, quads, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Draw normals [ROWS, 4 COLUMNS] for quads of elements (int64). Quads, key and sample (uint32) broadcast to
    [ROWS, COLUMNS]."""
    nothing = tl.zeros((ROWS, COLUMNS), tl.uint32)
    w0, w1, w2, w3 = philox(
        nothing + quads.to(tl.uint32),
        nothing + (quads >> 32).to(tl.uint32),
        nothing + sample,
        nothing + stream,
        nothing + key_low,
        nothing + key_high,
    )
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (ROWS, 4 * COLUMNS))  # lanes side by side: [.., 2, 2]


@triton.jit
def philox_tile(key_low, key_high, sample, stream, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Draw normals [ROWS, BLOCK] for elements `first` to `first + BLOCK`, multiples of 4. Key and sample are [ROWS]
    uint32."""
    quads = (first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
    return philox_quads(key_low[:, None], key_high[:, None], sample[:, None], stream, quads[None, :], ROWS, BLOCK // 4)


@triton.jit
def number_at(number, rows, mask):
    """Return a number for each row, float32. `number` is (tensor, stride) or (None, value)."""
    if number[0] is None:
        return tl.zeros_like(rows).to(tl.float32) + number[1]
    else:
        return tl.load(number[0] + rows * number[1], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def keys_of(seeds, seed_low, seed_high, first_sample, rows, mask):
    """Return key (low, high) and sample index of each row, uint32. With a seed for each sample the index is 0."""
    if seed_low is not None:
        nothing = tl.zeros_like(rows).to(tl.uint32)
        return nothing + seed_low.to(tl.uint32), nothing + seed_high.to(tl.uint32), (first_sample + rows).to(tl.uint32)
    else:
        key = tl.load(seeds[0] + rows * seeds[1], mask=mask, other=0)
        sample = tl.where(seeds[1] == 0, first_sample + rows, 0)
        return key.to(tl.uint32), (key >> 32).to(tl.uint32), sample.to(tl.uint32)


@triton.jit
def _bracket(knots, count, at):
    """Return the knot at or left of each point, and the weight of the next knot."""
    index = tl.arange(0, knots.shape[0])
    left = tl.sum(((knots[None, :] <= at[:, None]) & (index < count)[None, :]).to(tl.int32), 1) - 1
    left = tl.maximum(tl.minimum(left, count - 2), 0)
    low = tl.sum(tl.where(index[None, :] == left[:, None], knots[None, :], 0.0), 1)
    high = tl.sum(tl.where(index[None, :] == left[:, None] + 1, knots[None, :], 0.0), 1)
    weight = tl.minimum(tl.maximum(tl.where(count > 1, (at - low) / (high - low), 0.0), 0.0), 1.0)
    return left, tl.where(at == at, weight, float("nan")).to(tl.float32)


@triton.jit
def _corner(values, s_knots, t_knots, rows_count, columns_count, item, row, column, mask):
    """Replace a corner with s >= t by the last row before the diagonal, in the first column that has such a row."""
    s_index, t_index = tl.arange(0, s_knots.shape[0]), tl.arange(0, t_knots.shape[0])
    first_s = tl.sum(tl.where(s_index == 0, s_knots, 0.0), 0)
    first_column = tl.sum(((t_knots <= first_s) & (t_index < columns_count)).to(tl.int32), 0)
    column = tl.maximum(tl.minimum(column, columns_count - 1), tl.minimum(first_column, columns_count - 1))
    t = tl.sum(tl.where(t_index[None, :] == column[:, None], t_knots[None, :], 0.0), 1)
    before = (s_knots[None, :] < t[:, None]) & (s_index < rows_count)[None, :]
    row = tl.minimum(row, tl.maximum(tl.sum(before.to(tl.int32), 1) - 1, 0))
    return tl.load(values + (item * rows_count + row) * columns_count + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _table_omega(
    values, s_knots, t_knots, c, s, t, conditions, rows_count, columns_count, rows, mask,
    KNOTS_S: tl.constexpr, KNOTS_T: tl.constexpr,
):  # fmt: skip
    """Interpolate linearly in s and t, clamped to the table. A condition outside the table gives NaN."""
    s_index, t_index = tl.arange(0, KNOTS_S), tl.arange(0, KNOTS_T)
    s_all = tl.load(s_knots + s_index, mask=s_index < rows_count, other=0.0)
    t_all = tl.load(t_knots + t_index, mask=t_index < columns_count, other=0.0)
    item = tl.load(c + rows, mask=mask, other=0)
    known = (item >= 0) & (item < conditions)
    item = tl.where(known, item, 0)
    row, dw = _bracket(s_all, rows_count, tl.load(s + rows, mask=mask, other=0.0))
    column, dv = _bracket(t_all, columns_count, tl.load(t + rows, mask=mask, other=0.0))
    w00 = _corner(values, s_all, t_all, rows_count, columns_count, item, row, column, mask)
    w01 = _corner(values, s_all, t_all, rows_count, columns_count, item, row, column + 1, mask)
    w10 = _corner(values, s_all, t_all, rows_count, columns_count, item, row + 1, column, mask)
    w11 = _corner(values, s_all, t_all, rows_count, columns_count, item, row + 1, column + 1, mask)
    found = (1 - dw) * ((1 - dv) * w00 + dv * w01) + dw * ((1 - dv) * w10 + dv * w11)
    return tl.where(known, found, float("nan"))


@triton.jit
def omega_at(omega, KNOTS: tl.constexpr, rows, mask):
    """Return omega for each row. `omega` is a number, or a table if KNOTS gives the size of its axes, padded."""
    if KNOTS is None:
        return number_at(omega, rows, mask)
    else:
        return _table_omega(*omega, rows, mask, KNOTS[0], KNOTS[1])


@triton.jit
def _divide(a, b):
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b  # `/` alone is 2 ulp off in float32


@triton.jit
def _root(a):
    return tl.sqrt_rn(a) if a.dtype == tl.float32 else tl.sqrt(a)


@triton.jit
def step_coefficients(
    signal_t, noise_t, signal_s, noise_s, gap, stride, churn, rows, mask, PREDICTION: tl.constexpr,
    WIDE: tl.constexpr = False,
):  # fmt: skip
    """Return x, guided and noise of x_s = x * x_t + guided * g + noise * z for each row.

    They are computed in the dtype of the levels and returned in float32; with WIDE both are float64."""
    a, n = (
        tl.load(signal_t + rows * stride, mask=mask, other=1.0),
        tl.load(noise_t + rows * stride, mask=mask, other=1.0),
    )
    to_signal = tl.load(signal_s + rows * stride, mask=mask, other=1.0)
    to_noise = tl.load(noise_s + rows * stride, mask=mask, other=1.0)
    d = tl.load(gap + rows * stride, mask=mask, other=0.0)
    if WIDE:
        a, n, d = a.to(tl.float64), n.to(tl.float64), d.to(tl.float64)
        to_signal, to_noise = to_signal.to(tl.float64), to_noise.to(tl.float64)
    churn = churn.to(d.dtype)
    defined = (d >= 0) & (churn >= 0) & (churn <= 1)
    stays = d == 0  # 0/0 at s = t = 0 and at s = t = 1
    q = tl.where(stays, 0.0, _divide(d, tl.where(stays, 1.0, to_signal * n).to(d.dtype))).to(d.dtype)
    data = n == 0
    ratio = tl.where(data, 1.0, _divide(to_noise, tl.where(data, 1.0, n).to(d.dtype))).to(d.dtype)
    churned = churn * churn * q
    to_x = ratio * (1 - churned)
    to_x0 = to_signal * (q + churned * (1 - q))
    noise = to_noise * _root(churned * (2 - churned))
    if PREDICTION == "x0":
        x, guided = to_x, to_x0
    elif PREDICTION == "eps":
        defined = defined & (a != 0)
        x, guided = to_x + _divide(to_x0, a), _divide(-to_x0 * n, a)
    elif PREDICTION == "v":
        square = a * a + n * n
        x, guided = to_x + _divide(to_x0 * a, square), _divide(-to_x0 * n, _root(square))
    else:
        x, guided = to_x + _divide(to_x0, a + n), _divide(-to_x0 * n, a + n)
    nan = float("nan")
    x, guided, noise = tl.where(defined, x, nan), tl.where(defined, guided, nan), tl.where(defined, noise, nan)
    if WIDE:
        return x, guided, noise
    else:
        return x.to(tl.float32), guided.to(tl.float32), noise.to(tl.float32)


@triton.jit
def column_blocks(row, BLOCK: tl.constexpr):
    """Return the number of blocks of a sample, in 64 bits: row + BLOCK may exceed 2^31. (A row of 1 is a constexpr,
    without a method `to`.)"""
    return tl.cdiv(tl.cast(row, tl.int64), BLOCK)


@triton.jit
def tile(batch, row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's samples [ROWS] (int64), which of them exist, its first element (int64), columns [BLOCK]."""
    blocks = column_blocks(row, BLOCK).to(tl.int32)
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (program % blocks).to(tl.int64) * BLOCK
    return rows, rows < batch, first, tl.arange(0, BLOCK)


@triton.jit
def load_tile(data, stride, rows, first, columns, mask):
    return tl.load(data + rows[:, None] * stride + first + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(data, stride, rows, first, columns, mask, value):
    tl.store(data + rows[:, None] * stride + first + columns[None, :], value.to(data.dtype.element_ty), mask=mask)


@triton.jit
def _joined(tensors, COUNT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Join tensors i and i + COUNT, [LANES, WIDTH] each, to one of [LANES, 2 WIDTH]."""
    pairs = ()
    for i in tl.static_range(COUNT):
        pairs += (tl.reshape(tl.join(tensors[i], tensors[i + COUNT]), (LANES, 2 * WIDTH)),)
    return pairs


@triton.jit
def lane_totals(sums, COUNT: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr):
    """Return [2^LEVELS]: COUNT sums over lanes, then zeros. Joined before they are summed, they need one reduction over
    threads instead of COUNT."""
    for _ in tl.static_range((1 << LEVELS) - COUNT):
        sums += (tl.zeros((LANES,), tl.float32),)
    for level in tl.static_range(LEVELS):
        sums = _joined(sums, 1 << (LEVELS - 1 - level), LANES, 1 << level)
    return tl.sum(sums[0], 0)


@triton.jit
def power_of(a, exponent):
    """Return a^exponent for finite a > 0 in float64, to 1e-13, as 2^(exponent log2 a) by series."""
    bits = a.to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD  # sqrt(1/2)
    f = ((bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).to(tl.float64, bitcast=True)  # a = 2^e f
    inverse = (1.0 / (f + 1).to(tl.float32)).to(tl.float64)  # a float64 division is a call, for which registers spill
    s = (f - 1) * inverse
    s += (f - 1 - s * (f + 1)) * inverse
    series = tl.zeros_like(f)
    for i in tl.static_range(15, 0, -2):
        series = series * s * s + 1.0 / i
    at = exponent * ((bits >> 52).to(tl.float64) + s * series * 2.8853900817779268)  # 2 / ln 2
    n = tl.floor(at + 0.5)
    r = (at - n) * 0.6931471805599453
    series = tl.zeros_like(r) + 1.0
    for i in tl.static_range(12, 0, -1):
        series = 1.0 + series * r * (1.0 / i)
    return series * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
