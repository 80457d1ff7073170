#include "../csrc/guided_step/guided_step.h"

#include "arguments.h"
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
void run(const GuidedStepBackward& op, int64_t batch, int64_t row, int threads, Address d_omega) {
  sum_chunks(batch, row, threads, reinterpret_cast<S*>(d_omega), [&](int64_t sample, int64_t first, int64_t last) {
    return guided_step_backward<S>(op, sample, first, last);
  });
}

}  // namespace

void bind_guided_step(py::module_& module) {
  module.def("guided_step", [](RowsArgument x_s, RowsArgument x, RowsArgument cond, RowsArgument uncond,
                               RowsArgument noise, PerSampleArgument omega_, std::optional<TableArgument> table,
                               LevelsArgument levels_, int prediction, PerSampleArgument churn,
                               std::optional<SeedArgument> seed_, int64_t batch, int64_t row, bool wide, int threads) {
    const GuidedStep op{
        rows(x_s),         rows(x),
        rows(cond),        rows(uncond),
        rows(noise),       {omega(omega_, table), levels(levels_), Prediction(prediction), per_sample(churn)},
        seed_.has_value(), seed_ ? seed(*seed_) : Seed{}};
    py::gil_scoped_release release;
    wide ? run<double>(op, batch, row, threads) : run<float>(op, batch, row, threads);
  });
  module.def("guided_step_backward",
             [](RowsArgument d_x, RowsArgument d_cond, RowsArgument d_uncond, RowsArgument d_noise, Address d_omega,
                RowsArgument d_x_s, RowsArgument cond, RowsArgument uncond, PerSampleArgument omega_,
                std::optional<TableArgument> table, LevelsArgument levels_, int prediction, PerSampleArgument churn,
                int64_t batch, int64_t row, bool wide, int threads) {
               const GuidedStepBackward op{
                   rows(d_x),      rows(d_cond),
                   rows(d_uncond), rows(d_noise),
                   rows(d_x_s),    rows(cond),
                   rows(uncond),   {omega(omega_, table), levels(levels_), Prediction(prediction), per_sample(churn)}};
               py::gil_scoped_release release;
               wide ? run<double>(op, batch, row, threads, d_omega) : run<float>(op, batch, row, threads, d_omega);
             });
}

}  // namespace lgd
