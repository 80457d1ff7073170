// Launchers: they start one kernel on the stream, allocate nothing and do not synchronise. They return a cudaError_t.
#pragma once
#include "guided_step.h"

namespace lgd {

int guided_step_cuda(const GuidedStep& op, int64_t batch, int64_t row, void* stream);
// parts: [B, column blocks of Tiling], to be summed along the second dimension; or null.
int guided_step_backward_cuda(const GuidedStepBackward& op, int64_t batch, int64_t row, float* parts, void* stream);

}  // namespace lgd
