#include <algorithm>

#include "../common/loops.h"
#include "../common/philox_cpu.h"
#include "../common/vectors.h"
#include "guided_energy.h"

namespace lgd {
namespace {

constexpr int kTile = 4;  // targets, or other particles, of a particle at a time: their sums fill the registers
constexpr int64_t kSpan = kEnergySpan;

// Sets totals[i] to the sum of all lanes of sums[i].
template <class V, int N>
LGD_INLINE void add_lanes(const V (&sums)[N], V& totals) {
  for (int i = 0; i < N; ++i) {
    totals[i] = sums[i][0];
    for (int lane = 1; lane < N; ++lane) totals[i] += sums[i][lane];
  }
}

#ifdef LGD_HAS_CLONES
typedef Vector<float>::type Floats;
typedef Vector<double>::type Doubles;

// Does the same by folding pairs of vectors into one: 21 instructions for eight sums.
LGD_INLINE void add_lanes(const Floats (&sums)[8], Floats& totals) {
  Floats halves[4], quarters[2];
  for (int i = 0; i < 4; ++i)
    halves[i] = __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
                __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  for (int i = 0; i < 2; ++i)
    quarters[i] = __builtin_shufflevector(halves[2 * i], halves[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                  __builtin_shufflevector(halves[2 * i], halves[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  totals = __builtin_shufflevector(quarters[0], quarters[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(quarters[0], quarters[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
LGD_INLINE void add_lanes(const Doubles (&sums)[4], Doubles& totals) {
  Doubles halves[2];
  for (int i = 0; i < 2; ++i)
    halves[i] = __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 0, 4, 2, 6) +
                __builtin_shufflevector(sums[2 * i], sums[2 * i + 1], 1, 5, 3, 7);
  totals = __builtin_shufflevector(halves[0], halves[1], 0, 1, 4, 5) +
           __builtin_shufflevector(halves[0], halves[1], 2, 3, 6, 7);
}
#endif

// Adds the lanes of sums[i] to to[i].
template <class V, int N>
LGD_INLINE void add_totals(double* to, const V (&sums)[N]) {
  constexpr int kLanes = sizeof(V) / sizeof(sums[0][0]);
  for (int first = 0; first < N; first += kLanes) {
    V some[kLanes] = {}, totals;
    for (int i = 0; i < kLanes && first + i < N; ++i) some[i] = sums[first + i];
    add_lanes(some, totals);
    for (int i = 0; i < kLanes && first + i < N; ++i) to[first + i] += double(totals[i]);
  }
}

// Rows to prefetch for the next span: the hardware prefetcher sees no stream in so many short runs.
struct Ahead {
  const char* at[4];
  int64_t size;

  LGD_INLINE void fetch(int64_t i) const {
    for (const char* row : at) __builtin_prefetch(row + i * size, 0, 2);
  }
};

// Adds P0 and P1 of one particle and K targets. Elements come in whole vectors.
template <class S, int K>
LGD_CLONES void meet_targets(const S* x, const S* slope, const S* const* y, double* p0, double* p1, int64_t count,
                             const Ahead& ahead) {
  constexpr int kLanes = Vector<S>::kLanes;
  typename Vector<S>::type sums[2 * K] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const typename Vector<S>::type at = load(x + i), g = load(slope + i);
    for (int k = 0; k < K; ++k) {
      const typename Vector<S>::type apart = at - load(y[k] + i);
      sums[k] += apart * apart;
      sums[K + k] += apart * g;
    }
    ahead.fetch(i);
  }
  double found[2 * K] = {};
  add_totals(found, sums);
  for (int k = 0; k < K; ++k) {
    p0[k] += found[k];
    p1[k] += found[K + k];
  }
}

// Adds Q0, Q1 and Q2 of one particle and K others, which follow one another.
template <class S, int K>
LGD_CLONES void meet_particles(const S* x, const S* slope, const S* others, const S* slopes, double* q0, double* q1,
                               double* q2, int64_t count) {
  constexpr int kLanes = Vector<S>::kLanes;
  typename Vector<S>::type sums[3 * K] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const typename Vector<S>::type at = load(x + i), g = load(slope + i);
    for (int k = 0; k < K; ++k) {
      const typename Vector<S>::type apart = at - load(others + k * kSpan + i);
      const typename Vector<S>::type turned = g - load(slopes + k * kSpan + i);
      sums[k] += apart * apart;
      sums[K + k] += apart * turned;
      sums[2 * K + k] += turned * turned;
    }
  }
  double found[3 * K] = {};
  add_totals(found, sums);
  for (int k = 0; k < K; ++k) {
    q0[k] += found[k];
    q1[k] += found[K + k];
    q2[k] += found[2 * K + k];
  }
}

// Adds P2 of K particles, which follow one another.
template <class S, int K>
LGD_CLONES void add_squares(const S* slopes, double* p2, int64_t count) {
  typename Vector<S>::type sums[K] = {};
  for (int64_t i = 0; i < count; i += Vector<S>::kLanes)
    for (int k = 0; k < K; ++k) {
      const typename Vector<S>::type value = load(slopes + k * kSpan + i);
      sums[k] += value * value;
    }
  add_totals(p2, sums);
}

// Calls run(std::integral_constant<int, count>{}), with Most if that is less.
template <int Most, class Run>
LGD_INLINE void with_size(int64_t count, const Run& run) {
  if constexpr (Most > 1)
    if (count < Most) return with_size<Most - 1>(count, run);
  run(std::integral_constant<int, Most>{});
}

template <class E, class S>
LGD_CLONES void guide(S* x_s, S* slope, const E* x, const E* cond, const E* uncond, S a, S b, S omega, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const S c = to_float(cond[i]), delta = c - S(to_float(uncond[i]));
    x_s[i] = a * S(to_float(x[i])) + b * (c + omega * delta);
    slope[i] = b * delta;
  }
}

// Subtracts the centre signal x0 in double: particles near it keep their distance whatever their norm.
template <class E, class S>
LGD_CLONES void guide_centred(S* x_s, S* slope, const E* x, const E* cond, const E* uncond, const E* x0, double a,
                              double b, double omega, double signal, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double c = to_float(cond[i]), delta = c - double(to_float(uncond[i]));
    x_s[i] = S(a * double(to_float(x[i])) + b * (c + omega * delta) - signal * double(to_float(x0[i])));
    slope[i] = S(b * delta);
  }
}

template <class E, class S>
LGD_CLONES void add(S* x_s, const E* z, S factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x_s[i] += factor * S(to_float(z[i]));
}

template <class E, class S>
LGD_CLONES void scaled(S* to, const E* from, S factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = factor * S(to_float(from[i]));
}

// A thread's memory: particles and slopes [m, kSpan], targets [k, kSpan], buffers, noise of either and, in the
// backward, the targets' gradients [k, kSpan].
template <class S>
struct Scratch {
  S *x_s, *slope, *target, *buffers[4], *to_target;
  float* drawn;
  const S** y;

  Scratch(S* from, const GuidedEnergy& op) {
    x_s = from;
    slope = x_s + op.m * kSpan;
    target = slope + op.m * kSpan;
    for (int i = 0; i < 4; ++i) buffers[i] = target + (op.target.k + i) * kSpan;
    drawn = reinterpret_cast<float*>(buffers[3] + kSpan);
    to_target = buffers[3] + (1 + std::max(op.m, op.target.k)) * kSpan;
    y = reinterpret_cast<const S**>(to_target + op.target.k * kSpan);
  }
};

// An item's scalars.
struct Item {
  int64_t index;
  StepCoefficients<double> step;
  double omega, signal, noise;

  Item(const GuidedEnergy& op, int64_t index) : index(index) {
    const double churn = op.scalars.churn.at<double>(index);
    step = step_coefficients<double>(op.scalars.levels, index, op.scalars.prediction, churn);
    omega = op.scalars.omega.at<double>(index);
    signal = op.scalars.levels.at<double>(2, index);
    noise = op.scalars.levels.at<double>(3, index);
  }
};

template <class E, class S>
void fill_particles(const GuidedEnergy& op, const Scratch<S>& to, const Item& item, int64_t at, int64_t count) {
  const auto& step = item.step;
  if (op.draws)
    philox_fill_rows(to.drawn, kSpan, op.m, count, at, op.seed.key(item.index), op.seed.index(item.index, 0, op.m),
                     kStreamStep);
  auto* const buffers = reinterpret_cast<E* const*>(to.buffers);
  const bool centred = op.target.kind != Targets::tensor;
  const E* x0 = centred ? read_block(op.target.data, item.index, at, count, buffers[3]) : nullptr;
  for (int64_t j = 0; j < op.m; ++j) {
    const int64_t row = item.index * op.m + j;
    S *x_s = to.x_s + j * kSpan, *slope = to.slope + j * kSpan;
    const E* x = read_block(op.x, row, at, count, buffers[0]);
    const E* cond = read_block(op.cond, row, at, count, buffers[1]);
    const E* uncond = read_block(op.uncond, row, at, count, buffers[2]);
    if (centred)
      guide_centred(x_s, slope, x, cond, uncond, x0, step.x, step.guided, item.omega, item.signal, count);
    else
      guide(x_s, slope, x, cond, uncond, S(step.x), S(step.guided), S(item.omega), count);
    if (op.draws) {
      add(x_s, to.drawn + j * kSpan, S(step.noise), count);
    } else if (op.noise.data) {
      add(x_s, read_block(op.noise, row, at, count, buffers[0]), S(step.noise), count);
    }
  }
}

// Sets pointers to the k targets of an item: in place if they are stored as S and fill whole vectors.
template <class S>
void fill_targets(const GuidedEnergy& op, const Scratch<S>& to, const Item& item, int64_t at, int64_t count,
                  int64_t whole) {
  if (op.target.kind == Targets::renoise)
    philox_fill_rows(to.drawn, kSpan, op.target.k, count, at, op.target.seed.key(item.index),
                     op.target.seed.index(item.index, 0, op.target.k), kStreamTargets);
  for (int64_t k = 0; k < op.target.k; ++k) {
    S* buffer = to.target + k * kSpan;
    to.y[k] = buffer;
    if (op.target.kind == Targets::tensor) {
      const S* found = read_block(op.target.data, item.index * op.target.k + k, at, count, buffer);
      if (count == whole)
        to.y[k] = found;
      else if (found != buffer)
        std::copy(found, found + count, buffer);
    } else if (op.target.kind == Targets::renoise) {
      scaled(buffer, to.drawn + k * kSpan, S(item.noise), count);
    } else {
      std::fill(buffer, buffer + count, S(0));
    }
    if (to.y[k] == buffer) std::fill(buffer + count, buffer + whole, S(0));
  }
}

// Returns the next span of particle j's rows, and of target j's.
inline Ahead ahead_of(const GuidedEnergy& op, const Item& item, int64_t j, int64_t next) {
  const int64_t size = op.x.dtype == DType::f64 ? 8 : op.x.dtype == DType::f32 ? 4 : 2;
  const auto in = [&](const Rows& rows, int64_t row) {
    return static_cast<const char*>(rows.data) + (row * rows.stride + next) * size;
  };
  const int64_t row = item.index * op.m + j;
  const bool has_target = op.target.kind == Targets::tensor && j < op.target.k;
  const char* x = in(op.x, row);
  return {{x, in(op.cond, row), in(op.uncond, row), has_target ? in(op.target.data, item.index * op.target.k + j) : x},
          size};
}

// Adds all pairs of a span: of every particle with a tile of targets, or of particles, then with the next tile.
template <class S>
void meet(const GuidedEnergy& op, const Scratch<S>& in, const Item& item, int64_t at, int64_t whole, double* sums) {
  const int64_t m = op.m, k = op.target.k, pairs = op.pairs();
  double *p0 = sums, *p1 = p0 + m * k, *p2 = p1 + m * k, *q0 = p2 + m, *q1 = q0 + pairs, *q2 = q1 + pairs;
  for (int64_t tile = 0; tile < k; tile += kTile)
    with_size<kTile>(k - tile, [&](auto size) {
      for (int64_t j = 0; j < m; ++j)
        meet_targets<S, size>(in.x_s + j * kSpan, in.slope + j * kSpan, in.y + tile, p0 + j * k + tile,
                              p1 + j * k + tile, whole, ahead_of(op, item, j, at + kSpan));
    });
  for (int64_t tile = 0; tile < m; tile += 2 * kTile)
    with_size<2 * kTile>(m - tile, [&](auto size) { add_squares<S, size>(in.slope + tile * kSpan, p2 + tile, whole); });
  for (int64_t tile = 0; tile < m; tile += kTile)
    for (int64_t j = 0; j < std::min(tile + kTile, m) - 1; ++j) {
      const int64_t first = std::max(tile, j + 1), last = std::min(tile + kTile, m);
      const int64_t pair = j * m - j * (j + 1) / 2 + first - j - 1, other = first * kSpan;
      with_size<kTile>(last - first, [&](auto size) {
        meet_particles<S, size>(in.x_s + j * kSpan, in.slope + j * kSpan, in.x_s + other, in.slope + other, q0 + pair,
                                q1 + pair, q2 + pair, whole);
      });
    }
}

// Adds weight (from - other) to `to`, and its opposite to `back`.
template <class S>
LGD_CLONES void pull(S* to, S* back, const S* from, const S* other, S weight, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const S force = weight * (from[i] - other[i]);
    to[i] += force;
    back[i] -= force;
  }
}

template <class S>
void put(const Rows& rows, int64_t row, int64_t at, int64_t count, const S* values, double factor, S* buffer) {
  if (!rows.data) return;
  S* out = open_block(rows, row, at, buffer);
  scale(out, values, S(factor), count);
  write_block(rows, row, at, count, out);
}

}  // namespace

int64_t guided_energy_scratch(const GuidedEnergy& op) {
  return (2 * op.m + 2 * op.target.k + 4 + std::max(op.m, op.target.k)) * kSpan + 2 * op.target.k;
}

template <class S>
void guided_energy(const GuidedEnergy& op, int64_t item, int64_t first, int64_t last, double* sums, S* scratch) {
  constexpr int kLanes = Vector<S>::kLanes;
  const Scratch<S> in(scratch, op);
  const Item numbers(op, item);
  const Rows x0 = op.target.kind == Targets::tensor ? Rows{nullptr, DType::f32, 0} : op.target.data;
  for (int64_t at = first; at < last; at += kSpan) {
    const int64_t count = std::min(last - at, kSpan), whole = (count + kLanes - 1) / kLanes * kLanes;
    with_elements<S>([&](auto element) { fill_particles<decltype(element)>(op, in, numbers, at, count); }, op.x,
                     op.cond, op.uncond, op.noise, x0);
    for (int64_t j = 0; j < op.m && count < whole; ++j) {
      std::fill(in.x_s + j * kSpan + count, in.x_s + j * kSpan + whole, S(0));
      std::fill(in.slope + j * kSpan + count, in.slope + j * kSpan + whole, S(0));
    }
    fill_targets(op, in, numbers, at, count, whole);
    meet(op, in, numbers, at, whole, sums);
  }
}

template <class S>
void guided_energy_backward(const GuidedEnergyBackward& op, int64_t item, int64_t first, int64_t last, S* scratch) {
  const GuidedEnergy& forward = op.forward;
  const int64_t m = forward.m, k = forward.target.k;
  const Scratch<S> in(scratch, forward);
  const Item numbers(forward, item);
  const double *weight = op.to_targets + item * m * k, *between = op.to_particles + item * forward.pairs();
  const bool made = forward.target.kind != Targets::tensor;
  S *to_x = in.slope, *to_y = in.to_target;  // gradients to x_s and y
  for (int64_t at = first; at < last; at += kSpan) {
    const int64_t count = std::min(last - at, kSpan);
    fill_particles<S>(forward, in, numbers, at, count);
    fill_targets(forward, in, numbers, at, count, count);
    std::fill(to_x, to_x + m * kSpan, S(0));
    std::fill(to_y, to_y + k * kSpan, S(0));
    for (int64_t j = 0, pair = 0; j < m; ++j) {
      const S* x_s = in.x_s + j * kSpan;
      for (int64_t t = 0; t < k; ++t)
        pull(to_x + j * kSpan, to_y + t * kSpan, x_s, in.y[t], S(weight[j * k + t]), count);
      for (int64_t l = j + 1; l < m; ++l, ++pair)
        pull(to_x + j * kSpan, to_x + l * kSpan, x_s, in.x_s + l * kSpan, S(between[pair]), count);
    }
    const double guided = numbers.step.guided, omega = numbers.omega;
    for (int64_t j = 0; j < m; ++j) {
      const int64_t row = item * m + j;
      const S* values = to_x + j * kSpan;
      put(op.d_x, row, at, count, values, numbers.step.x, in.buffers[0]);
      put(op.d_cond, row, at, count, values, guided * (1 + omega), in.buffers[0]);
      put(op.d_uncond, row, at, count, values, -guided * omega, in.buffers[0]);
      put(op.d_noise, row, at, count, values, numbers.step.noise, in.buffers[0]);
    }
    for (int64_t t = 1; made && t < k; ++t)  // all to x0
      for (int64_t i = 0; i < count; ++i) to_y[i] += to_y[t * kSpan + i];
    for (int64_t t = 0; t < (made ? 1 : k); ++t)
      put(op.d_target, made ? item : item * k + t, at, count, to_y + t * kSpan, made ? numbers.signal : 1.0,
          in.buffers[0]);
  }
}

template void guided_energy<float>(const GuidedEnergy&, int64_t, int64_t, int64_t, double*, float*);
template void guided_energy<double>(const GuidedEnergy&, int64_t, int64_t, int64_t, double*, double*);
template void guided_energy_backward<float>(const GuidedEnergyBackward&, int64_t, int64_t, int64_t, float*);
template void guided_energy_backward<double>(const GuidedEnergyBackward&, int64_t, int64_t, int64_t, double*);

}  // namespace lgd
