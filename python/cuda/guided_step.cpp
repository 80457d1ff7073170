#include "../guided_step.h"

#include "../../csrc/guided_step/guided_step_cuda.h"
#include "../binding.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

const Binding binding([](py::module_& module) {
  module.def("guided_step", [](Tensor x_s, Tensor arguments, Address stream) {
    Call call;
    const auto op = guided_step_of(x_s, Fields(arguments), call);
    const auto [batch, row] = Sizes(x_s);
    check(guided_step_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_step");
  });
  // The last output is the parts of d_omega, [B, parts].
  module.def("guided_step_backward", [](Tensor outputs, Tensor arguments, Address stream) {
    Call call;
    const Fields to(outputs), from(arguments);
    const auto op = guided_step_backward_of(to, from, call);
    const auto [batch, row] = Sizes(from[0]);
    auto* parts = static_cast<float*>(address(to[4]));
    check(guided_step_backward_cuda(op, batch, row, parts, reinterpret_cast<void*>(stream)), "guided_step_backward");
  });
});

}  // namespace lgd
