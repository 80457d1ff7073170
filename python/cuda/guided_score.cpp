#include "../../csrc/guided_score/guided_score_cuda.h"
#include "../arguments.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

void bind_guided_score_cuda(py::module_& module) {
  module.def("guided_score", [](Tensor guided, Tensor cond, Tensor uncond, Tensor omega_, double omega_value,
                                Tensors table, Address stream) {
    const GuidedScore op{rows(guided), rows(cond), rows(uncond), omega(omega_, omega_value, table)};
    const auto [batch, row] = Sizes(guided);
    check(guided_score_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_score");
  });
  module.def("guided_score_backward",
             [](Tensor d_cond, Tensor d_uncond, Tensor parts, Tensor d_guided, Tensor cond, Tensor uncond,
                Tensor omega_, double omega_value, Tensors table, Address stream) {
               const GuidedScoreBackward op{rows(d_cond), rows(d_uncond), rows(d_guided),
                                            rows(cond),   rows(uncond),   omega(omega_, omega_value, table)};
               const auto [batch, row] = Sizes(d_guided);
               check(guided_score_backward_cuda(op, batch, row, static_cast<float*>(address(parts)),
                                                reinterpret_cast<void*>(stream)),
                     "guided_score_backward");
             });
}

}  // namespace lgd
