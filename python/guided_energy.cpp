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
  static thread_local std::vector<S> kept;  // for the next block and the next call
  kept.resize(std::max<size_t>(kept.size(), guided_energy_scratch(op)));
  return kept.data();
}

// Calls work(first, last) for pieces of a stretch of a row: whole spans, about 2^24 pairs of elements (5 ms) each.
template <class Work>
void in_pieces(const GuidedEnergy& op, int64_t first, int64_t last, const Work& work) {
  Watch watch;
  const int64_t length = std::max<int64_t>(1, (1 << 16) / (op.m * (op.target.k + op.m))) * kEnergySpan;
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
struct Outputs {
  S *loss, *slope;     // [B]
  double* statistics;  // [B, op.statistics()]
};

template <class S>
void run(const GuidedEnergy& op, const EnergyOptions& options, int64_t batch, int64_t row, int threads,
         const Outputs<S>& out) {
  const auto work = [&](int64_t item, int64_t first, int64_t last, double* sums) {
    S* kept = scratch<S>(op);
    in_pieces(op, first, last, [&](int64_t from, int64_t to) { guided_energy<S>(op, item, from, to, sums, kept); });
  };
  const int64_t count = op.statistics();
  reduce_rows(batch, row, threads, count, out.statistics, work, [&](int64_t item) {
    const Energy energy = guided_energy_finish(op, item, row, out.statistics + item * count, options);
    out.loss[item] = S(energy.loss);
    out.slope[item] = S(energy.slope);
  });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("guided_energy", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields to(outputs), from(arguments);
    const auto op = guided_energy_of(from.fields(0), call);
    const auto options = energy_options_of(from.fields(1));
    const auto [batch, row] = particle_sizes(op, from.fields(0)[0]);
    void *loss = address(to[0]), *slope = address(to[1]);
    auto* statistics = static_cast<double*>(address(to[2]));
    py::gil_scoped_release release;
    wide(op.x, op.cond, op.uncond, op.noise, op.target.data)
        ? run(op, options, batch, row, threads,
              Outputs<double>{static_cast<double*>(loss), static_cast<double*>(slope), statistics})
        : run(op, options, batch, row, threads,
              Outputs<float>{static_cast<float*>(loss), static_cast<float*>(slope), statistics});
  });
  module.def("guided_energy_backward", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields from(arguments);
    const auto op = guided_energy_backward_of(Fields(outputs), from, call);
    const GuidedEnergy& forward = op.forward;
    const auto [batch, row] = particle_sizes(forward, from.fields(0)[0]);
    py::gil_scoped_release release;
    wide(forward.x, forward.cond, forward.uncond, forward.noise, forward.target.data)
        ? run<double>(op, batch, row, threads)
        : run<float>(op, batch, row, threads);
  });
  module.def("energy_curve", [](Tensor found, Tensor statistics, Tensor shifts, Tensor arguments, int threads) {
    const Fields from(arguments);
    const EnergyDerivative of{from.integer(0), from.integer(1), energy_options_of(from.fields(2)),
                              int(from.integer(3))};
    const Rows out = rows(found), at = rows(statistics), by = rows(shifts);
    const Sizes sizes(shifts);
    py::gil_scoped_release release;
    for_tasks(sizes.batch, sizes.batch * sizes.row > 512 ? threads : 1, [&](int64_t item) {
      Watch watch;
      for (int64_t first = 0; first < sizes.row && !watch.stops(); first += kCurveShifts)
        energy_curve(of, at.at<double>(item, 0), by.at<double>(item, first), std::min(kCurveShifts, sizes.row - first),
                     out.at<double>(item, first));
    });
  });
});

}  // namespace lgd
