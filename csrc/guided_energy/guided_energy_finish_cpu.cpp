#include "../common/power.h"
#include "guided_energy.h"

namespace lgd {
namespace {

constexpr int kTerms = 24;  // pairs whose powers are taken side by side: more than one vector, since a power is a chain

struct Terms {
  alignas(64) double square[kTerms], along[kTerms], share[kTerms];
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
  for (int i = 0; i < kTerms; ++i) energy.loss += loss[i], energy.slope += slope[i];
}

}  // namespace

Energy guided_energy_finish(const GuidedEnergy& op, int64_t item, int64_t row, const double* statistics,
                            const EnergyOptions& options) {
  Energy energy{guided_energy_variance(op, item, row), 0};
  const int64_t count = guided_energy_terms(op, options);
  for (int64_t first = 0; first < count; first += kTerms) {
    Terms terms;
    for (int64_t i = 0; i < kTerms; ++i) {
      const bool there = first + i < count;
      const EnergyPair pair = there ? guided_energy_pair(op, statistics, first + i, options) : EnergyPair{1, 0, 0};
      terms.square[i] = pair.square;
      terms.along[i] = pair.along;
      terms.share[i] = pair.share;
    }
    add_terms(terms, options.beta, energy);
  }
  return energy;
}

}  // namespace lgd
