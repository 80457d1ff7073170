#include "loops.h"

namespace lgd {
namespace {

template <class S>
LGD_CLONES void scale_loop(S* out, const S* in, S factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = factor * in[i];
}

template <class S>
LGD_CLONES S dot_difference_loop(const S* upstream, const S* cond, const S* uncond, int64_t count) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += upstream[i] * (cond[i] - uncond[i]);
  return sum;
}

}  // namespace

template <>
void scale(float* out, const float* in, float factor, int64_t count) {
  scale_loop(out, in, factor, count);
}
template <>
void scale(double* out, const double* in, double factor, int64_t count) {
  scale_loop(out, in, factor, count);
}
template <>
float dot_difference(const float* upstream, const float* cond, const float* uncond, int64_t count) {
  return dot_difference_loop(upstream, cond, uncond, count);
}
template <>
double dot_difference(const double* upstream, const double* cond, const double* uncond, int64_t count) {
  return dot_difference_loop(upstream, cond, uncond, count);
}

}  // namespace lgd
