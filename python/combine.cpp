#include "../csrc/combine/combine.h"

#include "binding.h"
#include "columns.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

// found: [batch, moments_of(outputs)], or null.
template <class S>
void run(const Combine& op, int64_t batch, int64_t row, int threads, void* found) {
  if (found) {
    const int count = moments_of(op.count);
    std::vector<double> totals(batch * count);
    if (batch * row < (op.noise_scale.data ? kSerialDrawn : kSerial)) threads = 1;
    reduce_rows(
        batch, row, threads, count, totals.data(),
        [&](int64_t sample, int64_t first, int64_t last, double* sums) { combine<S>(op, sample, first, last, sums); });
    std::copy(totals.begin(), totals.end(), static_cast<S*>(found));
    return;
  }
  const auto work = [&](int64_t sample, int64_t first, int64_t last) { combine<S>(op, sample, first, last); };
  for_chunks(batch, row, threads, work, op.noise_scale.data ? kSerialDrawn : kSerial);
}

PerOutput per_output(Tensor tensor, Call& call) {
  if (tensor.is_none()) return {nullptr, DType::f32};
  return {address(call.contiguous(tensor)), dtype(tensor)};
}

}  // namespace

// outputs: those that are written, [written, B, ...], and their moments, or None.
const Binding binding([](py::module_& module) {
  module.def("combine", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields to(outputs), a(arguments);
    const Tensor written = to[0], found = to[1];
    Combine op{};
    op.read = columns_of(a.fields(0), call);
    const int written_count = int(size(written, 0));
    op.count = int(size(a[1], 1));
    op.unwritten = op.count - written_count;
    if (op.count > kMostOutputs || op.read.tensor_count > kMostOutputs)
      throw std::length_error("more outputs or tensors than the kernels have room for");
    if (size(a[1], 2) != op.read.count)
      throw std::invalid_argument("coefficients [B, P, K] of another K than there are columns");
    const int64_t batch = size(written, 1), row = Sizes(item(a.fields(0)[0], 0)).row, step = stride(written);
    const DType stored = dtype(written);
    for (int p = 0; p < written_count; ++p)
      op.outputs[p] = {static_cast<char*>(address(written)) + p * step * bytes_of(stored), stored, row};
    op.coefficients = per_output(a[1], call);
    op.constant = per_output(a[2], call);
    op.noise_scale = per_output(a[3], call);
    op.seed = seed(a.fields(4));
    op.low = a.real(5);
    op.high = a.real(6);
    void* sums = address(found);
    const bool wide = op.read.any(DType::f64) || (sums && dtype(found) == DType::f64);
    py::gil_scoped_release release;
    wide ? run<double>(op, batch, row, threads, sums) : run<float>(op, batch, row, threads, sums);
  });
});

}  // namespace lgd
