#include "guided_energy.h"

#include "../csrc/guided_energy/energy_curve.h"
#include "../csrc/guided_energy/guided_energy.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

template <class S>
S* scratch(const GuidedEnergy& op) {
  static thread_local std::vector<S> kept;  // the next block, and the next call, want the same
  kept.resize(std::max<size_t>(kept.size(), guided_energy_scratch(op)));
  return kept.data();
}

// Calls work(first, last) for pieces of a stretch of a row: whole spans, about 2^24 pairs of elements (5 ms) each.
template <class Work>
void in_pieces(const GuidedEnergy& op, int64_t first, int64_t last, const Work& work) {
  Watch watch;
  const int64_t length = std::max<int64_t>(1, (1 << 16) / (op.m * (op.k + op.m))) * kEnergySpan;
  for (int64_t at = first; at < last; at += length) {
    work(at, std::min(at + length, last));
    if (watch.stops()) return;
  }
}

template <class S>
void run(const GuidedEnergyBackward& op, int64_t batch, int64_t row, int threads) {
  for_chunks(batch, row, threads, [&](int64_t item, int64_t first, int64_t last) {
    S* kept = scratch<S>(op.forward);
    in_pieces(op.forward, first, last,
              [&](int64_t from, int64_t to) { guided_energy_backward<S>(op, item, from, to, kept); });
  });
}

template <class S>
void run(const GuidedEnergy& op, const EnergyOptions& options, int64_t batch, int64_t row, int threads, S* loss,
         S* slope, double* statistics) {
  const auto work = [&](int64_t item, int64_t first, int64_t last, double* sums) {
    S* kept = scratch<S>(op);
    in_pieces(op, first, last, [&](int64_t from, int64_t to) { guided_energy<S>(op, item, from, to, sums, kept); });
  };
  const int64_t count = op.statistics();
  reduce_rows(batch, row, threads, count, statistics, work, [&](int64_t item) {
    const Energy energy = guided_energy_finish(op, item, row, statistics + item * count, options);
    loss[item] = S(energy.loss);
    slope[item] = S(energy.slope);
  });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("guided_energy", [](Tensor loss, Tensor slope, Tensor statistics, Tensor x, Tensor cond, Tensor uncond,
                                 Tensor noise, Tensor omega_, double omega_value, Tensors table, Tensors levels_,
                                 int prediction, Tensor churn, double churn_value, Tensor seed_,
                                 std::optional<int64_t> seed_value, int64_t first_sample, Tensor target, int kind,
                                 int64_t m, int64_t k, Tensor target_seed, std::optional<int64_t> target_seed_value,
                                 double beta, double lam, bool unbiased, int threads) {
    const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
    const auto op = guided_energy_of(x, cond, uncond, noise, scalars, seed_, seed_value, first_sample, target, kind, m,
                                     k, target_seed, target_seed_value);
    const EnergyOptions options{beta, lam, unbiased};
    const auto [batch, row] = ParticleSizes(Sizes(x), m);
    auto* sums = static_cast<double*>(address(statistics));
    void *losses = address(loss), *slopes = address(slope);
    py::gil_scoped_release release;
    wide(op.x, op.cond, op.uncond, op.noise, op.target)
        ? run(op, options, batch, row, threads, static_cast<double*>(losses), static_cast<double*>(slopes), sums)
        : run(op, options, batch, row, threads, static_cast<float*>(losses), static_cast<float*>(slopes), sums);
  });
  module.def("guided_energy_backward",
             [](Tensor d_x, Tensor d_cond, Tensor d_uncond, Tensor d_noise, Tensor d_target, Tensor to_targets,
                Tensor to_particles, Tensor x, Tensor cond, Tensor uncond, Tensor noise, Tensor omega_,
                double omega_value, Tensors table, Tensors levels_, int prediction, Tensor churn, double churn_value,
                Tensor seed_, std::optional<int64_t> seed_value, int64_t first_sample, Tensor target, int kind,
                int64_t m, int64_t k, Tensor target_seed, std::optional<int64_t> target_seed_value, int threads) {
               const auto scalars = step_scalars(omega_, omega_value, table, levels_, prediction, churn, churn_value);
               const auto forward = guided_energy_of(x, cond, uncond, noise, scalars, seed_, seed_value, first_sample,
                                                     target, kind, m, k, target_seed, target_seed_value);
               const auto op = guided_energy_backward_of(d_x, d_cond, d_uncond, d_noise, d_target, to_targets,
                                                         to_particles, forward);
               const auto [batch, row] = ParticleSizes(Sizes(x), m);
               py::gil_scoped_release release;
               wide(forward.x, forward.cond, forward.uncond, forward.noise, forward.target)
                   ? run<double>(op, batch, row, threads)
                   : run<float>(op, batch, row, threads);
             });
  module.def("energy_curve", [](Tensor found, Tensor statistics, Tensor shifts, int64_t m, int64_t k, double beta,
                                double lam, bool unbiased, int order, int threads) {
    const EnergyCurve curve{m, k, beta, lam, unbiased, order};
    const Rows out = rows(found), of = rows(statistics), at = rows(shifts);
    const Sizes sizes(shifts);
    py::gil_scoped_release release;
    for_tasks(sizes.batch, sizes.batch * sizes.row > 512 ? threads : 1, [&](int64_t item) {
      Watch watch;
      for (int64_t first = 0; first < sizes.row && !watch.stops(); first += kCurveShifts)
        energy_curve(curve, of.at<double>(item, 0), at.at<double>(item, first),
                     std::min(kCurveShifts, sizes.row - first), out.at<double>(item, first));
    });
  });
});

}  // namespace lgd
