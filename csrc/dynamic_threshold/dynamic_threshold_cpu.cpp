#include <algorithm>

#include "../common/loops.h"
#include "dynamic_threshold.h"

namespace lgd {
namespace {

constexpr int kLook = 32;  // elements tested together: nearly no such block has the prefix

// Whether one of kLook elements has the prefix.
template <class S, class Bits>
LGD_CLONES int has_prefix(const S* in, Bits prefix, int above) {
  int found = 0;
  for (int j = 0; j < kLook; ++j) found |= (magnitude_bits(in[j]) >> above) == prefix;
  return found;
}

template <class S>
LGD_CLONES void find_next(const S* in, int64_t count, typename Magnitude<S>::Bits bits,
                          typename Magnitude<S>::Bits* above, typename Magnitude<S>::Bits* largest) {
  using Bits = typename Magnitude<S>::Bits;
  Bits next = *above, most = *largest;
#pragma omp simd reduction(min : next) reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    const Bits own = magnitude_bits(in[i]);
    const Bits candidate = own > bits ? own : ~Bits(0);
    next = candidate < next ? candidate : next;
    most = own > most ? own : most;
  }
  *above = next;
  *largest = most;
}

template <class S>
LGD_CLONES void clip(S* out, const S* in, S s, int64_t count) {
  map<S>(out, count, [=](S x) LGD_LAMBDA { return (x < -s ? -s : x > s ? s : x) / s; }, in);
}

// run(block, count) for blocks of x0 as S.
template <class S, class Run>
void for_blocks(const Rows& x0, int64_t sample, int64_t first, int64_t last, const Run& run) {
  alignas(64) S buffer[kBlock];
  const int64_t block = block_size<S>(x0);
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    run(read_block(x0, sample, at, count, buffer), count);
  }
}

}  // namespace

template <class S>
void count_digits(const Rows& x0, int64_t sample, int64_t first, int64_t last, const Known& known, int64_t* counts) {
  using Bits = typename Magnitude<S>::Bits;
  const int shift = known.shift, above = known.shift + known.bits;
  const Bits prefix = Bits(known.prefix), mask = (Bits(1) << known.bits) - 1;
  for_blocks<S>(x0, sample, first, last, [&](const S* in, int64_t count) {
    if (above == Magnitude<S>::width) {  // nothing is known yet: all elements have the prefix
      for (int64_t i = 0; i < count; ++i) ++counts[magnitude_bits(in[i]) >> shift];
      return;
    }
    for (int64_t i = 0; i < count; i += kLook) {
      if (count - i >= kLook && !has_prefix(in + i, prefix, above)) continue;
      for (int64_t j = i; j < std::min(i + kLook, count); ++j) {
        const Bits bits = magnitude_bits(in[j]);
        if (bits >> above == prefix) ++counts[(bits >> shift) & mask];
      }
    }
  });
}

template <class S>
void next_above(const Rows& x0, int64_t sample, int64_t first, int64_t last, uint64_t bits, uint64_t* above,
                uint64_t* largest) {
  using Bits = typename Magnitude<S>::Bits;
  Bits next = ~Bits(0), most = 0;
  for_blocks<S>(x0, sample, first, last,
                [&](const S* in, int64_t count) { find_next(in, count, Bits(bits), &next, &most); });
  *above = next;
  *largest = most;
}

template <class S>
void clip_and_divide(const DynamicThreshold& op, int64_t sample, int64_t first, int64_t last, double threshold) {
  alignas(64) S buffers[2][kBlock];
  const int64_t block = block_size<S>(op.x0, op.out);
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    S* out = open_block(op.out, sample, at, buffers[0]);
    clip(out, read_block(op.x0, sample, at, count, buffers[1]), S(threshold), count);
    write_block(op.out, sample, at, count, out);
  }
}

template void count_digits<float>(const Rows&, int64_t, int64_t, int64_t, const Known&, int64_t*);
template void count_digits<double>(const Rows&, int64_t, int64_t, int64_t, const Known&, int64_t*);
template void next_above<float>(const Rows&, int64_t, int64_t, int64_t, uint64_t, uint64_t*, uint64_t*);
template void next_above<double>(const Rows&, int64_t, int64_t, int64_t, uint64_t, uint64_t*, uint64_t*);
template void clip_and_divide<float>(const DynamicThreshold&, int64_t, int64_t, int64_t, double);
template void clip_and_divide<double>(const DynamicThreshold&, int64_t, int64_t, int64_t, double);

}  // namespace lgd
