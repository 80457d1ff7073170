#include "kernels.h"

#ifdef LGD_HAS_CLONES
#include <immintrin.h>
#endif

namespace lgd {
namespace {

#ifdef LGD_HAS_CLONES
// 14 bits of s^(-1/2) and a step of Newton's make 1.5 units in the last place; so does one more step, of the root.
__attribute__((target("avx512f"))) int roots_avx512(const float* s, float* value, float* slope, int count) {
  const __m512 half = _mm512_set1_ps(0.5f), least = _mm512_set1_ps(kCoincide<float>);
  const __m512 most = _mm512_set1_ps(0x1p120f);
  int j = 0;
  for (; j + 16 <= count; j += 16) {
    const __m512 square = _mm512_loadu_ps(s + j);
    const __mmask16 plain =
        _mm512_cmp_ps_mask(square, least, _CMP_GE_OQ) & _mm512_cmp_ps_mask(square, most, _CMP_LE_OQ);
    if (plain != 0xffff) break;
    const __m512 near = _mm512_maskz_rsqrt14_ps(0xffff, square);
    const __m512 near_root = _mm512_mul_ps(square, near);
    const __m512 miss = _mm512_fnmadd_ps(near_root, _mm512_mul_ps(half, near), half);  // (1 - s near^2) / 2
    const __m512 inverse = _mm512_fmadd_ps(near, miss, near), root = _mm512_fmadd_ps(near_root, miss, near_root);
    _mm512_storeu_ps(value + j, root);
    _mm512_storeu_ps(slope + j, _mm512_mul_ps(half, inverse));
  }
  return j;
}
#endif

}  // namespace

int fast_roots(const float* s, float* value, float* slope, int count) {
#ifdef LGD_HAS_CLONES
  static const bool fits = __builtin_cpu_supports("avx512f");
  if (fits) return roots_avx512(s, value, slope, count);
#endif
  return 0;
}

}  // namespace lgd
