// How a CUDA kernel walks its data: eight elements to a thread, 256 threads to a tile of one or more samples.
#pragma once
#include "launch.cuh"
#include "rows.h"

namespace lgd {

constexpr int kVector = 8;     // 16 bytes of half, twice 16 bytes of float
constexpr int kThreads = 256;  // of a block
constexpr int kBlocks = 3;     // at least, on a multiprocessor: set explicitly, else ptxas aims higher and spills

// Tensors of one storage type, read 16 bytes at a time; or of any, told by the tensor, element by element.
struct Mixed {};

template <class T>
struct alignas(16) Pack {
  T value[16 / sizeof(T)];
};

template <class T>
struct Access {
  static __device__ __forceinline__ void load(const Rows& rows, int64_t sample, int64_t first, int,
                                              float (&to)[kVector]) {
    constexpr int kWidth = 16 / sizeof(T);
    const auto* from = reinterpret_cast<const Pack<T>*>(rows.at<T>(sample, first));
#pragma unroll
    for (int pack = 0; pack < kVector / kWidth; ++pack) {
      const Pack<T> read = from[pack];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) to[pack * kWidth + i] = to_float(read.value[i]);
    }
  }
  static __device__ __forceinline__ void store(const Rows& rows, int64_t sample, int64_t first, int,
                                               const float (&from)[kVector]) {
    constexpr int kWidth = 16 / sizeof(T);
    auto* to = reinterpret_cast<Pack<T>*>(rows.at<T>(sample, first));
#pragma unroll
    for (int pack = 0; pack < kVector / kWidth; ++pack) {
      Pack<T> written;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) written.value[i] = from_float<T>(from[pack * kWidth + i]);
      to[pack] = written;
    }
  }
};

template <>
struct Access<Mixed> {
  static __device__ __forceinline__ void load(const Rows& rows, int64_t sample, int64_t first, int count,
                                              float (&to)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      to[i] = i < count ? load_scalar<float>(rows.data, rows.dtype, sample * rows.stride + first + i) : 0.0f;
  }
  static __device__ __forceinline__ void store(const Rows& rows, int64_t sample, int64_t first, int count,
                                               const float (&from)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) return;
      if (rows.dtype == DType::f32) *rows.at<float>(sample, first + i) = from[i];
      if (rows.dtype == DType::bf16) *rows.at<bf16>(sample, first + i) = from_float<bf16>(from[i]);
      if (rows.dtype == DType::f16) *rows.at<f16>(sample, first + i) = from_float<f16>(from[i]);
    }
  }
};

// A block's tile: 2^(8 - log_columns) samples by 2^log_columns vectors. Many samples where they are short.
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

// An output that may be absent: factor * from.
template <class T>
__device__ __forceinline__ void store_scaled(const Rows& rows, const Place& at, float factor,
                                             const float (&from)[kVector]) {
  if (!rows.data) return;
  float to[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = factor * from[i];
  Access<T>::store(rows, at.sample, at.first, at.count, to);
}

// Every present tensor is stored as `dtype` and its rows can be read 16 bytes at a time.
template <class... R>
bool vectorises(DType dtype, int64_t row, const R&... tensors) {
  const auto fits = [&](const Rows& rows) {
    return !rows.data ||
           (rows.dtype == dtype && rows.stride % kVector == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0);
  };
  return row % kVector == 0 && (fits(tensors) && ...);
}

// launch(T{}) with the storage type that all of them share and vectorise in, or with Mixed{}.
template <class Launch, class... R>
void dispatch(int64_t row, const Launch& launch, const Rows& first, const R&... rest) {
  if (vectorises(DType::f32, row, first, rest...)) return launch(float{});
  if (vectorises(DType::bf16, row, first, rest...)) return launch(bf16{});
  if (vectorises(DType::f16, row, first, rest...)) return launch(f16{});
  launch(Mixed{});
}

}  // namespace lgd
