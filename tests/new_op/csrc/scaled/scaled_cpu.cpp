#include <algorithm>

#include "../common/loops.h"
#include "scaled.h"

namespace lgd {

template <class S>
void scaled(const Scaled& op, int64_t sample, int64_t first, int64_t last) {
  alignas(64) S buffers[2][kBlock];
  const S factor = op.factor.at<S>(sample);
  const int64_t block = block_size<S>(op.out, op.x);
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    S* out = open_block(op.out, sample, at, buffers[0]);
    scale(out, read_block(op.x, sample, at, count, buffers[1]), factor, count);
    write_block(op.out, sample, at, count, out);
  }
}

template void scaled<float>(const Scaled&, int64_t, int64_t, int64_t);
template void scaled<double>(const Scaled&, int64_t, int64_t, int64_t);

}  // namespace lgd
