// Python's arguments as the op's structs, for the CPU and for CUDA.
#pragma once
#include "../csrc/guided_energy/guided_energy.h"
#include "arguments.h"

namespace lgd {

// x, cond, uncond and noise are [B m, ...], target [B k, ...] or, as x0, [B, ...].
inline GuidedEnergy guided_energy_of(Tensor x, Tensor cond, Tensor uncond, Tensor noise, const StepScalars& scalars,
                                     Tensor seed_, std::optional<int64_t> seed_value, int64_t first_sample,
                                     Tensor target, int kind, int64_t m, int64_t k, Tensor target_seed,
                                     std::optional<int64_t> target_seed_value) {
  const bool draws = !seed_.is_none() || seed_value;
  return {rows(x),
          rows(cond),
          rows(uncond),
          rows(noise),
          rows(target),
          Targets(kind),
          m,
          k,
          scalars,
          draws,
          seed(seed_, seed_value, first_sample),
          seed(target_seed, target_seed_value, first_sample)};
}

inline GuidedEnergyBackward guided_energy_backward_of(Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise,
                                                      Tensor d_target, Tensor to_targets, Tensor to_particles,
                                                      const GuidedEnergy& forward) {
  return {rows(d_x),
          rows(d_cond),
          rows(d_uncond),
          rows(d_noise),
          rows(d_target),
          forward,
          static_cast<const double*>(address(to_targets)),
          static_cast<const double*>(address(to_particles))};
}

}  // namespace lgd
