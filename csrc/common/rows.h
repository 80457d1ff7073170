// CPU kernels walk data in blocks of a row.
//
// The loops of a kernel handle one type of element. Tensors of that type are read in place; all others are converted
// through a block buffer that stays in the first-level cache.
#pragma once
#include <cstdint>
#include <type_traits>

#include "scalar.h"

namespace lgd {

constexpr int64_t kBlock = 1024;    // elements; five float buffers fill two thirds of a 32 KiB cache
constexpr int64_t kInPlace = 4096;  // if no buffer is needed: the start and end of a loop cost 60 cycles
constexpr int64_t kChunk = 8192;    // elements per task; fixed, so that a sum does not depend on the thread count

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
  if (std::is_same<T, bf16>::value) return DType::bf16;
  return std::is_same<T, float>::value ? DType::f32 : DType::f64;
}

// run(E{}), with E the type of element that the loops read: bf16 if all tensors present are stored so, and then the
// loop itself converts; otherwise the arithmetic type S, and other tensors pass through buffers.
template <class S, class Run, class... R>
auto with_elements(const Run& run, const R&... tensors) {
  if constexpr (std::is_same<S, float>::value)
    if (((!tensors.data || tensors.dtype == DType::bf16) && ...)) return run(bf16{});
  return run(S{});
}

// The number of elements of a block.
template <class E, class... R>
int64_t block_size(const R&... tensors) {
  return ((!tensors.data || tensors.dtype == dtype_of<E>()) && ...) ? kInPlace : kBlock;
}

template <class S>
const S* converted_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, S* buffer);
template <class S>
void store_converted(const Rows& rows, int64_t sample, int64_t first, int64_t count, const S* block);

// The block as E: in place where it is stored so, in `buffer` otherwise.
template <class E>
const E* read_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, E* buffer) {
  if constexpr (!std::is_same<E, bf16>::value)
    if (rows.dtype != dtype_of<E>()) return converted_block(rows, sample, first, count, buffer);
  return rows.at<E>(sample, first);
}

// The memory that the kernel writes a block to. `write_block` then rounds the block into the tensor.
template <class E>
E* open_block(const Rows& rows, int64_t sample, int64_t first, E* buffer) {
  return rows.dtype == dtype_of<E>() ? rows.at<E>(sample, first) : buffer;
}
template <class E>
void write_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, const E* block) {
  if constexpr (!std::is_same<E, bf16>::value)
    if (rows.dtype != dtype_of<E>()) store_converted(rows, sample, first, count, block);
}

}  // namespace lgd
