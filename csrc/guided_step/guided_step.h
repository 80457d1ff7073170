// One guided step, in a single pass over memory:
//   g   = cond + omega (cond - uncond)
//   x_s = a x + b g + v z        (a, b, v) = step_coefficients(levels, prediction, churn), z given or drawn
// and its gradients.
#pragma once
#include "../common/levels.h"
#include "../common/philox.h"
#include "../common/rows.h"

namespace lgd {

struct GuidedStep {
  Rows x_s;  // out
  Rows x, cond, uncond;
  Rows noise;  // may be absent
  StepScalars scalars;
  bool draws;  // z from the seed
  Seed seed;
};

// d_x = a d, d_cond = b (1 + omega) d, d_uncond = -b omega d, d_noise = v d, d_omega = b <d, cond - uncond>.
struct GuidedStepBackward {
  Rows d_x, d_cond, d_uncond, d_noise;  // out, each may be absent
  Rows d_x_s, cond, uncond;             // cond and uncond are absent where d_omega is not wanted
  StepScalars scalars;
};

// Elements [first, last) of one sample. S: float, or double where any tensor is.
template <class S>
void guided_step(const GuidedStep& op, int64_t sample, int64_t first, int64_t last);
// Returns its part of d_omega.
template <class S>
double guided_step_backward(const GuidedStepBackward& op, int64_t sample, int64_t first, int64_t last);

}  // namespace lgd
