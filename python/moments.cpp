#include "../csrc/moments/moments.h"

#include "../csrc/moments/centring.h"
#include "binding.h"
#include "columns.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

// T: the dtype of `found`; S, or double if centred.
template <class S, class T>
void run(const Moments& op, int64_t batch, int64_t row, int threads, T* found) {
  std::vector<double> totals(batch * op.count);
  if (batch * row < kSerial) threads = 1;
  reduce_rows(
      batch, row, threads, op.count, totals.data(),
      [&](int64_t sample, int64_t first, int64_t last, double* sums) { moments<S>(op, sample, first, last, sums); },
      [&](int64_t sample) {
        if (op.centred) centre<S>(op.read, sample, row, totals.data() + sample * op.count);
      });
  for (int64_t sample = 0; sample < batch; ++sample)
    for (int m = 0; m < op.count; ++m) found[sample * op.count + m] = T(totals[sample * op.count + op.same_as[m]]);
}

template <class S>
void run(const Moments& op, int64_t batch, int64_t row, int threads, void* found) {
  if (op.centred) return run<S>(op, batch, row, threads, static_cast<double*>(found));
  run<S>(op, batch, row, threads, static_cast<S*>(found));
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("moments", [](Tensor found, Tensor arguments, int threads) {
    Call call;
    const Fields a(arguments);
    Moments op{};
    op.read = columns_of(a.fields(0), call);
    op.count = twos_of(a[1], op.products, kMostProducts);
    op.find_equal_products();
    op.centred = a.flag(2);
    const int64_t batch = size(found, 0), row = Sizes(item(a.fields(0)[0], 0)).row;
    void* out = address(found);
    py::gil_scoped_release release;
    op.read.any(DType::f64) ? run<double>(op, batch, row, threads, out) : run<float>(op, batch, row, threads, out);
  });
});

}  // namespace lgd
