#include "../csrc/dynamic_threshold/dynamic_threshold.h"

#include "arguments.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

// The threads that share one row, each with a part of it and the memory for that.
struct Parts {
  int64_t row;
  Part* memory;
  int count;

  template <class Work>
  void operator()(const Work& work) const {
    if (count == 1) return work(0, 0, row);
    for_tasks(count, count, [&](int64_t part) { work(int(part), row * part / count, row * (part + 1) / count); });
  }
};

template <class S>
void threshold_row(const DynamicThreshold& op, int64_t sample, const Parts& parts) {
  const Position at(op.quantile, parts.row);
  const Statistics<S> found(op.x0, sample, at, parts.memory, parts.count, parts);
  *op.order.at<S>(sample, 0) = S(found.low);
  *op.order.at<S>(sample, 1) = S(found.high);
  const double threshold = found.threshold(at.weight, op.most);
  parts([&](int, int64_t first, int64_t last) { clip_and_divide<S>(op, sample, first, last, threshold); });
}

template <class S>
void run(const DynamicThreshold& op, int64_t batch, int64_t row, int threads) {
  if (batch * row < kSerial) threads = 1;
  if (batch < 2 * threads) {  // too few samples to share out: all threads work on each
    std::vector<Part> memory(threads);
    return for_tasks(batch, 1, [&](int64_t sample) { threshold_row<S>(op, sample, {row, memory.data(), threads}); });
  }
  for_tasks(batch, threads, [&](int64_t sample) {
    static thread_local std::vector<Part> memory(1);
    threshold_row<S>(op, sample, {row, memory.data(), 1});
  });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("dynamic_threshold", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields to(outputs), from(arguments);
    const DynamicThreshold op{rows(to[0]), rows(to[1]), call.rows(from[0]), from.real(1), from.real(2)};
    const auto [batch, row] = Sizes(from[0]);
    py::gil_scoped_release release;
    wide(op.x0) ? run<double>(op, batch, row, threads) : run<float>(op, batch, row, threads);
  });
});

}  // namespace lgd
