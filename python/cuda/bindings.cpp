// lgd_kernels._C_cuda: the CUDA kernels, on the caller's stream.
#include "../arguments.h"
#include "../sources.h"

namespace lgd {
void bind_guided_energy_cuda(pybind11::module_& module);
void bind_guided_score_cuda(pybind11::module_& module);
void bind_guided_step_cuda(pybind11::module_& module);
}  // namespace lgd

PYBIND11_MODULE(_C_cuda, module) {
  lgd::Python::instance();
  module.attr("source_digest") = lgd::source_digest;
  lgd::bind_guided_energy_cuda(module);
  lgd::bind_guided_score_cuda(module);
  lgd::bind_guided_step_cuda(module);
  module.attr("compiler") = LGD_NVCC;
}
