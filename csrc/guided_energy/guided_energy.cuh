// Device functions of the CUDA kernels: an item's scalars, its guided particles and its targets, in registers.
#pragma once
#include "../common/vec.cuh"
#include "guided_energy.h"

namespace lgd {

// The scalars of a block's item.
struct Scalars {
  double x, guided, omega, signal;  // around signal x0 in double: particles near it keep their distance
  float noise, target_noise;
  uint64_t key, target_key;
  uint32_t index, target_index;  // of the first particle

  __device__ __forceinline__ void of(const GuidedEnergy& op, int64_t item) {
    const double churn = op.scalars.churn.at<double>(item);
    const auto step = step_coefficients<double>(op.scalars.levels, item, op.scalars.prediction, churn);
    x = step.x;
    guided = step.guided;
    omega = op.scalars.omega.at<double>(item);
    signal = op.scalars.levels.at<double>(2, item);
    noise = float(step.noise);
    target_noise = float(op.scalars.levels.at<double>(3, item));
    key = op.seed.key(item);
    index = op.seed.index(item, 0, op.m);
    target_key = op.target.seed.key(item);
    target_index = op.target.seed.index(item, 0, op.target.k);
  }
};

// Reads 16 bytes of a row; of mixed types, four elements, 0 from `count` on.
template <class T>
struct Read {
  typedef Pack<T> type;
  static __device__ __forceinline__ type at(const Rows& rows, int64_t row, int64_t first, int) {
    return *reinterpret_cast<const type*>(rows.at<T>(row, first));
  }
};
template <>
struct Read<Mixed> {
  typedef Pack<float> type;
  static __device__ __forceinline__ type at(const Rows& rows, int64_t row, int64_t first, int count) {
    type read;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      read.value[i] = i < count ? load_scalar<float>(rows.data, rows.dtype, row * rows.stride + first + i) : 0.0f;
    return read;
  }
};
template <class T>
constexpr int kWidth = sizeof(typename Read<T>::type) / sizeof(typename Read<T>::type().value[0]);

template <class T>
struct Particle {
  typename Read<T>::type x, cond, uncond;

  __device__ __forceinline__ void load(const GuidedEnergy& op, int64_t row, int64_t at, int count) {
    x = Read<T>::at(op.x, row, at, count);
    cond = Read<T>::at(op.cond, row, at, count);
    uncond = Read<T>::at(op.uncond, row, at, count);
  }
};

// Computes elements 4 quad to 4 quad + 3 of a particle before its noise, and of its slope.
template <class T>
__device__ __forceinline__ void guide(const GuidedEnergy& op, const Scalars& k, const Particle<T>& from,
                                      const typename Read<T>::type& x0, int quad, float (&x_s)[4], float (&slope)[4]) {
  const bool centred = op.target.kind != Targets::tensor;
  const float a = float(k.x), b = float(k.guided), omega = float(k.omega);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = to_float(from.x.value[4 * quad + i]), c = to_float(from.cond.value[4 * quad + i]);
    const float u = to_float(from.uncond.value[4 * quad + i]);
    slope[i] = b * (c - u);
    if (centred)
      x_s[i] =
          float(k.x * x + k.guided * (c + k.omega * (double(c) - u)) - k.signal * to_float(x0.value[4 * quad + i]));
    else
      x_s[i] = a * x + b * (c + omega * (c - u));
  }
}

// Adds the noise to these elements. (It is not read with the other tensors: that would take registers of the sums.)
template <class T>
__device__ __forceinline__ void disturb(const GuidedEnergy& op, const Scalars& k, int64_t row, int j, int64_t at,
                                        int quad, int count, float (&x_s)[4]) {
  float z[4];
  if (op.draws) {
    philox_normal4(k.key, (uint64_t(at) >> 2) + quad, k.index + j, kStreamStep, z);
  } else {
    const auto read = Read<T>::at(op.noise, row, at, count);
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = to_float(read.value[4 * quad + i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x_s[i] += k.noise * z[i];
}

// Computes the same elements of target t.
template <class T>
__device__ __forceinline__ void aim(const GuidedEnergy& op, const Scalars& k, const typename Read<T>::type& from, int t,
                                    int64_t at, int quad, float (&y)[4]) {
  float z[4] = {0, 0, 0, 0};
  if (op.target.kind == Targets::renoise)
    philox_normal4(k.target_key, (uint64_t(at) >> 2) + quad, k.target_index + t, kStreamTargets, z);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    y[i] = op.target.kind == Targets::tensor ? to_float(from.value[4 * quad + i]) : k.target_noise * z[i];
}

}  // namespace lgd
