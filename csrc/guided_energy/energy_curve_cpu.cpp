#include <algorithm>

#include "../common/power.h"
#include "energy_curve.h"

namespace lgd {
namespace {

constexpr int64_t kLanes = 8;    // a whole vector of any width: a shift's sum does not depend on its neighbours
constexpr int64_t kShifts = 64;  // looked at together: their sums stay in the nearest cache

// Adds a pair's share at each shift. Pairs that coincide have none, but for beta = 2, where the square has every
// derivative.
template <int Order>
LGD_INLINE void add_pair(double* to, const double* shifts, int64_t count, double a, double b, double c, double share,
                         double beta) {
  if (beta == 2) {
    for (int64_t i = 0; i < count; ++i) {
      const double d = shifts[i], square = a + d * (2 * b + d * c), half = b + d * c;
      to[i] += share * (Order == 0 ? square : 2 * (Order == 1 ? half : c + 0 * half));
    }
    return;
  }
  const Exponent<double> exponent(Order == 0 ? beta / 2 : beta / 2 - 1);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double d = shifts[i], half = b + d * c, square = a + d * (2 * b + d * c);
    const bool coincide = square < kCoincide<double>;  // NaN does not
    const double at = coincide ? 1.0 : square;
    double term = power(at, exponent);
    if (Order == 1) term *= beta * half;
    if (Order == 2) term *= beta * (c + (beta - 2) * half * half / at);
    to[i] += coincide ? 0.0 : share * (term + (at - at));  // NaN and infinity, which have no exponent, are NaN
  }
}

template <int Order>
LGD_CLONES void add_pairs(const EnergyCurve& curve, const double* statistics, const double* shifts, int64_t count,
                          double* to) {
  const int64_t m = curve.m, k = curve.k, pairs = m * (m - 1) / 2;
  const double *p0 = statistics, *p1 = p0 + m * k, *p2 = p1 + m * k, *q0 = p2 + m, *q1 = q0 + pairs, *q2 = q1 + pairs;
  for (int64_t i = 0; i < m * k; ++i)
    add_pair<Order>(to, shifts, count, p0[i], p1[i], p2[i / k], 1 / double(m * k), curve.beta);
  if (curve.lam == 0) return;
  const double repulsion = -curve.lam / 2 * (curve.unbiased ? 1.0 : double(m - 1) / double(m)) / double(pairs);
  for (int64_t i = 0; i < pairs; ++i) add_pair<Order>(to, shifts, count, q0[i], q1[i], q2[i], repulsion, curve.beta);
}

}  // namespace

void energy_curve(const EnergyCurve& curve, const double* statistics, const double* shifts, int64_t count,
                  double* found) {
  const auto add = curve.order == 0 ? add_pairs<0> : curve.order == 1 ? add_pairs<1> : add_pairs<2>;
  for (int64_t at = 0; at < count; at += kShifts) {
    const int64_t some = std::min(kShifts, count - at);
    alignas(64) double here[kShifts] = {}, sums[kShifts] = {};
    std::copy(shifts + at, shifts + at + some, here);
    add(curve, statistics, here, (some + kLanes - 1) / kLanes * kLanes, sums);
    std::copy(sums, sums + some, found + at);
  }
}

}  // namespace lgd
