// guided = cond + omega (cond - uncond), one omega for each sample, and its gradients.
#pragma once
#include "../common/levels.h"
#include "../common/rows.h"

namespace lgd {

struct GuidedScore {
  Rows guided;  // out
  Rows cond, uncond;
  Omega omega;
};

// d_cond = (1 + omega) d_guided, d_uncond = -omega d_guided, d_omega = <d_guided, cond - uncond>.
struct GuidedScoreBackward {
  Rows d_cond, d_uncond;        // out, each may be absent
  Rows d_guided, cond, uncond;  // cond and uncond are absent where d_omega is not wanted
  Omega omega;
};

// Elements [first, last) of one sample. S: float, or double where any tensor is.
template <class S>
void guided_score(const GuidedScore& op, int64_t sample, int64_t first, int64_t last);
// Returns its part of d_omega.
template <class S>
double guided_score_backward(const GuidedScoreBackward& op, int64_t sample, int64_t first, int64_t last);

}  // namespace lgd
