// What moments and combine read: columns, each a tensor or the difference of two.
#pragma once
#include "rows.h"

namespace lgd {

// Eight, with the eight outputs of a combine and its noise where moments are its backward.
constexpr int kMostTensors = 17;
constexpr int kMostOutputs = 8;

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct Column {
  int plus, minus;  // minus < 0: a tensor as it is
};

struct Columns {
  Rows tensors[kMostTensors];
  int tensor_count;
  Column columns[kMostTensors];
  int count;
  const int64_t* source;  // null: output b reads sample b of every tensor; else source[b] of the first `gathered`
  int gathered;
  int64_t samples;  // of a gathered tensor

  // The sample of tensor n that output b reads. An invalid source reads the first sample, and the caller makes that
  // NaN.
  LGD_INLINE int64_t sample_of(int n, int64_t b) const {
    if (!source || n >= gathered) return b;
    return inside(b) ? source[b] : 0;
  }
  LGD_INLINE bool inside(int64_t b) const { return !source || (source[b] >= 0 && source[b] < samples); }

  bool all(DType dtype) const {
    for (int n = 0; n < tensor_count; ++n)
      if (tensors[n].dtype != dtype) return false;
    return true;
  }
  bool any(DType dtype) const {
    for (int n = 0; n < tensor_count; ++n)
      if (tensors[n].dtype == dtype) return true;
    return false;
  }
};

}  // namespace lgd
