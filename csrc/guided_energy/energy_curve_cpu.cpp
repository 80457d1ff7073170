#include <algorithm>

#include "../common/power.h"
#include "energy_curve.h"

namespace lgd {
namespace {

constexpr int kLanes = 8;   // pairs side by side, a whole vector of any width: a power is a dependency chain
constexpr int kTerms = 64;  // pairs processed for all shifts before the next ones

struct Terms {
  alignas(64) double a[kTerms], b[kTerms], c[kTerms], share[kTerms];
  int64_t count = 0;

  void push(double at_0, double along, double across, double weight) {
    a[count] = at_0, b[count] = along, c[count] = across, share[count++] = weight;
  }
};

// Adds the shares of some pairs at each shift, the pairs of a lane in their order. Pairs that coincide add nothing,
// except for beta = 2, where the square has every derivative.
template <int Order>
LGD_CLONES void add_terms(const Terms& of, const double* shifts, int64_t count, double beta, double (*sums)[kLanes]) {
  const Exponent<double> exponent(Order == 0 ? beta / 2 : beta / 2 - 1);
  alignas(64) double share[kTerms];
  for (int64_t i = 0; i < count; ++i) {
    const double d = shifts[i];
    if (beta == 2)
      for (int64_t j = 0; j < of.count; ++j) {
        const double square = of.a[j] + d * (2 * of.b[j] + d * of.c[j]), half = of.b[j] + d * of.c[j];
        share[j] = of.share[j] * (Order == 0 ? square : 2 * (Order == 1 ? half : of.c[j] + 0 * half));
      }
    else
#pragma omp simd
      for (int64_t j = 0; j < of.count; ++j) {
        const double half = of.b[j] + d * of.c[j], square = of.a[j] + d * (2 * of.b[j] + d * of.c[j]);
        const bool coincide = square < kCoincide<double>;  // NaN does not
        const double at = coincide ? 1.0 : square;
        double term = power(at, exponent);
        if (Order == 1) term *= beta * half;
        if (Order == 2) term *= beta * (of.c[j] + (beta - 2) * half * half / at);
        // NaN and infinity, which have no exponent, are NaN
        share[j] = coincide ? 0.0 : of.share[j] * (term + (at - at));
      }
    for (int64_t j = 0; j < of.count; j += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) sums[i][lane] += share[j + lane];
  }
}

// Calls add(terms) for all pairs of an item, padded with pairs of share 0.
template <class Add>
void for_terms(const EnergyDerivative& of, const double* statistics, const Add& add) {
  const int64_t m = of.m, k = of.k, pairs = m * (m - 1) / 2, others = of.options.lam == 0 ? 0 : pairs;
  const double *p0 = statistics, *p1 = p0 + m * k, *p2 = p1 + m * k, *q0 = p2 + m, *q1 = q0 + pairs, *q2 = q1 + pairs;
  const double repulsion =
      -of.options.lam / 2 * (of.options.unbiased ? 1.0 : double(m - 1) / double(m)) / double(pairs);
  Terms terms;
  const auto push = [&](double a, double b, double c, double share) {
    terms.push(a, b, c, share);
    if (terms.count == kTerms) add(terms), terms.count = 0;
  };
  for (int64_t i = 0; i < m * k; ++i) push(p0[i], p1[i], p2[i / k], 1 / double(m * k));
  for (int64_t i = 0; i < others; ++i) push(q0[i], q1[i], q2[i], repulsion);
  while (terms.count % kLanes != 0) terms.push(1, 0, 0, 0);
  if (terms.count) add(terms);
}

}  // namespace

void energy_curve(const EnergyDerivative& of, const double* statistics, const double* shifts, int64_t count,
                  double* found) {
  const auto add = of.order == 0 ? add_terms<0> : of.order == 1 ? add_terms<1> : add_terms<2>;
  for (int64_t at = 0; at < count; at += kCurveShifts) {
    const int64_t some = std::min(kCurveShifts, count - at);
    alignas(64) double sums[kCurveShifts][kLanes] = {};
    for_terms(of, statistics, [&](const Terms& terms) { add(terms, shifts + at, some, of.options.beta, sums); });
    for (int64_t i = 0; i < some; ++i)
      found[at + i] = ((sums[i][0] + sums[i][4]) + (sums[i][2] + sums[i][6])) +
                      ((sums[i][1] + sums[i][5]) + (sums[i][3] + sums[i][7]));
  }
}

}  // namespace lgd
