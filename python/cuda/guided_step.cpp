#include "../guided_step.h"

#include "../../csrc/guided_step/guided_step_cuda.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

void bind_guided_step_cuda(py::module_& module) {
  module.def("guided_step",
             [](Tensor x_s, Tensor x, Tensor cond, Tensor uncond, Tensor noise, Tensor omega_, double omega_value,
                Tensors table, Tensors levels_, int prediction, Tensor churn, double churn_value, Tensor seed_,
                std::optional<int64_t> seed_value, int64_t first_sample, Address stream) {
               const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
               const auto op = guided_step_of(x_s, x, cond, uncond, noise, scalars, seed_, seed_value, first_sample);
               const auto [batch, row] = Sizes(x_s);
               check(guided_step_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_step");
             });
  module.def("guided_step_backward", [](Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor parts,
                                        Tensor d_x_s, Tensor cond, Tensor uncond, Tensor omega_, double omega_value,
                                        Tensors table, Tensors levels_, int prediction, Tensor churn,
                                        double churn_value, Address stream) {
    const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
    const auto op = guided_step_backward_of(d_x, d_cond, d_uncond, d_noise, d_x_s, cond, uncond, scalars);
    const auto [batch, row] = Sizes(d_x_s);
    check(
        guided_step_backward_cuda(op, batch, row, static_cast<float*>(address(parts)), reinterpret_cast<void*>(stream)),
        "guided_step_backward");
  });
}

}  // namespace lgd
