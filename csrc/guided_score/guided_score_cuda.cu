#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "guided_score_cuda.h"

namespace lgd {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) forward(GuidedScore op, Tiling tiling) {
  const Place at(tiling);
  Elements<T> cond, uncond;
  if (at.count) {
    cond.load(op.cond, at);
    uncond.load(op.uncond, at);
  }
  const float omega = once_per_sample(tiling, at, [&](int64_t sample) { return op.omega.at<float>(sample); });
  if (!at.count) return;
  float guided[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) guided[i] = cond[i] + omega * (cond[i] - uncond[i]);
  store<T>(op.guided, at, guided);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) backward(GuidedScoreBackward op, Tiling tiling, float* parts) {
  const Place at(tiling);
  Elements<T> upstream, cond, uncond;
  if (at.count) {
    upstream.load(op.d_guided, at);
    if (parts) {
      cond.load(op.cond, at);
      uncond.load(op.uncond, at);
    }
  }
  const float omega = once_per_sample(tiling, at, [&](int64_t sample) { return op.omega.at<float>(sample); });
  if (at.count) {
    store_scaled<T>(op.d_cond, at, 1 + omega, upstream);
    store_scaled<T>(op.d_uncond, at, -omega, upstream);
  }
  if (!parts) return;
  float sum = 0;
  if (at.count) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += upstream[i] * (cond[i] - uncond[i]);
  }
  sum = group_sum(sum, tiling.log_columns);
  const bool leads = (threadIdx.x & ((1 << tiling.log_columns) - 1)) == 0;
  if (leads && at.count) parts[at.sample * tiling.column_blocks + at.column_block] = sum;
}

}  // namespace

int guided_score_cuda(const GuidedScore& op, int64_t batch, int64_t row, void* stream) {
  const Tiling tiling = Tiling::of(batch, row);
  const auto launch = [&](auto type) {
    LGD_LAUNCH(forward<decltype(type)>, tiling.blocks(), kThreads, stream, op, tiling);
  };
  dispatch(row, launch, op.guided, op.cond, op.uncond);
  return cudaGetLastError();
}

int guided_score_backward_cuda(const GuidedScoreBackward& op, int64_t batch, int64_t row, float* parts, void* stream) {
  const Tiling tiling = Tiling::of(batch, row);
  const auto launch = [&](auto type) {
    LGD_LAUNCH(backward<decltype(type)>, tiling.blocks(), kThreads, stream, op, tiling, parts);
  };
  dispatch(row, launch, op.d_guided, op.cond, op.uncond, op.d_cond, op.d_uncond);
  return cudaGetLastError();
}

}  // namespace lgd
