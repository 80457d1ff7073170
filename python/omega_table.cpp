#include "arguments.h"
#include "binding.h"

namespace py = pybind11;

namespace lgd {
namespace {

template <class S>
void spread(const OmegaTable& table, const S* gradient, int64_t batch, S* total) {
  for (int64_t sample = 0; sample < batch; ++sample) {
    const TableCells<double> at(table, sample);
    for (int i = 0; at.known && i < 4; ++i) total[at.cell[i]] += S(at.weight[i] * double(gradient[sample]));
  }
}

}  // namespace

const Binding binding([](py::module_& module) {
  // Adds the gradient of each sample's omega [B] to the cells that its omega was read from, one sample after the other.
  // Both tensors are contiguous and of one dtype, float32 or float64.
  module.def("spread_over_table", [](Tensor total, Tensor gradient, Tensor looked_up) {
    Call call;
    const OmegaTable cells = omega(Fields(looked_up), call).table;
    const Rows to = rows(total), from = rows(gradient);
    const int64_t batch = size(gradient, 0);
    py::gil_scoped_release release;
    wide(from) ? spread(cells, from.at<double>(0, 0), batch, to.at<double>(0, 0))
               : spread(cells, from.at<float>(0, 0), batch, to.at<float>(0, 0));
  });
});

}  // namespace lgd
