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
void run(const GuidedScoreBackward& op, int64_t batch, int64_t row, int threads, Address d_omega) {
  sum_chunks(batch, row, threads, reinterpret_cast<S*>(d_omega), [&](int64_t sample, int64_t first, int64_t last) {
    return guided_score_backward<S>(op, sample, first, last);
  });
}

}  // namespace

void bind_guided_score(py::module_& module) {
  module.def("guided_score",
             [](RowsArgument guided, RowsArgument cond, RowsArgument uncond, PerSampleArgument omega_,
                std::optional<TableArgument> table, int64_t batch, int64_t row, bool wide, int threads) {
               const GuidedScore op{rows(guided), rows(cond), rows(uncond), omega(omega_, table)};
               py::gil_scoped_release release;
               wide ? run<double>(op, batch, row, threads) : run<float>(op, batch, row, threads);
             });
  module.def("guided_score_backward",
             [](RowsArgument d_cond, RowsArgument d_uncond, Address d_omega, RowsArgument d_guided, RowsArgument cond,
                RowsArgument uncond, PerSampleArgument omega_, std::optional<TableArgument> table, int64_t batch,
                int64_t row, bool wide, int threads) {
               const GuidedScoreBackward op{rows(d_cond), rows(d_uncond), rows(d_guided),
                                            rows(cond),   rows(uncond),   omega(omega_, table)};
               py::gil_scoped_release release;
               wide ? run<double>(op, batch, row, threads, d_omega) : run<float>(op, batch, row, threads, d_omega);
             });
}

}  // namespace lgd
