#include "guided_step.h"

#include "../csrc/guided_step/guided_step.h"
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

void bind_guided_step(py::module_& module) {
  module.def("guided_step",
             [](Tensor x_s, Tensor x, Tensor cond, Tensor uncond, Tensor noise, Tensor omega_, double omega_value,
                Tensors table, Tensors levels_, int prediction, Tensor churn, double churn_value, Tensor seed_,
                std::optional<int64_t> seed_value, int64_t first_sample, int threads) {
               const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
               const auto op = guided_step_of(x_s, x, cond, uncond, noise, scalars, seed_, seed_value, first_sample);
               const auto [batch, row] = Sizes(x_s);
               py::gil_scoped_release release;
               wide(op.x_s, op.cond, op.uncond, op.noise) ? run<double>(op, batch, row, threads)
                                                          : run<float>(op, batch, row, threads);
             });
  module.def("guided_step_backward",
             [](Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_omega, Tensor d_x_s, Tensor cond,
                Tensor uncond, Tensor omega_, double omega_value, Tensors table, Tensors levels_, int prediction,
                Tensor churn, double churn_value, int threads) {
               const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
               const auto op = guided_step_backward_of(d_x, d_cond, d_uncond, d_noise, d_x_s, cond, uncond, scalars);
               const Rows sums = rows(d_omega);
               const auto [batch, row] = Sizes(d_x_s);
               py::gil_scoped_release release;
               wide(sums, op.d_x_s, op.cond, op.uncond, op.d_x, op.d_cond, op.d_uncond, op.d_noise)
                   ? run<double>(op, batch, row, threads, sums)
                   : run<float>(op, batch, row, threads, sums);
             });
}

}  // namespace lgd
