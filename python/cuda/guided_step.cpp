#include "../../csrc/guided_step/guided_step_cuda.h"
#include "../arguments.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

void bind_guided_step_cuda(py::module_& module) {
  module.def("guided_step", [](RowsArgument x_s, RowsArgument x, RowsArgument cond, RowsArgument uncond,
                               RowsArgument noise, PerSampleArgument omega_, std::optional<TableArgument> table,
                               LevelsArgument levels_, int prediction, PerSampleArgument churn,
                               std::optional<SeedArgument> seed_, int64_t batch, int64_t row, Address stream) {
    const GuidedStep op{
        rows(x_s),         rows(x),
        rows(cond),        rows(uncond),
        rows(noise),       {omega(omega_, table), levels(levels_), Prediction(prediction), per_sample(churn)},
        seed_.has_value(), seed_ ? seed(*seed_) : Seed{}};
    check(guided_step_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_step");
  });
  module.def("guided_step_backward", [](RowsArgument d_x, RowsArgument d_cond, RowsArgument d_uncond,
                                        RowsArgument d_noise, Address parts, RowsArgument d_x_s, RowsArgument cond,
                                        RowsArgument uncond, PerSampleArgument omega_,
                                        std::optional<TableArgument> table, LevelsArgument levels_, int prediction,
                                        PerSampleArgument churn, int64_t batch, int64_t row, Address stream) {
    const GuidedStepBackward op{
        rows(d_x),      rows(d_cond),
        rows(d_uncond), rows(d_noise),
        rows(d_x_s),    rows(cond),
        rows(uncond),   {omega(omega_, table), levels(levels_), Prediction(prediction), per_sample(churn)}};
    check(guided_step_backward_cuda(op, batch, row, reinterpret_cast<float*>(parts), reinterpret_cast<void*>(stream)),
          "guided_step_backward");
  });
}

}  // namespace lgd
