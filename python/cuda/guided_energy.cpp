#include "../guided_energy.h"

#include "../../csrc/guided_energy/guided_energy_cuda.h"
#include "../binding.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

const Binding binding([](py::module_& module) {
  module.def("guided_energy_chunks", &guided_energy_chunks);
  // The last output is the parts of the statistics, [B, chunks, count].
  module.def("guided_energy", [](Tensor outputs, Tensor arguments, Address stream) {
    Call call;
    const Fields to(outputs), from(arguments);
    const auto op = guided_energy_of(from.fields(0), call);
    if (guided_energy_rows(op.m, op.target.k) > kMostRows)
      throw py::value_error("guided_energy: impl='cuda' takes m particles and k targets with 2 m + k <= " +
                            std::to_string(kMostRows) + ", got m = " + std::to_string(op.m) +
                            " and k = " + std::to_string(op.target.k) + "; impl='reference' takes any number");
    const EnergyOutputs out{static_cast<float*>(address(to[0])), static_cast<float*>(address(to[1])),
                            static_cast<double*>(address(to[2]))};
    const auto [batch, row] = particle_sizes(op, from.fields(0)[0]);
    auto* parts = static_cast<float*>(address(to[3]));
    check(guided_energy_cuda(op, energy_options_of(from.fields(1)), batch, row, parts, out,
                             reinterpret_cast<void*>(stream)),
          "guided_energy");
  });
  module.def("guided_energy_backward", [](Tensor outputs, Tensor arguments, Address stream) {
    Call call;
    const Fields from(arguments);
    const auto op = guided_energy_backward_of(Fields(outputs), from, call);
    const auto [batch, row] = particle_sizes(op.forward, from.fields(0)[0]);
    check(guided_energy_backward_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_energy_backward");
  });
});

}  // namespace lgd
