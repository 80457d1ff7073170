// The MMD kernels k(x, y), one functor each: from a row of squared distances (or of products) the values and the
// derivatives. As in lgd_kernels/ops/energy_mmd/kernels.py; docs/energy_mmd.md says how to add one.
#pragma once
#include "../common/power.h"

namespace lgd {

enum class MmdKernels : int { energy, gaussian, laplace, rational, polynomial };  // in the order of KINDS

struct MmdKernel {
  MmdKernels kind;
  const double* parameters;
  int count;

  LGD_INLINE bool of_product() const { return kind == MmdKernels::polynomial; }
  double factor() const { return kind == MmdKernels::energy ? 1 : -2; }  // the energy is minus a kernel, and halved
};

// Each functor: row(arguments, values, derivatives, count); null derivatives are not wanted (once inlined, a constant).

// s^(1/2), and 1/2 s^(-1/2), or 0 where s is 0, by an instruction that approximates s^(-1/2), if the processor has one.
// Returns how many elements were computed.
int fast_roots(const float* s, float* value, float* slope, int count);

// Rows of squared distances s. p_i q_j s^(1/2) is added up, and s become p_i q_j s^(-1/2). The columns fill vectors of
// 16.
struct DistanceTile {
  float* squares;
  int64_t stride;
  const float *p, *q;
  int rows, columns;
};
// Computes row after row, from this one, to the first with points that coincide or are no numbers, and returns its
// index.
int fast_distances(const DistanceTile& of, int row, double& total);

template <class S>
struct Distance {  // s^(1/2)
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
    int done = 0;
    if constexpr (std::is_same<S, float>::value)
      if (slope) done = fast_roots(s, value, slope, count);
#pragma omp simd
    for (int j = done; j < count; ++j) {
      const S r = root(s[j]);
      value[j] = r;
      if (slope) slope[j] = s[j] < kCoincide<S> ? S(0) : S(0.5) / r;
    }
  }
};

template <class S>
struct Square {  // s
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      value[j] = s[j];
      if (slope) slope[j] = s[j] == 0 ? S(0) : S(1);
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
      if (slope) slope[j] = apart ? exponent.all * found / at : S(0);
    }
  }
};

template <class S>
struct Gaussian {  // mean over rates of exp(-rate s)
  const double* rates;
  int count_of_rates;
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
    const S share = S(1.0 / count_of_rates);
    for (int j = 0; j < count; ++j) {
      value[j] = 0;
      if (slope) slope[j] = 0;
    }
    for (int of = 0; of < count_of_rates; ++of) {
      const S rate = S(rates[of]);
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const S one = share * exp_minus(rate * s[j]) + (s[j] - s[j]);
        value[j] += one;
        if (slope) slope[j] -= rate * one;
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
      if (slope) slope[j] = s[j] < kCoincide<S> ? S(0) : S(-0.5) * rate * one / r;
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
      if (slope) slope[j] = exponent.all * rate * found / base;
    }
  }
};

template <class S>
struct Polynomial {  // (scale s + offset)^degree of a product s
  int degree;
  S scale, offset;
  LGD_INLINE void operator()(const S* s, S* value, S* slope, int count) const {
    for (int j = 0; j < count; ++j) value[j] = 1;
    for (int of = 1; of < degree; ++of)
#pragma omp simd
      for (int j = 0; j < count; ++j) value[j] *= scale * s[j] + offset;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      if (slope) slope[j] = S(degree) * scale * value[j];
      value[j] *= scale * s[j] + offset;
    }
  }
};

// run(functor) with the functor of the kernel.
template <class S, class Run>
LGD_INLINE auto with_kernel(const MmdKernel& kernel, const Run& run) {
  const double* p = kernel.parameters;
  switch (kernel.kind) {
    case MmdKernels::energy:
      if (p[0] == 1) return run(Distance<S>{});
      if (p[0] == 2) return run(Square<S>{});
      return run(Power<S>{Exponent<S>(p[0] / 2)});
    case MmdKernels::gaussian:
      return run(Gaussian<S>{p, kernel.count});
    case MmdKernels::laplace:
      return run(Laplace<S>{S(1 / p[0])});
    case MmdKernels::rational:
      return run(Rational<S>{S(0.5 / (p[1] * p[0] * p[0])), Exponent<S>(-p[1])});
    default:
      return run(Polynomial<S>{int(p[0]), S(p[1]), S(p[2])});
  }
}

}  // namespace lgd
