// Structs of lgd_kernels/ops/guided_step/structs.py as those of csrc/, for the CPU and for CUDA.
#pragma once
#include "../csrc/guided_step/guided_step.h"
#include "arguments.h"

namespace lgd {

inline GuidedStep guided_step_of(Tensor x_s, const Fields& a, Call& call) {
  const Fields from = a.fields(5);
  return {rows(x_s),       call.rows(a[0]),
          call.rows(a[1]), call.rows(a[2]),
          call.rows(a[3]), step_scalars(a.fields(4), call),
          draws(from),     draws(from) ? seed(from) : Seed{}};
}

// Outputs: d_x, d_cond, d_uncond, d_noise, and d_omega, which is summed elsewhere.
inline GuidedStepBackward guided_step_backward_of(const Fields& outputs, const Fields& b, Call& call) {
  return {rows(outputs[0]), rows(outputs[1]), rows(outputs[2]), rows(outputs[3]),
          call.rows(b[0]),  call.rows(b[1]),  call.rows(b[2]),  step_scalars(b.fields(3), call)};
}

}  // namespace lgd
