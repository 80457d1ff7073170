// The kernels that samples are compared by, one functor each: from a row of squared distances (or of products) the
// values and the derivatives. As in lgd_kernels/ops/energy_mmd/kernels.py; docs/energy_mmd.md says how to add one.
#pragma once
#include "../common/scalar.h"

namespace lgd {

enum class Kernels : int { energy, gaussian, laplace, rational, polynomial };  // in the order of KINDS

struct MmdKernel {
  Kernels kind;
  const double* parameters;
  int count;

  LGD_INLINE bool of_product() const { return kind == Kernels::polynomial; }
};

LGD_INLINE float nearest(float value) { return (value + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23; |value| < 2^22

// exp(value) 2^shift for |value| < 0.4: the series to value^7, 6e-9 off.
LGD_INLINE float scaled_exp(float value, float shift) {
  float sum = 1.0f / 5040;
  const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float coefficient : coefficients) sum = sum * value + coefficient;
  shift = shift < -126.0f ? -126.0f : shift;
  shift = shift > 127.0f ? 127.0f : shift;
  return sum * bits_as<float>((int32_t(shift) + 127) << 23);
}

// exp(-value), value >= 0, to 1e-7 of itself.
LGD_INLINE float exp_minus(float value) {
  value = value < 88.0f ? value : 88.0f;
  const float shift = nearest(value * -1.44269504f);
  const float rest = -value - shift * 0.693359375f - shift * -2.12194440e-4f;  // ln 2 in two parts
  return scaled_exp(rest, shift);
}
LGD_INLINE double exp_minus(double value) { return exp(-value); }

// value^exponent, the exponent as a number of 12 bits and the rest: its product with that of the value is exact, and
// what is left is small, so the error stays near 1e-7 where exp(exponent log(value)) would lose log(value) times as
// much.
template <class S>
struct Exponent {
  S all, high;
  explicit Exponent(double exponent) : all(S(exponent)), high(S(float(exponent))) {
    if constexpr (std::is_same<S, float>::value) high = bits_as<float>(bits_as<uint32_t>(high) & 0xfffff000u);
  }
};
LGD_INLINE float power(float value, const Exponent<float>& exponent) {
  const int32_t bits = bits_as<int32_t>(value);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // value = m 2^e, m from sqrt(1/2) to sqrt(2)
  const float m = bits_as<float>(bits - int32_t(uint32_t(e) << 23));
  const float z = (m - 1) / (m + 1), zz = z * z;  // log2 m = 2 / ln 2 (z + z^3/3 + ...), |z| < 0.172
  const float log2m =
      z * (2.88539008f + zz * (0.961796694f + zz * (0.577078016f + zz * (0.412198583f + zz * 0.320598898f))));
  const float whole = exponent.high * float(e), shift = nearest(whole);
  float rest = (whole - shift) + ((exponent.all - exponent.high) * float(e) + exponent.all * log2m);
  const float more = nearest(rest);
  rest -= more;
  return scaled_exp(rest * 0.693147181f, shift + more);
}
LGD_INLINE double power(double value, const Exponent<double>& exponent) { return pow(value, exponent.all); }

// Below, points coincide: the smallest normal number.
template <class S>
constexpr S kCoincide = std::is_same<S, float>::value ? S(1.17549435e-38) : S(2.2250738585072014e-308);

// Each: row(arguments, values, derivatives, count).
template <class S>
struct Distance {  // s^(1/2)
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const S r = root(s[j]);
      value[j] = r;
      slope[j] = s[j] < kCoincide<S> ? S(0) : S(0.5) / r;
    }
  }
};

template <class S>
struct Square {  // s
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      value[j] = s[j];
      slope[j] = s[j] == 0 ? S(0) : S(1);
    }
  }
};

template <class S>
struct Power {  // s^exponent
  Exponent<S> exponent;
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const bool apart = s[j] >= kCoincide<S>;
      const S at = s[j] < kCoincide<S> ? S(1) : s[j];  // NaN stays
      const S found = power(at, exponent);
      value[j] = apart || s[j] != s[j] ? found + (at - at) : S(0);  // NaN and infinity, which have no exponent, are NaN
      slope[j] = apart ? exponent.all * found / at : S(0);
    }
  }
};

template <class S>
struct Gaussian {  // mean over rates of exp(-rate s)
  const double* rates;
  int count_of_rates;
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
    const S share = S(1.0 / count_of_rates);
    for (int j = 0; j < count; ++j) value[j] = slope[j] = 0;
    for (int of = 0; of < count_of_rates; ++of) {
      const S rate = S(rates[of]);
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const S one = share * exp_minus(rate * s[j]) + (s[j] - s[j]);
        value[j] += one;
        slope[j] -= rate * one;
      }
    }
  }
};

template <class S>
struct Laplace {  // exp(-rate s^(1/2))
  S rate;
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const S r = root(s[j]);
      const S one = exp_minus(rate * r) + (s[j] - s[j]);
      value[j] = one;
      slope[j] = s[j] < kCoincide<S> ? S(0) : S(-0.5) * rate * one / r;
    }
  }
};

template <class S>
struct Rational {  // (1 + rate s)^-alpha
  S rate;
  Exponent<S> exponent;  // -alpha
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const S base = 1 + rate * s[j];
      const S found = power(base, exponent) + (s[j] - s[j]);
      value[j] = found;
      slope[j] = exponent.all * rate * found / base;
    }
  }
};

template <class S>
struct Polynomial {  // (scale s + offset)^degree of a product s
  int degree;
  S scale, offset;
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
    for (int j = 0; j < count; ++j) slope[j] = 1;
    for (int of = 1; of < degree; ++of)
#pragma omp simd
      for (int j = 0; j < count; ++j) slope[j] *= scale * s[j] + offset;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      value[j] = slope[j] * (scale * s[j] + offset);
      slope[j] *= S(degree) * scale;
    }
  }
};

// run(functor)
template <class S, class Run>
LGD_INLINE auto with_kernel(const MmdKernel& kernel, const Run& run) {
  const double* p = kernel.parameters;
  switch (kernel.kind) {
    case Kernels::energy:
      if (p[0] == 1) return run(Distance<S>{});
      if (p[0] == 2) return run(Square<S>{});
      return run(Power<S>{Exponent<S>(p[0] / 2)});
    case Kernels::gaussian:
      return run(Gaussian<S>{p, kernel.count});
    case Kernels::laplace:
      return run(Laplace<S>{S(1 / p[0])});
    case Kernels::rational:
      return run(Rational<S>{S(0.5 / (p[1] * p[0] * p[0])), Exponent<S>(-p[1])});
    default:
      return run(Polynomial<S>{int(p[0]), S(p[1]), S(p[2])});
  }
}

}  // namespace lgd
