// Several linear combinations of columns from one read, each of them
//   out = sum_k coefficient[k] column_k + constant + noise_scale z,    clamped to [low, high], z drawn
// and, if requested, the inner products and sums of the outputs.
#pragma once
#include "../common/columns.h"
#include "../common/philox.h"

namespace lgd {

// Numbers for each sample and output, [B, P, ...], contiguous; or absent: 0.
struct PerOutput {
  const void* data;
  DType dtype;

  template <class S>
  LGD_INLINE S at(int64_t index) const {
    return data ? load_scalar<S>(data, dtype, index) : S(0);
  }
};

struct Combine {
  Rows outputs[kMostOutputs];  // out
  int count;
  int unwritten;  // how many of the outputs, at the end, are not written: only their moments are computed
  Columns read;
  PerOutput coefficients;  // [B, P, K]
  PerOutput constant;      // [B, P]
  PerOutput noise_scale;   // [B, P]; absent: nothing is drawn
  Seed seed;
  double low, high;
};

// How many moments there are: <out_p, out_q> for q >= p, row by row, then the sums.
constexpr int moments_of(int outputs) { return outputs * (outputs + 3) / 2; }

// Computes elements [first, last) of one sample of the outputs, and adds the moments of these elements, before they are
// rounded, to `found`. S: float, or double where any tensor or `found` is.
template <class S>
void combine(const Combine& op, int64_t sample, int64_t first, int64_t last, double* found = nullptr);

}  // namespace lgd
