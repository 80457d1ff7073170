#include "../../csrc/guided_score/guided_score_cuda.h"
#include "../arguments.h"
#include "launch.h"

namespace py = pybind11;

namespace lgd {

void bind_guided_score_cuda(py::module_& module) {
  module.def("guided_score", [](RowsArgument guided, RowsArgument cond, RowsArgument uncond, PerSampleArgument omega_,
                                std::optional<TableArgument> table, int64_t batch, int64_t row, Address stream) {
    const GuidedScore op{rows(guided), rows(cond), rows(uncond), omega(omega_, table)};
    check(guided_score_cuda(op, batch, row, reinterpret_cast<void*>(stream)), "guided_score");
  });
  module.def("guided_score_backward", [](RowsArgument d_cond, RowsArgument d_uncond, Address parts,
                                         RowsArgument d_guided, RowsArgument cond, RowsArgument uncond,
                                         PerSampleArgument omega_, std::optional<TableArgument> table, int64_t batch,
                                         int64_t row, Address stream) {
    const GuidedScoreBackward op{rows(d_cond), rows(d_uncond), rows(d_guided),
                                 rows(cond),   rows(uncond),   omega(omega_, table)};
    check(guided_score_backward_cuda(op, batch, row, reinterpret_cast<float*>(parts), reinterpret_cast<void*>(stream)),
          "guided_score_backward");
  });
}

}  // namespace lgd
