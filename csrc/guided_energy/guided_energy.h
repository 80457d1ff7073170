// The energy of guided particles against targets, one item of m particles and k targets at a time, in one pass:
//   x_s^j = a x_j + b (cond_j + omega (cond_j - uncond_j)) + v z_j
//   G_j   = b (cond_j - uncond_j) = d x_s^j / d omega
//   P0_jk = ||x_s^j - y_k||^2      P1_jk = <x_s^j - y_k, G_j>              P2_j  = ||G_j||^2
//   Q0_jl = ||x_s^j - x_s^l||^2    Q1_jl = <x_s^j - x_s^l, G_j - G_l>      Q2_jl = ||G_j - G_l||^2    j < l
//   loss  = mean P0^(beta/2) - lam/2 mean Q0^(beta/2)                      slope = d loss / d omega
#pragma once
#include "../common/levels.h"
#include "../common/philox.h"
#include "../common/rows.h"

namespace lgd {

// Targets are given, made from x0 and noise, or integrated out (lgd_kernels/ops/guided_energy/targets.py).
enum class Targets : int { tensor, renoise, expected };

struct Target {
  Rows data;  // k rows for each item, or one: x0
  Targets kind;
  int64_t k;
  Seed seed;
};

struct GuidedEnergy {
  Rows x, cond, uncond;  // m rows for each item
  Rows noise;            // may be absent
  StepScalars scalars;
  bool draws;  // z from the seed
  Seed seed;
  Target target;
  int64_t m;

  LGD_INLINE int64_t pairs() const { return m * (m - 1) / 2; }
  LGD_INLINE int64_t statistics() const {
    return 2 * m * target.k + m + 3 * pairs();
  }  // P0, P1, P2, Q0, Q1, Q2, one after the other
};

struct EnergyOptions {
  double beta, lam;
  bool unbiased;
};

constexpr int64_t kEnergySpan = 256;  // elements of a row processed together on the CPU; their sums are added in double

// Adds the terms of elements [first, last) of the item to sums. S: float, or double where any tensor is. `scratch`
// holds guided_energy_scratch elements.
template <class S>
void guided_energy(const GuidedEnergy& op, int64_t item, int64_t first, int64_t last, double* sums, S* scratch);
int64_t guided_energy_scratch(const GuidedEnergy& op);

// Gradients to the data from the weights of the pairs, w_jk = 2 d loss / d P0_jk and v_jl = 2 d loss / d Q0_jl:
//   d_x_s^j = sum_k w_jk (x_s^j - y_k) + sum_l v_jl (x_s^j - x_s^l)        d_y_k = sum_j w_jk (y_k - x_s^j)
// d_target is d_y or, if targets are made from x0, signal_s sum_k d_y_k.
struct GuidedEnergyBackward {
  Rows d_x, d_cond, d_uncond, d_noise, d_target;  // out, each may be absent
  GuidedEnergy forward;
  const double *to_targets, *to_particles;  // [B, m, k], [B, pairs]
};
template <class S>
void guided_energy_backward(const GuidedEnergyBackward& op, int64_t item, int64_t first, int64_t last, S* scratch);

struct Energy {
  double loss, slope;
};

// Counts the terms of the loss: pairs with targets, then, if lam is not 0, pairs of particles.
LGD_INLINE int64_t guided_energy_terms(const GuidedEnergy& op, const EnergyOptions& options) {
  return op.m * op.target.k + (options.lam != 0 ? op.pairs() : 0);
}

// The pair of a term, from the statistics of the item. The loss has share square^(beta/2), and the slope
// share beta square^(beta/2 - 1) along.
struct EnergyPair {
  double square, along, share;
};
LGD_INLINE EnergyPair guided_energy_pair(const GuidedEnergy& op, const double* statistics, int64_t term,
                                         const EnergyOptions& options) {
  const int64_t meetings = op.m * op.target.k, pairs = op.pairs();
  const bool repels = term >= meetings;
  const double* square = statistics + term + (repels ? meetings + op.m : 0);
  const double repulsion = options.lam / 2 * (options.unbiased ? 1.0 : double(op.m - 1) / double(op.m));
  return {*square, square[repels ? pairs : meetings], repels ? -repulsion / double(pairs) : 1 / double(meetings)};
}

// The variance that targets add to the loss if they are integrated out.
LGD_INLINE double guided_energy_variance(const GuidedEnergy& op, int64_t item, int64_t row) {
  if (op.target.kind != Targets::expected) return 0;
  const double noise = op.scalars.levels.at<double>(3, item);
  return noise * noise * double(row);
}

// Computes loss and slope from the statistics of an item with rows of `row` elements.
Energy guided_energy_finish(const GuidedEnergy& op, int64_t item, int64_t row, const double* statistics,
                            const EnergyOptions& options);

}  // namespace lgd
