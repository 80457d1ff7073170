#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "guided_step_cuda.h"

namespace lgd {
namespace {

struct Coefficients {
  float x, guided, noise, omega;
};

// Computed in the precision of the levels, rounded to float.
__device__ __forceinline__ Coefficients coefficients(const StepScalars& scalars, int64_t sample) {
  const float omega = scalars.omega.at<float>(sample);
  if (scalars.levels.dtype == DType::f64) {
    const double churn = scalars.churn.at<double>(sample);
    const auto step = step_coefficients<double>(scalars.levels, sample, scalars.prediction, churn);
    return {float(step.x), float(step.guided), float(step.noise), omega};
  }
  const float churn = scalars.churn.at<float>(sample);
  const auto step = step_coefficients<float>(scalars.levels, sample, scalars.prediction, churn);
  return {step.x, step.guided, step.noise, omega};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) forward(GuidedStep op, Tiling tiling) {
  const Place at(tiling);
  Elements<T> x, cond, uncond, noise;
  if (at.count) {
    x.load(op.x, at);
    cond.load(op.cond, at);
    uncond.load(op.uncond, at);
    if (op.noise.data) noise.load(op.noise, at);
  }
  const auto k = once_per_sample(tiling, at, [&](int64_t sample) { return coefficients(op.scalars, sample); });
  if (!at.count) return;
  float x_s[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) x_s[i] = k.x * x[i] + k.guided * (cond[i] + k.omega * (cond[i] - uncond[i]));
  if (op.draws) {
    const uint64_t key = op.seed.key(at.sample), quad = uint64_t(at.first) >> 2;
    const uint32_t index = op.seed.index(at.sample);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float z[4];
      philox_normal4(key, quad + half, index, kStreamStep, z);
#pragma unroll
      for (int i = 0; i < 4; ++i) x_s[4 * half + i] += k.noise * z[i];
    }
  } else if (op.noise.data) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x_s[i] += k.noise * noise[i];
  }
  store<T>(op.x_s, at, x_s);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) backward(GuidedStepBackward op, Tiling tiling, float* parts) {
  const Place at(tiling);
  Elements<T> upstream, cond, uncond;
  if (at.count) {
    upstream.load(op.d_x_s, at);
    if (parts) {
      cond.load(op.cond, at);
      uncond.load(op.uncond, at);
    }
  }
  const auto k = once_per_sample(tiling, at, [&](int64_t sample) { return coefficients(op.scalars, sample); });
  if (at.count) {
    store_scaled<T>(op.d_x, at, k.x, upstream);
    store_scaled<T>(op.d_cond, at, k.guided * (1 + k.omega), upstream);
    store_scaled<T>(op.d_uncond, at, -k.guided * k.omega, upstream);
    store_scaled<T>(op.d_noise, at, k.noise, upstream);
  }
  if (!parts) return;
  float sum = 0;
  if (at.count) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += upstream[i] * (cond[i] - uncond[i]);
  }
  sum = k.guided * group_sum(sum, tiling.log_columns);
  const bool leads = (threadIdx.x & ((1 << tiling.log_columns) - 1)) == 0;
  if (leads && at.count) parts[at.sample * tiling.column_blocks + at.column_block] = sum;
}

}  // namespace

int guided_step_cuda(const GuidedStep& op, int64_t batch, int64_t row, void* stream) {
  const Tiling tiling = Tiling::of(batch, row);
  const auto launch = [&](auto type) {
    LGD_LAUNCH(forward<decltype(type)>, tiling.blocks(), kThreads, stream, op, tiling);
  };
  dispatch(row, launch, op.x_s, op.x, op.cond, op.uncond, op.noise);
  return cudaGetLastError();
}

int guided_step_backward_cuda(const GuidedStepBackward& op, int64_t batch, int64_t row, float* parts, void* stream) {
  const Tiling tiling = Tiling::of(batch, row);
  const auto launch = [&](auto type) {
    LGD_LAUNCH(backward<decltype(type)>, tiling.blocks(), kThreads, stream, op, tiling, parts);
  };
  dispatch(row, launch, op.d_x_s, op.cond, op.uncond, op.d_x, op.d_cond, op.d_uncond, op.d_noise);
  return cudaGetLastError();
}

}  // namespace lgd
