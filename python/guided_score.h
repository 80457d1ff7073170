// Structs of lgd_kernels/ops/guided_score/structs.py as those of csrc/, for the CPU and for CUDA.
#pragma once
#include "../csrc/guided_score/guided_score.h"
#include "arguments.h"

namespace lgd {

inline GuidedScore guided_score_of(Tensor guided, const Fields& a, Call& call) {
  return {rows(guided), call.rows(a[0]), call.rows(a[1]), omega(a.fields(2), call)};
}

// Outputs: d_cond, d_uncond, and d_omega, which is summed elsewhere.
inline GuidedScoreBackward guided_score_backward_of(const Fields& outputs, const Fields& b, Call& call) {
  return {rows(outputs[0]), rows(outputs[1]), call.rows(b[0]),
          call.rows(b[1]),  call.rows(b[2]),  omega(b.fields(3), call)};
}

}  // namespace lgd
