// Python's arguments as the op's structs, for the CPU and for CUDA.
#pragma once
#include "../csrc/guided_energy/guided_energy.h"
#include "arguments.h"

namespace lgd {

// [B, m, ...] as rows, of which each item has m. (With one particle, its own dimension may have any stride.)
inline Rows particles(Tensor tensor, int64_t m) {
  if (tensor.is_none()) return {nullptr, DType::f32, 0};
  return {address(tensor), dtype(tensor), stride(tensor, m > 1)};
}

// Items, and the elements of a particle, of x [B, m, ...].
struct ParticleSizes {
  int64_t batch, row;

  ParticleSizes(const Sizes& items, int64_t m) : batch(items.batch), row(items.row / m) {}
};

// x, cond, uncond and noise are [B, m, ...], target [B, k, ...] or, as x0, [B, ...].
inline GuidedEnergy guided_energy_of(Tensor x, Tensor cond, Tensor uncond, Tensor noise, const StepScalars& scalars,
                                     Tensor seed_, std::optional<int64_t> seed_value, int64_t first_sample,
                                     Tensor target, int kind, int64_t m, int64_t k, Tensor target_seed,
                                     std::optional<int64_t> target_seed_value) {
  const bool draws = !seed_.is_none() || seed_value;
  return {particles(x, m),
          particles(cond, m),
          particles(uncond, m),
          particles(noise, m),
          Targets(kind) == Targets::tensor ? particles(target, k) : rows(target),
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
  const int64_t m = forward.m;
  return {particles(d_x, m),
          particles(d_cond, m),
          particles(d_uncond, m),
          particles(d_noise, m),
          forward.kind == Targets::tensor ? particles(d_target, forward.k) : rows(d_target),
          forward,
          static_cast<const double*>(address(to_targets)),
          static_cast<const double*>(address(to_particles))};
}

}  // namespace lgd
