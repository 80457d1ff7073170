#include "kernels.h"

#ifdef LGD_HAS_CLONES
#include <immintrin.h>
#endif

namespace lgd {
namespace {

#ifdef LGD_HAS_CLONES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the compiler's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// Whether all are normal numbers and not huge.
__attribute__((target("avx512f"), always_inline)) inline bool plain(__m512 square) {
  return (_mm512_cmp_ps_mask(square, _mm512_set1_ps(kCoincide<float>), _CMP_GE_OQ) &
          _mm512_cmp_ps_mask(square, _mm512_set1_ps(0x1p120f), _CMP_LE_OQ)) == 0xffff;
}

// 14 bits of s^(-1/2) and one step of Newton's method give 1.5 units in the last place; so does one more step, of the
// root.
__attribute__((target("avx512f"), always_inline)) inline void roots(__m512 square, __m512& root, __m512& half_inverse) {
  const __m512 half = _mm512_set1_ps(0.5f), near = _mm512_rsqrt14_ps(square);
  const __m512 near_root = _mm512_mul_ps(square, near), half_near = _mm512_mul_ps(half, near);
  const __m512 miss = _mm512_fnmadd_ps(near_root, half_near, half);  // (1 - s near^2) / 2
  root = _mm512_fmadd_ps(near_root, miss, near_root);
  half_inverse = _mm512_fmadd_ps(half_near, miss, half_near);
}

__attribute__((target("avx512f"))) int roots_avx512(const float* s, float* value, float* slope, int count) {
  int j = 0;
  for (; j + 16 <= count; j += 16) {
    const __m512 square = _mm512_loadu_ps(s + j);
    if (!plain(square)) break;
    __m512 root, half_inverse;
    roots(square, root, half_inverse);
    _mm512_storeu_ps(value + j, root);
    _mm512_storeu_ps(slope + j, half_inverse);
  }
  return j;
}

__attribute__((target("avx512f"))) int distances_avx512(const DistanceTile& of, int row, double& total) {
  __m512d totals[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (; row < of.rows; ++row) {
    float* s = of.squares + row * of.stride;
    bool all = true;
    for (int j = 0; j < of.columns; j += 16) all = all && plain(_mm512_loadu_ps(s + j));
    if (!all) break;
    const __m512 turn = _mm512_set1_ps(2 * of.p[row]);
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < of.columns; j += 16) {
      const __m512 weight = _mm512_loadu_ps(of.q + j);
      __m512 root, half_inverse;
      roots(_mm512_loadu_ps(s + j), root, half_inverse);
      sum = _mm512_fmadd_ps(weight, root, sum);
      _mm512_storeu_ps(s + j, _mm512_mul_ps(_mm512_mul_ps(turn, weight), half_inverse));
    }
    const __m512d p = _mm512_set1_pd(of.p[row]);
    totals[0] = _mm512_fmadd_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)), totals[0]);
    totals[1] = _mm512_fmadd_pd(p, _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1))),
                                totals[1]);
  }
  total += _mm512_reduce_add_pd(_mm512_add_pd(totals[0], totals[1]));
  return row;
}
#pragma GCC diagnostic pop
#endif

}  // namespace

int fast_roots(const float* s, float* value, float* slope, int count) {
#ifdef LGD_HAS_CLONES
  static const bool fits = __builtin_cpu_supports("avx512f");
  if (fits) return roots_avx512(s, value, slope, count);
#endif
  return 0;
}

int fast_distances(const DistanceTile& of, int row, double& total) {
#ifdef LGD_HAS_CLONES
  static const bool fits = __builtin_cpu_supports("avx512f");
  if (fits) return distances_avx512(of, row, total);
#endif
  return row;
}

}  // namespace lgd
