// How a CUDA kernel walks its data. A thread has eight elements; a block of 256 threads has a tile of one or more
// samples.
#pragma once
#include "launch.cuh"
#include "rows.h"

namespace lgd {

constexpr int kVector = 8;     // 16 bytes of half, twice 16 bytes of float
constexpr int kThreads = 256;  // of a block
constexpr int kBlocks = 3;     // at least, on a multiprocessor; without this bound ptxas aims higher and spills

// The type argument of a kernel whose tensors are stored as different types, or cannot be read 16 bytes at a time. It
// reads element by element.
struct Mixed {};

template <class T>
struct alignas(16) Pack {
  T value[16 / sizeof(T)];
};

// A block's tile: 2^(8 - log_columns) samples by 2^log_columns vectors, so that a block has many short samples.
struct Tiling {
  int64_t batch, row;
  int log_columns;
  int column_blocks;

  static Tiling of(int64_t batch, int64_t row) {
    int log_columns = 0;
    while (log_columns < 8 && (int64_t(kVector) << log_columns) < row) ++log_columns;
    const int64_t tile = int64_t(kVector) << log_columns;
    return {batch, row, log_columns, int((row + tile - 1) / tile)};
  }
  int64_t blocks() const {
    const int samples = kThreads >> log_columns;
    return (batch + samples - 1) / samples * column_blocks;
  }
};

// Where this thread works: `count` elements (at most eight; 0 outside) of `sample` from `first` on.
struct Place {
  int64_t sample, first;
  int count, column_block;

  __device__ __forceinline__ explicit Place(const Tiling& tiling) {
    const int row_block = blockIdx.x / tiling.column_blocks;
    column_block = blockIdx.x % tiling.column_blocks;
    const int columns = 1 << tiling.log_columns;
    sample = int64_t(row_block) * (kThreads >> tiling.log_columns) + (threadIdx.x >> tiling.log_columns);
    first = (int64_t(column_block) * columns + (threadIdx.x & (columns - 1))) * kVector;
    const int64_t left = sample < tiling.batch ? tiling.row - first : 0;
    count = int(left < 0 ? 0 : left < kVector ? left : kVector);
  }
};

// A thread's elements of a tensor, as they are stored. They are converted where they are used: a conversion right after
// a load would wait for it.
template <class T>
struct Elements {
  static constexpr int kWidth = 16 / sizeof(T);
  Pack<T> packs[kVector / kWidth];

  __device__ __forceinline__ void load(const Rows& rows, const Place& at) {
    const auto* from = reinterpret_cast<const Pack<T>*>(rows.at<T>(at.sample, at.first));
#pragma unroll
    for (int pack = 0; pack < kVector / kWidth; ++pack) packs[pack] = from[pack];
  }
  __device__ __forceinline__ float operator[](int i) const { return to_float(packs[i / kWidth].value[i % kWidth]); }
};
template <>
struct Elements<Mixed> {
  float values[kVector];

  __device__ __forceinline__ void load(const Rows& rows, const Place& at) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[i] = i < at.count ? load_scalar<float>(rows.data, rows.dtype, at.sample * rows.stride + at.first + i) : 0;
  }
  __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};

template <class T>
__device__ __forceinline__ void store(const Rows& rows, const Place& at, const float (&from)[kVector]) {
  if constexpr (std::is_same<T, Mixed>::value) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= at.count) return;
      if (rows.dtype == DType::f32) *rows.at<float>(at.sample, at.first + i) = from[i];
      if (rows.dtype == DType::bf16) *rows.at<bf16>(at.sample, at.first + i) = from_float<bf16>(from[i]);
      if (rows.dtype == DType::f16) *rows.at<f16>(at.sample, at.first + i) = from_float<f16>(from[i]);
    }
  } else {
    constexpr int kWidth = 16 / sizeof(T);
    auto* to = reinterpret_cast<Pack<T>*>(rows.at<T>(at.sample, at.first));
#pragma unroll
    for (int pack = 0; pack < kVector / kWidth; ++pack) {
      Pack<T> written;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) written.value[i] = from_float<T>(from[pack * kWidth + i]);
      to[pack] = written;
    }
  }
}

// Stores factor * from in an output that may be absent.
template <class T>
__device__ __forceinline__ void store_scaled(const Rows& rows, const Place& at, float factor, const Elements<T>& from) {
  if (!rows.data) return;
  float to[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = factor * from[i];
  store<T>(rows, at, to);
}

// Returns of(sample) for the thread's sample. One thread computes it for each sample of the block, since a lookup in a
// table takes hundreds of instructions. Data that was loaded before the call arrives meanwhile. All threads call it.
template <class Of>
__device__ __forceinline__ auto once_per_sample(const Tiling& tiling, const Place& at, const Of& of) {
  LGD_SHARED(found, decltype(of(int64_t(0)))[kThreads]);
  const int place = threadIdx.x >> tiling.log_columns, samples = kThreads >> tiling.log_columns;
  const int64_t sample = at.sample - place + threadIdx.x;
  if (int(threadIdx.x) < samples && sample < tiling.batch) found[threadIdx.x] = of(sample);
  __syncthreads();
  return found[place];
}

// Whether every tensor that is present is stored as `dtype`, with rows that can be read 16 bytes at a time.
template <class... R>
bool vectorises(DType dtype, int64_t row, const R&... tensors) {
  const auto fits = [&](const Rows& rows) {
    return !rows.data ||
           (rows.dtype == dtype && rows.stride % kVector == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0);
  };
  return row % kVector == 0 && (fits(tensors) && ...);
}

// Calls launch(T{}) with the storage type T that all tensors share and can be read in 16 bytes at a time, or
// launch(Mixed{}).
template <class Launch, class... R>
void dispatch(int64_t row, const Launch& launch, const Rows& first, const R&... rest) {
  if (vectorises(DType::f32, row, first, rest...)) return launch(float{});
  if (vectorises(DType::bf16, row, first, rest...)) return launch(bf16{});
  if (vectorises(DType::f16, row, first, rest...)) return launch(f16{});
  launch(Mixed{});
}

}  // namespace lgd
