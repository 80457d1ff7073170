// s = a quantile of a sample's |x0|, clamped to [1, most];  out = clip(x0, -s, s) / s.
//
// Order statistics by radix selection: the bits of |x0| order as |x0| does, so a digit of them at a time is counted,
// the digit that the statistic has is kept, and the next is counted among the elements that share what is known so far.
#pragma once
#include "../common/rows.h"

namespace lgd {

constexpr int kDigit = 11;            // bits at a time: three passes for float, six for double
constexpr int kDigits = 1 << kDigit;  // what one of them may be

struct DynamicThreshold {
  Rows out;  // out
  Rows x0;
  int64_t rank;   // the quantile lies from the statistic of this rank, from 0,
  double weight;  // so far towards the next, [0, 1)
  double most;
};

template <class S>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Bits = uint32_t;
  static constexpr int width = 31;
  static constexpr Bits infinity = 0x7f800000u;
};
template <>
struct Magnitude<double> {
  using Bits = uint64_t;
  static constexpr int width = 63;
  static constexpr Bits infinity = 0x7ff0000000000000u;
};

template <class S>
LGD_INLINE typename Magnitude<S>::Bits magnitude_bits(S value) {
  using Bits = typename Magnitude<S>::Bits;
  return bits_as<Bits>(value) & (~Bits(0) >> 1);
}

// What the bits of |x0| above a digit are, and where that digit lies.
struct Known {
  uint64_t prefix;
  int shift, bits;
};

// Elements [first, last) of one sample. S: float, or double where x0 is.
// Adds to counts[d] the elements that have the prefix, and d as their next digit.
template <class S>
void count_digits(const Rows& x0, int64_t sample, int64_t first, int64_t last, const Known& known, int64_t* counts);
// The smallest magnitude above `bits` (all ones: none), and the largest there is: beyond infinity, where one is NaN.
template <class S>
void next_above(const Rows& x0, int64_t sample, int64_t first, int64_t last, uint64_t bits, uint64_t* above,
                uint64_t* largest);
template <class S>
void clip_and_divide(const DynamicThreshold& op, int64_t sample, int64_t first, int64_t last, double threshold);

// s, of the two statistics that the quantile lies between.
LGD_INLINE double threshold_of(const DynamicThreshold& op, double low, double high) {
  const double quantile = high == low ? low : low + op.weight * (high - low);  // NaN stays
  return quantile < 1 ? 1 : quantile > op.most ? op.most : quantile;
}

}  // namespace lgd
