// How a CPU kernel walks its data: in blocks of a row, each read as the arithmetic type whatever the storage type.
//
// A kernel's own loops then know two types, float and double. A tensor that is stored as the arithmetic type is used
// where it lies; any other passes through a block buffer that never leaves the nearest cache.
#pragma once
#include <cstdint>
#include <type_traits>

#include "scalar.h"

namespace lgd {

constexpr int64_t kBlock = 1024;  // elements; five float buffers fill two thirds of a 32 KiB cache
constexpr int64_t kChunk = 8192;  // elements per task; fixed, so that a sum does not depend on the thread count

LGD_INLINE int64_t chunks_of(int64_t row) { return row <= kChunk ? 1 : (row + kChunk - 1) / kChunk; }

// B rows of contiguous elements, `stride` elements apart (0: one row for all samples). Null data: absent.
struct Rows {
  void* data;
  DType dtype;
  int64_t stride;

  template <class T>
  LGD_INLINE T* at(int64_t sample, int64_t element) const {
    return static_cast<T*>(data) + sample * stride + element;
  }
};

template <class T>
constexpr DType dtype_of() {
  return std::is_same<T, float>::value ? DType::f32 : DType::f64;
}

// The block as S: in place where it is stored so, in `buffer` otherwise.
template <class S>
const S* read_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, S* buffer);

// Where the kernel should write the block; `write_block` then rounds it to where it belongs.
template <class S>
S* open_block(const Rows& rows, int64_t sample, int64_t first, S* buffer) {
  return rows.dtype == dtype_of<S>() ? rows.at<S>(sample, first) : buffer;
}
template <class S>
void write_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, const S* block);

}  // namespace lgd
