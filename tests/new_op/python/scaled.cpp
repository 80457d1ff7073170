#include "../csrc/scaled/scaled.h"

#include "arguments.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

template <class S>
void run(const Scaled& op, int64_t batch, int64_t row, int threads) {
  for_chunks(batch, row, threads,
             [&](int64_t sample, int64_t first, int64_t last) { scaled<S>(op, sample, first, last); });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("scaled", [](Tensor out, Tensor arguments, int threads) {
    Call call;
    const Fields from(arguments);
    const Scaled op{rows(out), call.rows(from[0]), per_sample(from[1], 0)};
    const auto [batch, row] = Sizes(out);
    py::gil_scoped_release release;
    wide(op.x) ? run<double>(op, batch, row, threads) : run<float>(op, batch, row, threads);
  });
});

}  // namespace lgd
