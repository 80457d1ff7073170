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

}  // namespace lgd
