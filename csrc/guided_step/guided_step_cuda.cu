#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "guided_step_cuda.h"

namespace lgd {
namespace {

// In the precision of the levels, then float. Every thread computes them for its sample: the loads are shared by the
// cache, and a second kernel or a barrier would cost more.
__device__ __forceinline__ StepCoefficients<float> coefficients(const StepScalars& scalars, int64_t sample) {
  if (scalars.levels.dtype == DType::f64) {
    const double churn = scalars.churn.at<double>(sample);
    const auto wide = step_coefficients<double>(scalars.levels, sample, scalars.prediction, churn);
    return {float(wide.x), float(wide.guided), float(wide.noise)};
  }
  return step_coefficients<float>(scalars.levels, sample, scalars.prediction, scalars.churn.at<float>(sample));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) forward(GuidedStep op, Tiling tiling) {
  const Place at(tiling);
  if (!at.count) return;
  const auto k = coefficients(op.scalars, at.sample);
  const float omega = op.scalars.omega.at<float>(at.sample);
  float x[kVector], cond[kVector], uncond[kVector], z[kVector];
  Access<T>::load(op.x, at.sample, at.first, at.count, x);
  Access<T>::load(op.cond, at.sample, at.first, at.count, cond);
  Access<T>::load(op.uncond, at.sample, at.first, at.count, uncond);
  if (op.noise.data) Access<T>::load(op.noise, at.sample, at.first, at.count, z);
  if (op.draws) {
    const uint64_t key = op.seed.key(at.sample), quad = uint64_t(at.first) >> 2;
    const uint32_t index = op.seed.index(at.sample);
    float low[4], high[4];
    philox_normal4(key, quad, index, kStreamStep, low);
    philox_normal4(key, quad + 1, index, kStreamStep, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z[i] = low[i];
      z[i + 4] = high[i];
    }
  }
  const bool noisy = op.draws || op.noise.data;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    x[i] = k.x * x[i] + k.guided * (cond[i] + omega * (cond[i] - uncond[i]));
    if (noisy) x[i] += k.noise * z[i];
  }
  Access<T>::store(op.x_s, at.sample, at.first, at.count, x);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) backward(GuidedStepBackward op, Tiling tiling, float* parts) {
  const Place at(tiling);
  float sum = 0;
  if (at.count) {
    const auto k = coefficients(op.scalars, at.sample);
    const float omega = op.scalars.omega.at<float>(at.sample);
    float upstream[kVector], cond[kVector], uncond[kVector];
    Access<T>::load(op.d_x_s, at.sample, at.first, at.count, upstream);
    if (parts) {
      Access<T>::load(op.cond, at.sample, at.first, at.count, cond);
      Access<T>::load(op.uncond, at.sample, at.first, at.count, uncond);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += upstream[i] * (cond[i] - uncond[i]);
      sum *= k.guided;
    }
    store_scaled<T>(op.d_x, at, k.x, upstream);
    store_scaled<T>(op.d_cond, at, k.guided * (1 + omega), upstream);
    store_scaled<T>(op.d_uncond, at, -k.guided * omega, upstream);
    store_scaled<T>(op.d_noise, at, k.noise, upstream);
  }
  if (!parts) return;
  sum = group_sum(sum, tiling.log_columns);
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
