// exp and powers by polynomials, in loops that vectorise; a loop with a call of libm does not.
#pragma once
#include "scalar.h"

namespace lgd {

LGD_INLINE float nearest(float value) { return (value + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23; |value| < 2^22
LGD_INLINE double nearest(double value) { return (value + 0x1.8p52) - 0x1.8p52; }      // |value| < 2^51

// A polynomial in x, highest power first. Odd and even powers are added up side by side, so that half as many products
// wait for one another. (A loop over coefficients is not always unrolled before it is vectorised.)
template <class S>
LGD_INLINE S polynomial(S x, S, S odd, S even) {
  return odd * x + even;
}
template <class S, class... Rest>
LGD_INLINE S polynomial(S x, S square, S odd, S even, S next_odd, S next_even, Rest... rest) {
  return polynomial(x, square, odd * square + next_odd, even * square + next_even, rest...);
}

// exp(value) 2^shift for |value| < 0.4: the series to value^7, 6e-9 off.
LGD_INLINE float scaled_exp(float value, float shift) {
  const float sum =
      polynomial(value, value * value, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
  shift = shift < -126.0f ? -126.0f : shift;
  shift = shift > 127.0f ? 127.0f : shift;
  return sum * bits_as<float>((int32_t(shift) + 127) << 23);
}
// To value^13, 4e-17 off.
LGD_INLINE double scaled_exp(double value, double shift) {
  const double sum =
      polynomial(value, value * value, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0);
  shift = shift < -1022.0 ? -1022.0 : shift;
  shift = shift > 1023.0 ? 1023.0 : shift;
  return sum * bits_as<double>(bits_as<uint64_t>(shift + (0x1.8p52 + 1023)) << 52);
}

// exp(-value), value >= 0, to 1e-7 of itself.
LGD_INLINE float exp_minus(float value) {
  value = value < 88.0f ? value : 88.0f;
  const float shift = nearest(value * -1.44269504f);
  const float rest = -value - shift * 0.693359375f - shift * -2.12194440e-4f;  // ln 2 in two parts
  return scaled_exp(rest, shift);
}
LGD_INLINE double exp_minus(double value) { return exp(-value); }

// The exponent of value^exponent, split into a number of few bits and the rest. The product of the former with the
// binary exponent of the value is exact, and the remainder is small, so the error stays near 1e-7 (2e-16); the error of
// exp(exponent log(value)) is log(value) times as large.
template <class S>
struct Exponent {
  S all, high;
  explicit Exponent(double exponent) : all(S(exponent)), high(S(exponent)) {
    if constexpr (std::is_same<S, float>::value)
      high = bits_as<float>(bits_as<uint32_t>(high) & 0xfffff000u);  // 12 bits
    else
      high = bits_as<double>(bits_as<uint64_t>(high) & ~uint64_t(0xfff));  // 41 bits
  }
};

// 2^(exponent (e + log2m)), |log2m| <= 1/2.
template <class S>
LGD_INLINE S power_of_2(const Exponent<S>& exponent, S e, S log2m) {
  const S whole = exponent.high * e, shift = nearest(whole);
  S rest = (whole - shift) + ((exponent.all - exponent.high) * e + exponent.all * log2m);
  const S more = nearest(rest);
  rest -= more;
  return scaled_exp(rest * S(0.69314718055994530942), shift + more);
}

// Powers are of normal numbers. Points with a squared distance below the smallest normal number coincide.
template <class S>
constexpr S kCoincide = std::is_same<S, float>::value ? S(1.17549435e-38) : S(2.2250738585072014e-308);

// With value = m 2^e, m from sqrt(1/2) to sqrt(2), and z = (m - 1) / (m + 1),
// log2 m = 2 / ln 2 (z + z^3/3 + z^5/5 + ...), |z| < 0.172.
LGD_INLINE float power(float value, const Exponent<float>& exponent) {
  const int32_t bits = bits_as<int32_t>(value);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float m = bits_as<float>(bits - int32_t(uint32_t(e) << 23));
  const float z = (m - 1) / (m + 1), zz = z * z;
  const float log2m =
      z * (2.88539008f + zz * (0.961796694f + zz * (0.577078016f + zz * (0.412198583f + zz * 0.320598898f))));
  return power_of_2(exponent, float(e), log2m);
}
LGD_INLINE double power(double value, const Exponent<double>& exponent) {
  const uint64_t bits = bits_as<uint64_t>(value), one = uint64_t(1023) << 52;
  const uint64_t biased = (bits - 0x3fe6a09e667f3bcdu + one) >> 52;  // e + 1023
  const double m = bits_as<double>(bits - (biased << 52) + one);
  const double e = bits_as<double>(biased | 0x4330000000000000u) - (0x1p52 + 1023);  // vectors have no conversion
  const double z = (m - 1) / (m + 1), zz = z * z;
  const double sum = polynomial(zz, zz * zz, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9,
                                1.0 / 7, 1.0 / 5, 1.0 / 3);
  const double twice = 2.8853900817779268 * z;
  return power_of_2(exponent, e, twice + twice * (sum * zz));
}

}  // namespace lgd
