#include "../common/loops.h"
#include "moments.h"

namespace lgd {
namespace {

template <class S>
LGD_CLONES void subtract(S* out, const S* plus, const S* minus, int64_t count) {
  map<S>(out, count, [](S p, S m) LGD_LAMBDA { return p - m; }, plus, minus);
}

template <class S>
LGD_CLONES S dot(const S* a, const S* b, int64_t count) {
  return sum<S>(count, [](S a, S b) LGD_LAMBDA { return a * b; }, a, b);
}

template <class S>
LGD_CLONES S total(const S* a, int64_t count) {
  return sum<S>(count, [](S a) LGD_LAMBDA { return a; }, a);
}

}  // namespace

// Columns lie in the nearest cache before anything is summed, so that a product costs a load or two from there.
template <class S>
void moments(const Moments& op, int64_t sample, int64_t first, int64_t last, double* sums) {
  alignas(64) S buffers[2 * kMostTensors][kBlock];
  const Columns& read = op.read;
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t count = last - at < kBlock ? last - at : kBlock;
    const S *tensors[kMostTensors], *columns[kMostTensors];
    for (int n = 0; n < read.tensor_count; ++n)
      tensors[n] = read_block(read.tensors[n], read.sample_of(n, sample), at, count, buffers[n]);
    for (int k = 0; k < read.count; ++k) {
      const Column column = read.columns[k];
      columns[k] = tensors[column.plus];
      if (column.minus < 0) continue;
      S* difference = buffers[kMostTensors + k];
      subtract(difference, tensors[column.plus], tensors[column.minus], count);
      columns[k] = difference;
    }
    for (int m = 0; m < op.count; ++m) {
      if (op.same_as[m] != m) continue;
      const Column pair = op.pairs[m];
      sums[m] +=
          pair.minus < 0 ? total(columns[pair.plus], count) : dot(columns[pair.plus], columns[pair.minus], count);
    }
  }
  if (!read.inside(sample))
    for (int m = 0; m < op.count; ++m) sums[m] = NAN;
}

template void moments<float>(const Moments&, int64_t, int64_t, int64_t, double*);
template void moments<double>(const Moments&, int64_t, int64_t, int64_t, double*);

}  // namespace lgd
