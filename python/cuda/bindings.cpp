// lgd_kernels._C_cuda: the CUDA kernels, on the caller's stream.
#include "../arguments.h"
#include "../binding.h"
#include "../sources.h"

PYBIND11_MODULE(_C_cuda, module) {
  lgd::Python::instance();
  module.attr("source_digest") = lgd::source_digest;
  lgd::Binding::bind_all(module);
  module.attr("compiler") = LGD_NVCC;
}
