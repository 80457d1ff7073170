#include "guided_step.h"

#include "../csrc/guided_step/guided_step.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

template <class S>
void run(const GuidedStep& op, int64_t batch, int64_t row, int threads) {
  const auto work = [&](int64_t sample, int64_t first, int64_t last) { guided_step<S>(op, sample, first, last); };
  for_chunks(batch, row, threads, work, op.draws ? kSerialDrawn : kSerial);
}

template <class S>
void run(const GuidedStepBackward& op, int64_t batch, int64_t row, int threads, const Rows& d_omega) {
  sum_chunks(batch, row, threads, static_cast<S*>(d_omega.data), [&](int64_t sample, int64_t first, int64_t last) {
    return guided_step_backward<S>(op, sample, first, last);
  });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("guided_step", [](Tensor x_s, Tensor arguments, int threads) {
    Call call;
    const auto op = guided_step_of(x_s, Fields(arguments), call);
    const auto [batch, row] = Sizes(x_s);
    py::gil_scoped_release release;
    wide(op.x_s, op.cond, op.uncond, op.noise) ? run<double>(op, batch, row, threads)
                                               : run<float>(op, batch, row, threads);
  });
  module.def("guided_step_backward", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields to(outputs), from(arguments);
    const auto op = guided_step_backward_of(to, from, call);
    const Rows sums = rows(to[4]);
    const auto [batch, row] = Sizes(from[0]);
    py::gil_scoped_release release;
    wide(sums, op.d_x_s, op.cond, op.uncond, op.d_x, op.d_cond, op.d_uncond, op.d_noise)
        ? run<double>(op, batch, row, threads, sums)
        : run<float>(op, batch, row, threads, sums);
  });
});

}  // namespace lgd
