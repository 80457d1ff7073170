#include "philox_cpu.h"

#ifdef LGD_HAS_CLONES
#include <immintrin.h>
#endif

namespace lgd {
namespace {

constexpr int kQuads = 64;  // drawn at a time: words and normals stay in the first-level cache
constexpr int kLanes = 8;   // quads of a row are computed in whole multiples of this

struct Draws {
  uint32_t words[4][kQuads];
  float normals[4][kQuads];
};

// The counters of some rows, which are consecutive samples, `quads` each.
struct Counters {
  uint64_t key, quad;
  uint32_t sample, stream;
  int rows, quads;
};

LGD_CLONES void fill_words(Draws& draws, const Counters& from) {
  for (int row = 0, at = 0; row < from.rows; ++row)
    for (int i = 0; i < from.quads; ++i, ++at) {
      const uint64_t quad = from.quad + i;
      uint32_t words[4] = {uint32_t(quad), uint32_t(quad >> 32), from.sample + row, from.stream};
      philox(words, uint32_t(from.key), uint32_t(from.key >> 32));
      for (int lane = 0; lane < 4; ++lane) draws.words[lane][at] = words[lane];
    }
}

template <class By>
LGD_INLINE void normals_of(Draws& draws, int quads) {
  for (int pair = 0; pair < 4; pair += 2)
    for (int i = 0; i < quads; ++i)
      box_muller<By>(draws.words[pair][i], draws.words[pair + 1][i], draws.normals[pair][i],
                     draws.normals[pair + 1][i]);
}

#ifndef LGD_HAS_CLONES
void fill_normals(Draws& draws, int quads) { normals_of<Contracted>(draws, quads); }
#else
// The same bits for every instruction set.
void fill_normals(Draws& draws, int quads) { normals_of<Emulated>(draws, quads); }
__attribute__((target("arch=x86-64-v3"))) void fill_normals_avx2(Draws& draws, int quads) {
  normals_of<Contracted>(draws, quads);
}

// fill_words, 2.5 times as fast as the compiler's code. A word is the low half of a 64-bit lane. The product reads
// nothing else, so the high half need not be cleared: a round is two products, two shifts and four xors.
__attribute__((target("avx2"))) void fill_words_avx2(Draws& draws, const Counters& from) {
  const __m256i multiply0 = _mm256_set1_epi64x(0xD2511F53), multiply1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  __m256i keys[10][2];
  uint32_t key0 = uint32_t(from.key), key1 = uint32_t(from.key >> 32);
  for (auto& key : keys) {
    key[0] = _mm256_set1_epi64x(key0);
    key[1] = _mm256_set1_epi64x(key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int at = 0, i = 0, row = 0; row < from.rows; at += kLanes) {
    __m256i words[4][kLanes / 4];
    for (int part = 0; part < kLanes / 4; ++part) {
      const __m256i first = _mm256_set1_epi64x(int64_t(from.quad + i + 4 * part));
      words[0][part] = _mm256_add_epi64(first, _mm256_setr_epi64x(0, 1, 2, 3));
      words[1][part] = _mm256_srli_epi64(words[0][part], 32);
      words[2][part] = _mm256_set1_epi64x(from.sample + row);
      words[3][part] = _mm256_set1_epi64x(from.stream);
    }
    for (const auto& key : keys)
      for (int part = 0; part < kLanes / 4; ++part) {
        const __m256i product0 = _mm256_mul_epu32(words[0][part], multiply0);
        const __m256i product1 = _mm256_mul_epu32(words[2][part], multiply1);
        words[0][part] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(words[1][part], key[0]));
        words[1][part] = product1;
        words[2][part] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(words[3][part], key[1]));
        words[3][part] = product0;
      }
    for (int lane = 0; lane < 4; ++lane)
      for (int part = 0; part < kLanes / 4; ++part) {
        const __m256i packed = _mm256_permutevar8x32_epi32(words[lane][part], low_halves);
        _mm_store_si128(reinterpret_cast<__m128i*>(draws.words[lane] + at + 4 * part), _mm256_castsi256_si128(packed));
      }
    i = i + kLanes < from.quads ? i + kLanes : (++row, 0);
  }
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the compiler's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The same with three-way xors, eight quads to a vector. A round waits for the previous one, so several vectors, of any
// rows, are computed side by side.
template <int Parts>
__attribute__((target("avx512f"), always_inline)) inline void words_avx512(Draws& draws, const Counters& from, int at,
                                                                           int& row, int& i) {
  constexpr int kXor3 = 0x96;  // the truth table of a ^ b ^ c
  const __m512i multiply0 = _mm512_set1_epi64(0xD2511F53), multiply1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i words[4][Parts];
  for (int part = 0; part < Parts; ++part) {
    words[0][part] =
        _mm512_add_epi64(_mm512_set1_epi64(int64_t(from.quad + i)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    words[1][part] = _mm512_srli_epi64(words[0][part], 32);
    words[2][part] = _mm512_set1_epi64(from.sample + row);
    words[3][part] = _mm512_set1_epi64(from.stream);
    i = i + kLanes < from.quads ? i + kLanes : (++row, 0);
  }
  uint32_t key0 = uint32_t(from.key), key1 = uint32_t(from.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i keys[] = {_mm512_set1_epi64(key0), _mm512_set1_epi64(key1)};
    for (int part = 0; part < Parts; ++part) {
      const __m512i product0 = _mm512_mul_epu32(words[0][part], multiply0);
      const __m512i product1 = _mm512_mul_epu32(words[2][part], multiply1);
      words[0][part] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), words[1][part], keys[0], kXor3);
      words[1][part] = product1;
      words[2][part] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), words[3][part], keys[1], kXor3);
      words[3][part] = product0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int lane = 0; lane < 4; ++lane)
    for (int part = 0; part < Parts; ++part)
      _mm512_mask_cvtepi64_storeu_epi32(draws.words[lane] + at + kLanes * part, 0xff, words[lane][part]);
}

__attribute__((target("avx512f"))) void fill_words_avx512(Draws& draws, const Counters& from) {
  const int all = from.rows * from.quads;
  int at = 0, row = 0, i = 0;
  for (; at + 4 * kLanes <= all; at += 4 * kLanes) words_avx512<4>(draws, from, at, row, i);
  for (; at < all; at += kLanes) words_avx512<1>(draws, from, at, row, i);
}
#pragma GCC diagnostic pop

__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void fill_normals_avx512(Draws& draws, int quads) {
  normals_of<Contracted>(draws, quads);
}
#endif

LGD_CLONES void interleave(const Draws& draws, int64_t at, float* __restrict out, int64_t count) {
  const float* lanes[4];
  for (int lane = 0; lane < 4; ++lane) lanes[lane] = draws.normals[lane] + at;
  const int64_t quads = count / 4;
  for (int64_t i = 0; i < quads; ++i)
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = lanes[lane][i];
  for (int64_t lane = 0; lane < count % 4; ++lane) out[4 * quads + lane] = lanes[lane][quads];
}

}  // namespace

void philox_fill(float* out, int64_t count, int64_t first, uint64_t key, uint32_t sample, uint32_t stream) {
  philox_fill_rows(out, 0, 1, count, first, key, sample, stream);
}

void philox_fill_rows(float* out, int64_t stride, int64_t rows, int64_t count, int64_t first, uint64_t key,
                      uint32_t sample, uint32_t stream) {
  alignas(64) Draws draws;
  auto words = fill_words;
  auto normals = fill_normals;
#ifdef LGD_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) {
    words = fill_words_avx512;
    normals = fill_normals_avx512;
  } else if (__builtin_cpu_supports("x86-64-v3")) {
    words = fill_words_avx2;
    normals = fill_normals_avx2;
  }
#endif
  for (int64_t at = 0; at < count; at += 4 * kQuads) {
    const int wanted = int(count - at < 4 * kQuads ? count - at : 4 * kQuads);
    const int quads = ((wanted + 3) / 4 + kLanes - 1) / kLanes * kLanes, together = kQuads / quads;
    for (int64_t row = 0; row < rows; row += together) {
      const int here = int(rows - row < together ? rows - row : together);
      words(draws, {key, uint64_t(first + at) >> 2, uint32_t(sample + row), stream, here, quads});
      normals(draws, here * quads);
      for (int j = 0; j < here; ++j) interleave(draws, j * quads, out + (row + j) * stride + at, wanted);
    }
  }
}

}  // namespace lgd
