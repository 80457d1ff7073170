#include <algorithm>

#include "../common/loops.h"
#include "../common/philox_cpu.h"
#include "guided_energy.h"

namespace lgd {
namespace {

constexpr int kTile =
    4;  // targets, or other particles, that one particle meets at a time: their sums fill the registers

// A block's particles, slopes and targets stay in the nearest cache, or in the next where they are many.
constexpr int64_t block_of(int64_t m, int64_t k) { return 2 * m + k <= 12 ? 512 : 256; }

template <class S>
struct Vector {
  typedef S type __attribute__((vector_size(32)));
  typedef S unaligned __attribute__((vector_size(32), aligned(sizeof(S)), may_alias));
  static constexpr int kLanes = 32 / sizeof(S);
};
template <class S>
LGD_INLINE const typename Vector<S>::unaligned& load(const S* from) {
  return *reinterpret_cast<const typename Vector<S>::unaligned*>(from);
}
template <class S>
LGD_INLINE double total(const typename Vector<S>::type& lanes) {
  S sum = 0;
  for (int i = 0; i < Vector<S>::kLanes; ++i) sum += lanes[i];
  return double(sum);
}

// P0 and P1 of one particle against K targets.
template <class S, int K>
LGD_CLONES void meet_targets(const S* x, const S* slope, const S* const* y, double* p0, double* p1, int64_t count) {
  typename Vector<S>::type square[K] = {}, along[K] = {};
  int64_t i = 0;
  for (; i + Vector<S>::kLanes <= count; i += Vector<S>::kLanes) {
    const typename Vector<S>::type at = load(x + i), g = load(slope + i);
    for (int k = 0; k < K; ++k) {
      const typename Vector<S>::type apart = at - load(y[k] + i);
      square[k] += apart * apart;
      along[k] += apart * g;
    }
  }
  for (int k = 0; k < K; ++k) {
    S rest_square = 0, rest_along = 0;
    for (int64_t j = i; j < count; ++j) {
      const S apart = x[j] - y[k][j];
      rest_square += apart * apart;
      rest_along += apart * slope[j];
    }
    p0[k] += total<S>(square[k]) + double(rest_square);
    p1[k] += total<S>(along[k]) + double(rest_along);
  }
}

// Q0, Q1 and Q2 of one particle against K others, `stride` apart in memory.
template <class S, int K>
LGD_CLONES void meet_particles(const S* x, const S* slope, const S* others, const S* slopes, int64_t stride, double* q0,
                               double* q1, double* q2, int64_t count) {
  typename Vector<S>::type square[K] = {}, along[K] = {}, turn[K] = {};
  int64_t i = 0;
  for (; i + Vector<S>::kLanes <= count; i += Vector<S>::kLanes) {
    const typename Vector<S>::type at = load(x + i), g = load(slope + i);
    for (int k = 0; k < K; ++k) {
      const typename Vector<S>::type apart = at - load(others + k * stride + i);
      const typename Vector<S>::type turned = g - load(slopes + k * stride + i);
      square[k] += apart * apart;
      along[k] += apart * turned;
      turn[k] += turned * turned;
    }
  }
  for (int k = 0; k < K; ++k) {
    S rest[3] = {};
    for (int64_t j = i; j < count; ++j) {
      const S apart = x[j] - others[k * stride + j], turned = slope[j] - slopes[k * stride + j];
      rest[0] += apart * apart;
      rest[1] += apart * turned;
      rest[2] += turned * turned;
    }
    q0[k] += total<S>(square[k]) + double(rest[0]);
    q1[k] += total<S>(along[k]) + double(rest[1]);
    q2[k] += total<S>(turn[k]) + double(rest[2]);
  }
}

// run(std::integral_constant<int, K>{}, first) over [0, count) in tiles of kTile, the last one smaller.
template <class Run>
LGD_INLINE void in_tiles(int64_t count, const Run& run) {
  int64_t first = 0;
  for (; first + kTile <= count; first += kTile) run(std::integral_constant<int, kTile>{}, first);
  switch (count - first) {
    case 3:
      return run(std::integral_constant<int, 3>{}, first);
    case 2:
      return run(std::integral_constant<int, 2>{}, first);
    case 1:
      return run(std::integral_constant<int, 1>{}, first);
  }
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

// Seen from the centre signal x0, in double: particles near it keep their distance whatever their norm.
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
LGD_CLONES void widen(S* to, const E* from, S factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = factor * S(to_float(from[i]));
}

template <class S>
LGD_CLONES double square_sum(const S* values, int64_t count) {
  return sum<S>(count, [](S value) LGD_LAMBDA { return value * value; }, values);
}

// One block: particles and slopes [m, block], and a pointer to each target's elements.
template <class S>
struct Block {
  S *x_s, *slope, *target, *buffers[4];
  float* drawn;
  int64_t block;

  Block(S* scratch, int64_t m, int64_t k) : block(block_of(m, k)) {
    x_s = scratch;
    slope = x_s + m * block;
    target = slope + m * block;
    for (int i = 0; i < 4; ++i) buffers[i] = target + (k + i) * block;
    drawn = reinterpret_cast<float*>(target + (k + 4) * block);
  }
};

template <class E, class S>
void fill_particles(const GuidedEnergy& op, const Block<S>& to, int64_t item, int64_t at, int64_t count) {
  const double churn = op.scalars.churn.template at<double>(item), omega = op.scalars.omega.template at<double>(item);
  const auto wide = step_coefficients<double>(op.scalars.levels, item, op.scalars.prediction, churn);
  const S a = S(wide.x), b = S(wide.guided), v = S(wide.noise);
  auto* const buffers = reinterpret_cast<E* const*>(to.buffers);
  const bool centred = op.kind != Targets::tensor;
  const E* x0 = centred ? read_block(op.target, item, at, count, buffers[3]) : nullptr;
  for (int64_t j = 0; j < op.m; ++j) {
    const int64_t row = item * op.m + j;
    S *x_s = to.x_s + j * to.block, *slope = to.slope + j * to.block;
    const E* x = read_block(op.x, row, at, count, buffers[0]);
    const E* cond = read_block(op.cond, row, at, count, buffers[1]);
    const E* uncond = read_block(op.uncond, row, at, count, buffers[2]);
    if (centred)
      guide_centred(x_s, slope, x, cond, uncond, x0, wide.x, wide.guided, omega, op.scalars.levels.at<double>(2, item),
                    count);
    else
      guide(x_s, slope, x, cond, uncond, a, b, S(omega), count);
    if (op.draws) {
      philox_fill(to.drawn, count, at, op.seed.key(item), op.seed.index(item, j, op.m), kStreamStep);
      add(x_s, to.drawn, v, count);
    } else if (op.noise.data) {
      add(x_s, read_block(op.noise, row, at, count, buffers[0]), v, count);
    }
  }
}

// The k targets of an item, as pointers; in place where they are stored as S.
template <class S>
void fill_targets(const GuidedEnergy& op, const Block<S>& to, int64_t item, int64_t at, int64_t count, const S** y) {
  for (int64_t k = 0; k < op.k; ++k) {
    S* buffer = to.target + k * to.block;
    y[k] = buffer;
    if (op.kind == Targets::tensor) {
      y[k] = read_block(op.target, item * op.k + k, at, count, buffer);
    } else if (op.kind == Targets::renoise) {
      const S noise = S(op.scalars.levels.at<double>(3, item));
      philox_fill(to.drawn, count, at, op.target_seed.key(item), op.target_seed.index(item, k, op.k), kStreamTargets);
      widen(buffer, to.drawn, noise, count);
    } else {
      std::fill(buffer, buffer + count, S(0));
    }
  }
}

}  // namespace

int64_t guided_energy_scratch(int64_t m, int64_t k) {
  // and, at the end, the pointers to the targets
  return (2 * m + k + 5) * block_of(m, k) + 2 * k;
}

template <class S>
void guided_energy(const GuidedEnergy& op, int64_t item, int64_t first, int64_t last, double* sums, S* scratch) {
  const int64_t m = op.m, k = op.k, pairs = op.pairs();
  const Block<S> block(scratch, m, k);
  const auto** y = reinterpret_cast<const S**>(scratch + (2 * m + k + 5) * block.block);
  double *p0 = sums, *p1 = p0 + m * k, *p2 = p1 + m * k, *q0 = p2 + m, *q1 = q0 + pairs, *q2 = q1 + pairs;
  for (int64_t at = first; at < last; at += block.block) {
    const int64_t count = std::min(last - at, block.block);
    with_elements<S>([&](auto element) { fill_particles<decltype(element)>(op, block, item, at, count); }, op.x,
                     op.cond, op.uncond, op.noise,
                     op.kind == Targets::tensor ? Rows{nullptr, DType::f32, 0} : op.target);
    fill_targets(op, block, item, at, count, y);
    int64_t pair = 0;
    for (int64_t j = 0; j < m; ++j) {
      const S *x_s = block.x_s + j * block.block, *slope = block.slope + j * block.block;
      in_tiles(k, [&](auto size, int64_t tile) {
        meet_targets<S, size>(x_s, slope, y + tile, p0 + j * k + tile, p1 + j * k + tile, count);
      });
      p2[j] += square_sum(slope, count);
      in_tiles(m - 1 - j, [&](auto size, int64_t tile) {
        const int64_t offset = (1 + tile) * block.block;
        meet_particles<S, size>(x_s, slope, x_s + offset, slope + offset, block.block, q0 + pair + tile,
                                q1 + pair + tile, q2 + pair + tile, count);
      });
      pair += m - 1 - j;
    }
  }
}

template void guided_energy<float>(const GuidedEnergy&, int64_t, int64_t, int64_t, double*, float*);
template void guided_energy<double>(const GuidedEnergy&, int64_t, int64_t, int64_t, double*, double*);

namespace {

// The mean of P0^(beta/2), and of its slope beta P0^(beta/2 - 1) P1. A pair that coincides adds nothing.
Energy mean_power(const double* square, const double* along, int64_t count, double beta) {
  Energy sum{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (square[i] == 0) continue;
    const double power = std::pow(square[i], beta / 2);
    sum.loss += power;
    sum.slope += beta * power / square[i] * along[i];
  }
  return {sum.loss / double(count), sum.slope / double(count)};
}

}  // namespace

Energy guided_energy_finish(const GuidedEnergy& op, int64_t item, int64_t row, const double* statistics,
                            const EnergyOptions& options) {
  const int64_t m = op.m, k = op.k, pairs = op.pairs();
  const double *p0 = statistics, *p1 = p0 + m * k, *q0 = p1 + m * k + m, *q1 = q0 + pairs;
  Energy energy = mean_power(p0, p1, m * k, options.beta);
  if (op.kind == Targets::expected) {
    const double noise = op.scalars.levels.at<double>(3, item);
    energy.loss += noise * noise * double(row);
  }
  if (options.lam != 0 && pairs > 0) {
    const Energy repulsion = mean_power(q0, q1, pairs, options.beta);
    const double share = options.lam / 2 * (options.unbiased ? 1.0 : double(m - 1) / double(m));
    energy.loss -= share * repulsion.loss;
    energy.slope -= share * repulsion.slope;
  }
  return energy;
}

}  // namespace lgd
