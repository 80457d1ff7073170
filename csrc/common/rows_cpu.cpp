#include "rows.h"

#ifdef LGD_HAS_CLONES
#include <immintrin.h>
#endif

namespace lgd {
namespace {

template <class T, class S>
LGD_CLONES void widen_loop(const T* __restrict in, S* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = S(to_float(in[i]));
}

template <class T, class S>
LGD_CLONES void round_to_loop(const S* __restrict in, T* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(float(in[i]));
}

template <class T, class S>
void widen(const T* in, S* out, int64_t count) {
  widen_loop(in, out, count);
}

template <class T, class S>
void round_to(const S* in, T* out, int64_t count) {
  round_to_loop(in, out, count);
}

#ifdef LGD_HAS_CLONES
// float16 by the instruction for it, which the compiler does not emit: 5 times as fast.
__attribute__((target("avx2,f16c"))) void widen_f16c(const f16* in, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

__attribute__((target("avx2,f16c"))) void round_to_f16c(const float* in, f16* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < count; ++i) out[i] = from_float<f16>(in[i]);
}

template <>
void widen(const f16* in, float* out, int64_t count) {
  __builtin_cpu_supports("f16c") ? widen_f16c(in, out, count) : widen_loop(in, out, count);
}
template <>
void round_to(const float* in, f16* out, int64_t count) {
  __builtin_cpu_supports("f16c") ? round_to_f16c(in, out, count) : round_to_loop(in, out, count);
}
#endif

}  // namespace

template <class S>
const S* converted_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, S* buffer) {
  switch (rows.dtype) {
    case DType::bf16:
      widen(rows.at<bf16>(sample, first), buffer, count);
      break;
    case DType::f16:
      widen(rows.at<f16>(sample, first), buffer, count);
      break;
    case DType::f32:
      widen(rows.at<float>(sample, first), buffer, count);
      break;
    case DType::f64:
      widen(rows.at<double>(sample, first), buffer, count);
  }
  return buffer;
}

template <class S>
void store_converted(const Rows& rows, int64_t sample, int64_t first, int64_t count, const S* block) {
  switch (rows.dtype) {
    case DType::bf16:
      round_to(block, rows.at<bf16>(sample, first), count);
      break;
    case DType::f16:
      round_to(block, rows.at<f16>(sample, first), count);
      break;
    case DType::f32:
      round_to(block, rows.at<float>(sample, first), count);
      break;
    case DType::f64:
      round_to(block, rows.at<double>(sample, first), count);
  }
}

template const float* converted_block(const Rows&, int64_t, int64_t, int64_t, float*);
template const double* converted_block(const Rows&, int64_t, int64_t, int64_t, double*);
template void store_converted(const Rows&, int64_t, int64_t, int64_t, const float*);
template void store_converted(const Rows&, int64_t, int64_t, int64_t, const double*);

}  // namespace lgd
