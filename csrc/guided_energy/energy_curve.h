// The loss of an item as a function of omega, from the statistics of guided_energy (guided_energy.h). With d the
// distance from the omega they were taken at, each pair has the squared distance
//   S(d) = a + 2 d b + d^2 c        (a, b, c) = (P0, P1, P2) or (Q0, Q1, Q2)
//   loss = mean S_P^(beta/2) - lam/2 mean S_Q^(beta/2)
// and its derivatives in d, to the second.
#pragma once
#include "guided_energy.h"

namespace lgd {

struct EnergyDerivative {
  int64_t m, k;
  EnergyOptions options;
  int order;  // 0: the loss
};

constexpr int64_t kCurveShifts = 64;  // processed together: their sums stay in the first-level cache

// Computes found[i] at d = shifts[i], for one item.
void energy_curve(const EnergyDerivative& of, const double* statistics, const double* shifts, int64_t count,
                  double* found);

}  // namespace lgd
