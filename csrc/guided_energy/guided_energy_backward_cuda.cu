// The gradient to the data. A thread has the same 16 bytes of all rows of an item. It computes four particles at a time
// and weighs their differences from every target and every particle; then, if there are more than four particles, it
// does the same for four targets at a time. Data read again is in the first-level cache.
#include "guided_energy.cuh"
#include "guided_energy_cuda.h"

namespace lgd {
namespace {

constexpr int kPulling = 128;  // threads of a block
constexpr int kHeld = 4;       // particles, or targets, in registers

template <class T>
using Quads = float[kWidth<T> / 4][4];

// Where a thread works: `count` elements from `first` on.
struct Spot {
  int64_t item, first;
  int count;
};

template <class T>
__device__ __forceinline__ void particle(const GuidedEnergy& op, const Scalars& k, const Spot& at, int j,
                                         const typename Read<T>::type& x0, Quads<T>& x_s) {
  const int64_t row = at.item * op.m + j;
  Particle<T> from;
  from.load(op, row, at.first, at.count);
#pragma unroll
  for (int quad = 0; quad < kWidth<T> / 4; ++quad) {
    float slope[4];
    guide<T>(op, k, from, x0, quad, x_s[quad], slope);
    if (op.draws || op.noise.data) disturb<T>(op, k, row, j, at.first, quad, at.count, x_s[quad]);
  }
}

template <class T>
__device__ __forceinline__ void target(const GuidedEnergy& op, const Scalars& k, const Spot& at, int t, Quads<T>& y) {
  typename Read<T>::type from;
  if (op.target.kind == Targets::tensor)
    from = Read<T>::at(op.target.data, at.item * op.target.k + t, at.first, at.count);
#pragma unroll
  for (int quad = 0; quad < kWidth<T> / 4; ++quad) aim<T>(op, k, from, t, at.first, quad, y[quad]);
}

// Adds weight (from - other) to `to`, and its opposite to `back`.
template <class T>
__device__ __forceinline__ void pull(Quads<T>& to, Quads<T>& back, float weight, const Quads<T>& from,
                                     const Quads<T>& other) {
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    const float force = weight * (from[i / 4][i % 4] - other[i / 4][i % 4]);
    to[i / 4][i % 4] += force;
    back[i / 4][i % 4] -= force;
  }
}

template <class T>
__device__ __forceinline__ void put(const Rows& rows, const Spot& at, int64_t row, float factor, const Quads<T>& from) {
  if (!rows.data) return;
  if constexpr (std::is_same<T, Mixed>::value) {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (i >= at.count) return;
      const float value = factor * from[i / 4][i % 4];
      if (rows.dtype == DType::f32) *rows.at<float>(row, at.first + i) = value;
      if (rows.dtype == DType::bf16) *rows.at<bf16>(row, at.first + i) = from_float<bf16>(value);
      if (rows.dtype == DType::f16) *rows.at<f16>(row, at.first + i) = from_float<f16>(value);
    }
  } else {
    Pack<T> written;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) written.value[i] = from_float<T>(factor * from[i / 4][i % 4]);
    *reinterpret_cast<Pack<T>*>(rows.at<T>(row, at.first)) = written;
  }
}

template <class T>
__global__ void __launch_bounds__(kPulling, 2) backward(GuidedEnergyBackward op, int64_t row, int blocks) {
  LGD_SHARED(k, Scalars);
  const GuidedEnergy& data = op.forward;
  const int m = int(data.m), targets = int(data.target.k);
  Spot at{blockIdx.x / blocks, (int64_t(blockIdx.x % blocks) * kPulling + threadIdx.x) * kWidth<T>, 0};
  if (threadIdx.x == 0) k.of(data, at.item);
  __syncthreads();
  if (at.first >= row) return;
  at.count = row - at.first < kWidth<T> ? int(row - at.first) : kWidth<T>;
  const double *to_targets = op.to_targets + at.item * m * targets,
               *to_particles = op.to_particles + at.item * data.pairs();
  const bool made = data.target.kind != Targets::tensor;
  typename Read<T>::type x0;
  if (made) x0 = Read<T>::at(data.target.data, at.item, at.first, at.count);

  Quads<T> all = {};  // pulls at the targets, with the opposite sign
  for (int first = 0; first < m; first += kHeld) {
    Quads<T> x_s[kHeld], pulls[kHeld] = {};
#pragma unroll
    for (int j = 0; j < kHeld; ++j) particle<T>(data, k, at, first + j < m ? first + j : m - 1, x0, x_s[j]);
    for (int t = 0; t < targets; ++t) {
      Quads<T> y, back = {};
      target<T>(data, k, at, t, y);
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (first + j < m) pull<T>(pulls[j], back, float(to_targets[(first + j) * targets + t]), x_s[j], y);
      if (made) {
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) all[i / 4][i % 4] += back[i / 4][i % 4];
      } else if (m <= kHeld) {
        put<T>(op.d_target, at, at.item * targets + t, 1.0f, back);
      }
    }
    for (int l = 0; l < m; ++l) {
      Quads<T> other, unused = {};
      particle<T>(data, k, at, l, x0, other);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int low = first + j < l ? first + j : l, high = first + j < l ? l : first + j;
        if (low == high || high >= m) continue;
        const int pair = low * m - low * (low + 1) / 2 + high - low - 1;
        pull<T>(pulls[j], unused, float(to_particles[pair]), x_s[j], other);
      }
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (first + j >= m) break;
      const int64_t to = at.item * m + first + j;
      put<T>(op.d_x, at, to, float(k.x), pulls[j]);
      put<T>(op.d_cond, at, to, float(k.guided * (1 + k.omega)), pulls[j]);
      put<T>(op.d_uncond, at, to, float(-k.guided * k.omega), pulls[j]);
      put<T>(op.d_noise, at, to, k.noise, pulls[j]);
    }
  }
  if (made) put<T>(op.d_target, at, at.item, float(k.signal), all);
  if (made || m <= kHeld || !op.d_target.data) return;
  for (int first = 0; first < targets; first += kHeld) {
    Quads<T> y[kHeld], pulls[kHeld] = {};
#pragma unroll
    for (int t = 0; t < kHeld; ++t) target<T>(data, k, at, first + t < targets ? first + t : targets - 1, y[t]);
    for (int j = 0; j < m; ++j) {
      Quads<T> x_s, unused = {};
      particle<T>(data, k, at, j, x0, x_s);
#pragma unroll
      for (int t = 0; t < kHeld; ++t)
        if (first + t < targets) pull<T>(pulls[t], unused, float(to_targets[j * targets + first + t]), y[t], x_s);
    }
#pragma unroll
    for (int t = 0; t < kHeld; ++t)
      if (first + t < targets) put<T>(op.d_target, at, at.item * targets + first + t, 1.0f, pulls[t]);
  }
}

}  // namespace

int guided_energy_backward_cuda(const GuidedEnergyBackward& op, int64_t batch, int64_t row, void* stream) {
  const auto launch = [&](auto type) {
    using T = decltype(type);
    const int64_t elements = int64_t(kPulling) * kWidth<T>, blocks = (row + elements - 1) / elements;
    LGD_LAUNCH(backward<T>, batch * blocks, kPulling, stream, op, row, int(blocks));
  };
  const GuidedEnergy& data = op.forward;
  dispatch(row, launch, data.x, data.cond, data.uncond, data.noise, data.target.data, op.d_x, op.d_cond, op.d_uncond,
           op.d_noise, op.d_target);
  return cudaGetLastError();
}

}  // namespace lgd
