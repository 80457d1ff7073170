// Launchers: they start one kernel on the stream, allocate nothing and do not synchronise. They return a cudaError_t.
#pragma once
#include "guided_score.h"

namespace lgd {

int guided_score_cuda(const GuidedScore& op, int64_t batch, int64_t row, void* stream);
// parts: [B, column blocks of Tiling], to be summed along the second dimension; or null.
int guided_score_backward_cuda(const GuidedScoreBackward& op, int64_t batch, int64_t row, float* parts, void* stream);

}  // namespace lgd
