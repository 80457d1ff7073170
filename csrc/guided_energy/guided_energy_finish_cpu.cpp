#include <algorithm>

#include "../common/power.h"
#include "guided_energy.h"

namespace lgd {
namespace {

// Pairs whose powers are computed side by side: more than one vector, because a power is a dependency chain.
constexpr int64_t kTerms = 24;
constexpr int kLanes = 4;

struct Terms {
  alignas(64) double square[kTerms], along[kTerms], share[kTerms];
  int64_t count = 0;
};

// Pairs that coincide add nothing.
LGD_CLONES void add_terms(const Terms& of, double beta, Energy& energy) {
  const Exponent<double> exponent(beta / 2);
  double loss[kTerms], slope[kTerms];
#pragma omp simd
  for (int i = 0; i < kTerms; ++i) {
    const bool coincide = of.square[i] < kCoincide<double>;  // NaN does not
    const double at = coincide ? 1.0 : of.square[i];
    const double found = beta == 2 ? at : power(at, exponent) + (at - at);  // NaN and infinity, without exponent: NaN
    loss[i] = coincide ? 0.0 : of.share[i] * found;
    slope[i] = coincide ? 0.0 : of.share[i] * beta * found / at * of.along[i];
  }
  double losses[kLanes] = {}, slopes[kLanes] = {};  // side by side: an addition takes four cycles
  for (int i = 0; i < kTerms; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) losses[lane] += loss[i + lane], slopes[lane] += slope[i + lane];
  for (int lane = 0; lane < kLanes; ++lane) energy.loss += losses[lane], energy.slope += slopes[lane];
}

}  // namespace

Energy guided_energy_finish(const GuidedEnergy& op, int64_t item, int64_t row, const double* statistics,
                            const EnergyOptions& options) {
  Energy energy{guided_energy_variance(op, item, row), 0};
  const int64_t meetings = op.m * op.target.k, all = guided_energy_terms(op, options);
  Terms terms;
  // Pairs of one kind: `count` squares, then as many `along`, and one share.
  const auto add = [&](const double* square, int64_t count, double share) {
    for (int64_t first = 0, some; first < count; first += some) {
      some = std::min(count - first, kTerms - terms.count);
      std::copy_n(square + first, some, terms.square + terms.count);
      std::copy_n(square + count + first, some, terms.along + terms.count);
      std::fill_n(terms.share + terms.count, some, share);
      terms.count += some;
      if (terms.count == kTerms) add_terms(terms, options.beta, energy), terms.count = 0;
    }
  };
  const auto share = [&](int64_t term) { return guided_energy_pair(op, statistics, term, options).share; };
  add(statistics, meetings, share(0));
  if (all > meetings) add(statistics + 2 * meetings + op.m, op.pairs(), share(meetings));
  if (!terms.count) return energy;
  for (int64_t i = terms.count; i < kTerms; ++i) terms.square[i] = 1, terms.along[i] = terms.share[i] = 0;
  add_terms(terms, options.beta, energy);
  return energy;
}

}  // namespace lgd
