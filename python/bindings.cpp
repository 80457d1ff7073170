// lgd_kernels._C: the CPU kernels, on tensors given by address, dtype and stride. One build serves every torch version.
#include <pybind11/pybind11.h>

#include "arguments.h"
#include "binding.h"
#include "sources.h"
#include "stop.h"

namespace lgd {
namespace {
// The instruction set of the clones that row loops run as (LGD_CLONES in csrc/common/scalar.h).
const char* instruction_set() {
#if defined(LGD_HAS_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64 (SSE2)";
#else
  return "the compiler's baseline";
#endif
}

// The least value of a tensor [B], NaN if one is NaN. torch takes longer for that than a small kernel.
double smallest(Tensor tensor) {
  const PerSample values = per_sample(tensor, 0);
  double least = INFINITY;
  for (int64_t i = size(tensor, 0) - 1; i >= 0 && least == least; --i) {
    const double value = values.at<double>(i);
    least = value >= least ? least : value;
  }
  return least;
}
}  // namespace
}  // namespace lgd

PYBIND11_MODULE(_C, module) {
  lgd::Python::instance();
  module.attr("source_digest") = lgd::source_digest;
  const auto threading = pybind11::module_::import("threading");
  lgd::main_thread = threading.attr("main_thread")().attr("ident").cast<unsigned long>();
  lgd::Binding::bind_all(module);
  module.def("instruction_set", &lgd::instruction_set);
  module.def("smallest", &lgd::smallest);
#if defined(__GNUC__) && !defined(__clang__)
  module.attr("compiler") = "gcc " __VERSION__;
#else
  module.attr("compiler") = __VERSION__;
#endif
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
