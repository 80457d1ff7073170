#include "guided_score.h"

#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

template <class S>
void run(const GuidedScore& op, int64_t batch, int64_t row, int threads) {
  for_chunks(batch, row, threads,
             [&](int64_t sample, int64_t first, int64_t last) { guided_score<S>(op, sample, first, last); });
}

template <class S>
void run(const GuidedScoreBackward& op, int64_t batch, int64_t row, int threads, const Rows& d_omega) {
  sum_chunks(batch, row, threads, static_cast<S*>(d_omega.data), [&](int64_t sample, int64_t first, int64_t last) {
    return guided_score_backward<S>(op, sample, first, last);
  });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("guided_score", [](Tensor guided, Tensor arguments, int threads) {
    Call call;
    const auto op = guided_score_of(guided, Fields(arguments), call);
    const auto [batch, row] = Sizes(guided);
    py::gil_scoped_release release;
    wide(op.cond, op.uncond) ? run<double>(op, batch, row, threads) : run<float>(op, batch, row, threads);
  });
  module.def("guided_score_backward", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields to(outputs), from(arguments);
    const auto op = guided_score_backward_of(to, from, call);
    const Rows sums = rows(to[2]);
    const auto [batch, row] = Sizes(from[0]);
    py::gil_scoped_release release;
    wide(sums, op.d_guided, op.cond, op.uncond, op.d_cond, op.d_uncond) ? run<double>(op, batch, row, threads, sums)
                                                                        : run<float>(op, batch, row, threads, sums);
  });
});

}  // namespace lgd
