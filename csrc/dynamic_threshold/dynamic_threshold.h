// s = a quantile of a sample's |x0|, clamped to [1, most];  out = clip(x0, -s, s) / s.
//
// Order statistics by radix selection: the bits of |x0| order as |x0| does. One digit of them is counted at a time, the
// digit of the statistic is kept, and the next digit is counted among the elements that share all digits kept so far.
#pragma once
#include <algorithm>

#include "../common/rows.h"

namespace lgd {

constexpr int kDigit = 11;            // bits at a time: three passes for float, six for double
constexpr int kDigits = 1 << kDigit;  // values of a digit

struct DynamicThreshold {
  Rows out;
  Rows order;  // [B, 2], float, or double where x0 is: the two statistics that the quantile lies between
  Rows x0;
  double quantile;  // in [0, 1]
  double most;
};

// The quantile of a row lies from the statistic of this rank, counted from 0, so far towards the next: weight in [0,
// 1).
struct Position {
  int64_t rank;
  double weight;

  Position(double quantile, int64_t row) {
    double whole;
    weight = std::modf(quantile * double(row - 1), &whole);  // not a difference, which could be contracted
    rank = int64_t(whole);
  }
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

// The known bits of a statistic, those above a digit, and where that digit lies.
struct Known {
  uint64_t prefix;
  int shift, bits;
};

// Elements [first, last) of one sample. S: float, or double where x0 is.
// Adds to counts[d] the number of elements with the prefix and with d as their next digit.
template <class S>
void count_digits(const Rows& x0, int64_t sample, int64_t first, int64_t last, const Known& known, int64_t* counts);
// The smallest magnitude above `bits` (all ones: none), and the largest of all: beyond infinity if one is NaN.
template <class S>
void next_above(const Rows& x0, int64_t sample, int64_t first, int64_t last, uint64_t bits, uint64_t* above,
                uint64_t* largest);
template <class S>
void clip_and_divide(const DynamicThreshold& op, int64_t sample, int64_t first, int64_t last, double threshold);

// What the selection finds in one part of a row.
struct Part {
  int64_t counts[kDigits];
  uint64_t above, largest;
};

// Order statistics of one sample, NaN if x0 has one: low of rank `at.rank`, high of the next rank (of the same where
// the weight is 0). for_parts(work) calls work(part, first, last) for each part of the row. Results do not depend on
// how it is cut.
template <class S>
struct Statistics {
  double low, high;

  template <class ForParts>
  Statistics(const Rows& x0, int64_t sample, const Position& at, Part* parts, int count, const ForParts& for_parts) {
    using Bits = typename Magnitude<S>::Bits;
    int64_t rank = at.rank, equal = 0;  // rank: among the elements with the prefix
    Known known{0, Magnitude<S>::width, 0};
    while (known.shift > 0) {
      known.bits = std::min(kDigit, known.shift);
      known.shift -= known.bits;
      for (int part = 0; part < count; ++part) std::fill_n(parts[part].counts, kDigits, 0);
      for_parts([&](int part, int64_t first, int64_t last) {
        count_digits<S>(x0, sample, first, last, known, parts[part].counts);
      });
      int64_t digit = 0;
      for (;; ++digit) {
        equal = 0;
        for (int part = 0; part < count; ++part) equal += parts[part].counts[digit];
        if (rank < equal) break;
        rank -= equal;
      }
      known.prefix = known.prefix << known.bits | uint64_t(digit);
    }
    for_parts([&](int part, int64_t first, int64_t last) {
      next_above<S>(x0, sample, first, last, known.prefix, &parts[part].above, &parts[part].largest);
    });
    uint64_t above = ~uint64_t(0), largest = 0;
    for (int part = 0; part < count; ++part) {
      above = std::min(above, parts[part].above);
      largest = std::max(largest, parts[part].largest);
    }
    const bool last_equal = at.weight > 0 && rank + 1 == equal;  // the next statistic is another number
    low = bits_as<S>(Bits(known.prefix));
    high = last_equal ? bits_as<S>(Bits(above)) : low;
    if (largest > Magnitude<S>::infinity) low = high = NAN;
  }

  // s
  double threshold(double weight, double most) const {
    const double quantile = high == low ? low : low + weight * (high - low);  // NaN stays
    return quantile < 1 ? 1 : quantile > most ? most : quantile;
  }
};

}  // namespace lgd
