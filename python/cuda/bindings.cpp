// lgd_kernels._C_cuda: the CUDA kernels, by raw address, on the caller's stream. Torch-free like _C.
#include <pybind11/pybind11.h>

namespace lgd {
void bind_guided_score_cuda(pybind11::module_& module);
void bind_guided_step_cuda(pybind11::module_& module);
}  // namespace lgd

PYBIND11_MODULE(_C_cuda, module) {
  lgd::bind_guided_score_cuda(module);
  lgd::bind_guided_step_cuda(module);
  module.attr("compiler") = LGD_NVCC;
}
