// Python's arguments as the op's structs, for the CPU and for CUDA.
#pragma once
#include "../csrc/guided_step/guided_step.h"
#include "arguments.h"

namespace lgd {

inline GuidedStep guided_step_of(Tensor x_s, Tensor x, Tensor cond, Tensor uncond, Tensor noise,
                                 const StepScalars& scalars, Tensor seed_, std::optional<int64_t> seed_value,
                                 int64_t first_sample) {
  const bool draws = !seed_.is_none() || seed_value;
  return {rows(x_s),   rows(x), rows(cond), rows(uncond),
          rows(noise), scalars, draws,      draws ? seed(seed_, seed_value, first_sample) : Seed{}};
}

inline GuidedStepBackward guided_step_backward_of(Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise,
                                                  Tensor d_x_s, Tensor cond, Tensor uncond,
                                                  const StepScalars& scalars) {
  return {rows(d_x), rows(d_cond), rows(d_uncond), rows(d_noise), rows(d_x_s), rows(cond), rows(uncond), scalars};
}

}  // namespace lgd
