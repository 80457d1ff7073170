#include "../guided_score.h"

#include "../../csrc/guided_score/guided_score_cuda.h"
#include "../binding.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

const Binding binding([](py::module_& module) {
  module.def("guided_score", [](Tensor guided, Tensor arguments, Address stream) {
    Call call;
    const auto op = guided_score_of(guided, Fields(arguments), call);
    const auto [batch, row] = Sizes(guided);
    check(guided_score_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_score");
  });
  // The last output is the parts of d_omega, [B, parts].
  module.def("guided_score_backward", [](Tensor outputs, Tensor arguments, Address stream) {
    Call call;
    const Fields to(outputs), from(arguments);
    const auto op = guided_score_backward_of(to, from, call);
    const auto [batch, row] = Sizes(from[0]);
    auto* parts = static_cast<float*>(address(to[2]));
    check(guided_score_backward_cuda(op, batch, row, parts, reinterpret_cast<void*>(stream)), "guided_score_backward");
  });
});

}  // namespace lgd
