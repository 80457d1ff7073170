// Sums over the threads that share a sample. They are added in a fixed tree, without atomics: the bits never change.
#pragma once
#include "vec.cuh"

namespace lgd {

// Returns the sum over this thread's group of 2^log_columns neighbours, in the first of them. All threads of the block
// call it.
__device__ __forceinline__ float group_sum(float value, int log_columns) {
  const int within = log_columns < 5 ? log_columns : 5;
  for (int step = (1 << within) >> 1; step > 0; step >>= 1) value += __shfl_down_sync(0xffffffffu, value, step);
  if (log_columns <= 5) return value;
  LGD_SHARED(warps, float[kThreads / 32]);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  const int group_warps = 1 << (log_columns - 5);
  if (threadIdx.x % (32 * group_warps) == 0) {
    value = 0;
    for (int i = 0; i < group_warps; ++i) value += warps[threadIdx.x / 32 + i];
  }
  return value;
}

}  // namespace lgd
