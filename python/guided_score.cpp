#include "../csrc/guided_score/guided_score.h"

#include "arguments.h"
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

void bind_guided_score(py::module_& module) {
  module.def("guided_score", [](Tensor guided, Tensor cond, Tensor uncond, Tensor omega_, double omega_value,
                                Tensors table, int threads) {
    const GuidedScore op{rows(guided), rows(cond), rows(uncond), omega(omega_, omega_value, table)};
    const auto [batch, row] = Sizes(guided);
    py::gil_scoped_release release;
    wide(op.cond, op.uncond) ? run<double>(op, batch, row, threads) : run<float>(op, batch, row, threads);
  });
  module.def("guided_score_backward", [](Tensor d_cond, Tensor d_uncond, Tensor d_omega, Tensor d_guided, Tensor cond,
                                         Tensor uncond, Tensor omega_, double omega_value, Tensors table, int threads) {
    const GuidedScoreBackward op{rows(d_cond), rows(d_uncond), rows(d_guided),
                                 rows(cond),   rows(uncond),   omega(omega_, omega_value, table)};
    const Rows sums = rows(d_omega);
    const auto [batch, row] = Sizes(d_guided);
    py::gil_scoped_release release;
    wide(sums, op.d_guided, op.cond, op.uncond, op.d_cond, op.d_uncond) ? run<double>(op, batch, row, threads, sums)
                                                                        : run<float>(op, batch, row, threads, sums);
  });
}

}  // namespace lgd
