#include "../guided_energy.h"

#include "../../csrc/guided_energy/guided_energy_cuda.h"
#include "../binding.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

const Binding binding([](py::module_& module) {
  module.def("guided_energy_chunks", &guided_energy_chunks);
  module.def("guided_energy", [](Tensor loss, Tensor slope, Tensor statistics, Tensor parts, Tensor x, Tensor cond,
                                 Tensor uncond, Tensor noise, Tensor omega_, double omega_value, Tensors table,
                                 Tensors levels_, int prediction, Tensor churn, double churn_value, Tensor seed_,
                                 std::optional<int64_t> seed_value, int64_t first_sample, Tensor target, int kind,
                                 int64_t m, int64_t k, Tensor target_seed, std::optional<int64_t> target_seed_value,
                                 double beta, double lam, bool unbiased, Address stream) {
    if (guided_energy_rows(m, k) > kMostRows)
      throw py::value_error(
          "guided_energy: impl='cuda' takes m particles and k targets with 2 m + k <= " + std::to_string(kMostRows) +
          ", got m = " + std::to_string(m) + " and k = " + std::to_string(k) + "; impl='reference' takes any number");
    const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
    const auto op = guided_energy_of(x, cond, uncond, noise, scalars, seed_, seed_value, first_sample, target, kind, m,
                                     k, target_seed, target_seed_value);
    const EnergyOutputs out{static_cast<float*>(address(loss)), static_cast<float*>(address(slope)),
                            static_cast<double*>(address(statistics))};
    const auto [batch, row] = ParticleSizes(Sizes(x), m);
    check(guided_energy_cuda(op, {beta, lam, unbiased}, batch, row, static_cast<float*>(address(parts)), out,
                             reinterpret_cast<void*>(stream)),
          "guided_energy");
  });
  module.def(
      "guided_energy_backward",
      [](Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_target, Tensor to_targets,
         Tensor to_particles, Tensor x, Tensor cond, Tensor uncond, Tensor noise, Tensor omega_, double omega_value,
         Tensors table, Tensors levels_, int prediction, Tensor churn, double churn_value, Tensor seed_,
         std::optional<int64_t> seed_value, int64_t first_sample, Tensor target, int kind, int64_t m, int64_t k,
         Tensor target_seed, std::optional<int64_t> target_seed_value, Address stream) {
        const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
        const auto forward = guided_energy_of(x, cond, uncond, noise, scalars, seed_, seed_value, first_sample, target,
                                              kind, m, k, target_seed, target_seed_value);
        const auto op =
            guided_energy_backward_of(d_x, d_cond, d_uncond, d_noise, d_target, to_targets, to_particles, forward);
        const auto [batch, row] = ParticleSizes(Sizes(x), m);
        check(guided_energy_backward_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_energy_backward");
      });
});

}  // namespace lgd
