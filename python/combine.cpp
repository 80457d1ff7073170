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

PerOutput per_output(Tensor tensor) {
  if (tensor.is_none()) return {nullptr, DType::f32};
  return {address(tensor), dtype(tensor)};
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("combine", [](Tensor outputs, Tensors tensors, Tensor coefficients, Tensor constant, Tensor noise_scale,
                           py::handle columns, Tensor seed_, std::optional<int64_t> seed_value, int64_t first_sample,
                           Tensor source, double low, double high, Tensor found, int threads) {
    Combine op{};
    op.read = columns_of(tensors, columns, source, int(PySequence_Size(tensors.ptr())));
    const int written = int(size(outputs, 0));
    op.count = int(size(coefficients, 1));
    op.unwritten = op.count - written;
    if (op.count > kMostOutputs || op.read.tensor_count > kMostOutputs)
      throw std::length_error("more outputs or tensors than the kernels have room for");
    if (size(coefficients, 2) != op.read.count)
      throw std::invalid_argument("coefficients [B, P, K] of another K than there are columns");
    const int64_t batch = size(outputs, 1), row = Sizes(item(tensors, 0)).row, step = stride(outputs);
    const DType stored = dtype(outputs);
    const int64_t width = stored == DType::f64 ? 8 : stored == DType::f32 ? 4 : 2;
    for (int p = 0; p < written; ++p)
      op.outputs[p] = {static_cast<char*>(address(outputs)) + p * step * width, stored, row};
    op.coefficients = per_output(coefficients);
    op.constant = per_output(constant);
    op.noise_scale = per_output(noise_scale);
    op.seed = seed(seed_, seed_value, first_sample);
    op.low = low;
    op.high = high;
    void* sums = found.is_none() ? nullptr : address(found);
    const bool wide = op.read.any(DType::f64) || (sums && dtype(found) == DType::f64);
    py::gil_scoped_release release;
    wide ? run<double>(op, batch, row, threads, sums) : run<float>(op, batch, row, threads, sums);
  });
});

}  // namespace lgd
