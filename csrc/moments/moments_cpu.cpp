#include <optional>

#include "../common/loops.h"
#include "centring.h"

#ifdef LGD_HAS_CLONES
#include <immintrin.h>
#endif

namespace lgd {
namespace {

template <class S>
LGD_CLONES void subtract(S* out, const S* plus, const S* minus, int64_t count) {
  map<S>(out, count, [](S p, S m) LGD_LAMBDA { return p - m; }, plus, minus);
}

template <class S>
LGD_CLONES void subtract(S* out, const S* in, S shift, int64_t count) {
  map<S>(out, count, [=](S value) LGD_LAMBDA { return value - shift; }, in);
}

constexpr int kTogether = 3;  // products of one column with others in one loop, which reads that column once

// Sums the lanes and the last elements, fewer than there are lanes, in the order of `sum` in loops.h.
LGD_INLINE float finish(float* lanes, const float* a, const float* b, int64_t left) {
  for (int j = 0; j < left; ++j) lanes[j] += a[j] * b[j];
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

#ifdef LGD_HAS_CLONES
// Written with intrinsics: the compiler keeps the sums in memory, so that each addition waits for the store before it.
template <int Count>
__attribute__((target("avx2,fma"))) void dots_avx2(const float* a, const float* const* with, int64_t count,
                                                   float* out) {
  constexpr int kChains = kSums / 8;
  __m256 chains[Count][kChains];
  for (auto& chain : chains)
    for (auto& lanes : chain) lanes = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int part = 0; part < kChains; ++part) {
      const __m256 shared = _mm256_loadu_ps(a + i + 8 * part);
      for (int n = 0; n < Count; ++n)
        chains[n][part] = _mm256_fmadd_ps(shared, _mm256_loadu_ps(with[n] + i + 8 * part), chains[n][part]);
    }
  for (int n = 0; n < Count; ++n) {
    alignas(32) float lanes[kSums];
    for (int part = 0; part < kChains; ++part) _mm256_store_ps(lanes + 8 * part, chains[n][part]);
    out[n] = finish(lanes, a + i, with[n] + i, count - i);
  }
}
#endif

// found[n] = <shared, others[n]> for n < together. The bits of one do not depend on the others.
template <class S>
void dots(int together, const S* shared, const S* const* others, int64_t count, S* found) {
#ifdef LGD_HAS_CLONES
  if constexpr (std::is_same<S, float>::value) {
    static const bool fits = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fits)
      return together == 1   ? dots_avx2<1>(shared, others, count, found)
             : together == 2 ? dots_avx2<2>(shared, others, count, found)
                             : dots_avx2<3>(shared, others, count, found);
  }
#endif
  for (int n = 0; n < together; ++n) found[n] = dot(shared, others[n], count);
}

// The nine different moments of a pair of tensors, of a, b and d = a - b: their places among the twelve of a call,
// which has (i, j) and (j, i).
constexpr int kPairMoments = 9;
constexpr int kPairPlaces[] = {0, 1, 2, 4, 5, 8, 9, 10, 11};
enum Wanted : unsigned {
  kAA = 1 << 0,
  kAB = 1 << 1,
  kAD = 1 << 2,
  kBB = 1 << 4,
  kBD = 1 << 5,
  kDD = 1 << 8,
  kA = 1 << 9,
  kB = 1 << 10,
  kD = 1 << 11,
};

#ifdef LGD_HAS_CLONES
template <unsigned Of>
__attribute__((target("avx2,fma"), always_inline)) inline void add_pair(__m256 x, __m256 y, __m256 d,
                                                                        __m256 (&sums)[kPairMoments]) {
  if (Of & kAA) sums[0] = _mm256_fmadd_ps(x, x, sums[0]);
  if (Of & kAB) sums[1] = _mm256_fmadd_ps(x, y, sums[1]);
  if (Of & kAD) sums[2] = _mm256_fmadd_ps(x, d, sums[2]);
  if (Of & kBB) sums[3] = _mm256_fmadd_ps(y, y, sums[3]);
  if (Of & kBD) sums[4] = _mm256_fmadd_ps(y, d, sums[4]);
  if (Of & kDD) sums[5] = _mm256_fmadd_ps(d, d, sums[5]);
  if (Of & kA) sums[6] = _mm256_add_ps(x, sums[6]);
  if (Of & kB) sums[7] = _mm256_add_ps(y, sums[7]);
  if (Of & kD) sums[8] = _mm256_add_ps(d, sums[8]);
}

__attribute__((target("avx2,fma"), always_inline)) inline __m256 eight(const float* from) {
  return _mm256_loadu_ps(from);
}
__attribute__((target("avx2,fma"), always_inline)) inline __m256 eight(const bf16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// An addition has a latency of four cycles, so if there are few sums, each is split into several chains.
constexpr int chains_of(unsigned of) { return __builtin_popcount(of) <= 3 ? 4 : __builtin_popcount(of) <= 5 ? 2 : 1; }

// Adds the moments `Of` of one part of a sample to `out`. If centred, a, b and d = a - b are taken less their shifts.
template <unsigned Of, bool Centred, class E>
__attribute__((target("avx2,fma"))) void pair_part(const E* a, const E* b, int64_t count, const E* const* after,
                                                   const float* shifts, double* out) {
  constexpr int kChains = chains_of(Of);
  __m256 sums[kChains][kPairMoments], shift[3];
  for (auto& chain : sums)
    for (auto& lanes : chain) lanes = _mm256_setzero_ps();
  for (int k = 0; k < 3; ++k) shift[k] = Centred ? _mm256_set1_ps(shifts[k]) : _mm256_setzero_ps();
  int64_t i = 0;
  for (; count - i >= 8 * kChains; i += 8 * kChains) {
    for (int64_t ahead = 0; ahead < 8 * kChains; ahead += kLine / int64_t(sizeof(E))) {
      if (after[0]) __builtin_prefetch(after[0] + i + ahead);
      if (after[1]) prefetch(after[1] + i + ahead);
    }
    for (int chain = 0; chain < kChains; ++chain) {
      __m256 x = eight(a + i + 8 * chain), y = eight(b + i + 8 * chain), d = _mm256_sub_ps(x, y);
      if (Centred) x = _mm256_sub_ps(x, shift[0]), y = _mm256_sub_ps(y, shift[1]), d = _mm256_sub_ps(d, shift[2]);
      add_pair<Of>(x, y, d, sums[chain]);
    }
  }
  for (; i < count; i += 8) {
    E ends[2][8] = {};
    alignas(32) float present[8] = {};  // all bits of a lane, or none
    for (int64_t j = 0; j < 8 && i + j < count; ++j)
      ends[0][j] = a[i + j], ends[1][j] = b[i + j], present[j] = bits_as<float>(~0u);
    __m256 x = eight(ends[0]), y = eight(ends[1]), d = _mm256_sub_ps(x, y);
    if (Centred) {
      const __m256 mask = _mm256_load_ps(present);
      x = _mm256_and_ps(mask, _mm256_sub_ps(x, shift[0]));
      y = _mm256_and_ps(mask, _mm256_sub_ps(y, shift[1]));
      d = _mm256_and_ps(mask, _mm256_sub_ps(d, shift[2]));
    }
    add_pair<Of>(x, y, d, sums[0]);
  }
  for (int m = 0; m < kPairMoments; ++m) {
    if (!(Of >> kPairPlaces[m] & 1)) continue;
    __m256 sum = sums[0][m];
    for (int chain = 1; chain < kChains; ++chain) sum = _mm256_add_ps(sum, sums[chain][m]);
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, sum);
    out[kPairPlaces[m]] +=
        double((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + double((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

// Computes all moments that guidance rules use in one loop: two loads and a difference for up to nine sums.
template <unsigned Of, bool Centred, class E>
void pair_avx2(const E* a, const E* b, int64_t count, const E* const* after, Centring<float>* centring, double* out) {
  constexpr int64_t kBegin = 256;                 // elements from which the first shifts are computed
  constexpr int64_t kPart = 512 * chains_of(Of);  // 64 float additions for each sum, which is then added in double
  for (int64_t first = 0; first < count; first += kPart) {
    const int64_t part = count - first < kPart ? count - first : kPart;
    const E* ahead[2] = {after[0] ? after[0] + first : nullptr, after[1] ? after[1] + first : nullptr};
    if constexpr (!Centred) {
      pair_part<Of, false>(a + first, b + first, part, ahead, nullptr, out);
    } else {
      if (!centring->begun()) {  // an extra pass over elements that stay in the first-level cache
        const E* none[2] = {};
        const int64_t some = part < kBegin ? part : kBegin;
        pair_part<Of, true>(a, b, some, none, centring->shifts, centring->held);
        centring->begin(some);
      }
      const float* shifts = centring->shifts;
      if (((Of & kA) && shifts[0] != 0) || ((Of & kB) && shifts[1] != 0) || ((Of & kD) && shifts[2] != 0))
        pair_part<Of, true>(a + first, b + first, part, ahead, shifts, centring->held);
      else
        pair_part<Of, false>(a + first, b + first, part, ahead, nullptr, centring->held);
      centring->add(part);
    }
  }
}

// Calls the first of these sets that contains all wanted moments, since fewer sums cost less. The last has all nine.
template <bool Centred, unsigned Of, unsigned... Others, class... Rest>
void pair_of(unsigned wanted, Rest&... rest) {
  if constexpr (sizeof...(Others) > 0)
    if (wanted & ~Of) return pair_of<Centred, Others...>(wanted, rest...);
  pair_avx2<Of, Centred>(rest...);
}
template <class E>
void pair(const Moments& op, const E* a, const E* b, int64_t count, const E* const* after, Centring<float>* centring,
          double* out) {
  constexpr unsigned kAll = kAA | kAB | kAD | kBB | kBD | kDD | kA | kB | kD;
  if (op.centred) return pair_of<true, kAA | kAD | kDD | kA | kD, kAll>(op.wanted, a, b, count, after, centring, out);
  pair_of<false, kDD, kAB | kBB, kAA | kAD | kDD, kAB | kAD | kBD, kBB | kDD, kAA | kAD | kDD | kA | kD, kAll>(
      op.wanted, a, b, count, after, centring, out);
}
#endif

// Whether these are all products and sums of two tensors and their difference.
bool is_pair(const Moments& op) {
#ifdef LGD_HAS_CLONES
  static const bool fits = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const Column* columns = op.read.columns;
  const auto is = [](Column column, int plus, int minus) { return column.plus == plus && column.minus == minus; };
  if (!fits || op.count != 12 || op.read.count != 3 || op.read.tensor_count != 2) return false;
  if (!is(columns[0], 0, -1) || !is(columns[1], 1, -1) || !is(columns[2], 0, 1)) return false;
  for (int m = 0; m < 12; ++m)
    if (op.products[m].left != (m < 9 ? m / 3 : m - 9) || op.products[m].right != (m < 9 ? m % 3 : -1)) return false;
  return true;
#else
  return false;
#endif
}

template <class S>
struct Ones {
  alignas(64) S values[kBlock];
  Ones() {
    for (S& value : values) value = 1;
  }
};

// Sums neighbours that share a column together: (i, j), (i, k), ..., or sums, which share a column of ones.
template <class S>
void add_products(const Moments& op, const S* const* columns, const S* ones, int64_t count, double* sums) {
  for (int m = 0; m < op.count;) {
    const Product own = op.products[m];
    const S* others[kTogether];
    S found[kTogether];
    int together = 0;
    for (; m + together < op.count && together < kTogether; ++together) {
      const Product next = op.products[m + together];
      const bool shares = own.right < 0 ? next.right < 0 : next.right >= 0 && next.left == own.left;
      if (!shares || op.same_as[m + together] != m + together) break;
      others[together] = columns[own.right < 0 ? next.left : next.right];
    }
    if (together) dots(together, own.right < 0 ? ones : columns[own.left], others, count, found);
    for (int n = 0; n < together; ++n) sums[m + n] += found[n];
    m += together ? together : 1;  // none: it equals an earlier product
  }
}

}  // namespace

// Columns of a block are in the first-level cache before anything is summed, so a product costs one or two loads.
template <class S>
void moments(const Moments& op, int64_t sample, int64_t first, int64_t last, double* sums) {
  alignas(64) S buffers[2 * kMostTensors][kBlock];
  static const Ones<S> ones;
  const bool of_a_pair = std::is_same<S, float>::value && is_pair(op);
  const Columns& read = op.read;
  const int64_t length = of_a_pair && (read.all(dtype_of<S>()) || read.all(DType::bf16)) ? kInPlace : kBlock;
  std::optional<Centring<S>> centring;
  if (op.centred) centring.emplace(read, sample);
  for (int64_t at = first; at < last; at += length) {
    const int64_t count = last - at < length ? last - at : length;
    const auto block = [&](int n, auto* buffer) {
      return read_block(read.tensors[n], read.sample_of(n, sample), at, count, buffer);
    };
#ifdef LGD_HAS_CLONES
    if constexpr (std::is_same<S, float>::value)
      if (of_a_pair) {
        with_elements<S>(
            [&](auto element) {
              using E = decltype(element);
              auto *a = reinterpret_cast<E*>(buffers[0]), *b = reinterpret_cast<E*>(buffers[1]);
              const E* after[2];
              for (int n = 0; n < 2; ++n)
                after[n] = op.prefetched[n].data && op.prefetched[n].dtype == dtype_of<E>()
                               ? op.prefetched[n].at<E>(sample, at)
                               : nullptr;
              pair(op, block(0, a), block(1, b), count, after, centring ? &*centring : nullptr, sums);
            },
            read.tensors[0], read.tensors[1]);
        continue;
      }
#endif
    const S *tensors[kMostTensors], *columns[kMostTensors];
    for (int n = 0; n < read.tensor_count; ++n) tensors[n] = block(n, buffers[n]);
    const auto add_block = [&](const S* shifts, double* to) {
      for (int k = 0; k < read.count; ++k) {
        const Column column = read.columns[k];
        columns[k] = tensors[column.plus];
        S* own = buffers[kMostTensors + k];
        if (column.minus >= 0) subtract(own, columns[k], tensors[column.minus], count), columns[k] = own;
        if (shifts) subtract(own, columns[k], shifts[k], count), columns[k] = own;
      }
      add_products(op, columns, ones.values, count, to);
    };
    if (!centring) {
      add_block(nullptr, sums);
      continue;
    }
    if (at == first) {
      add_block(centring->shifts, centring->held);
      centring->begin(count);
    }
    add_block(centring->shifts, centring->held);
    centring->add(count);
  }
  if (centring) {
    if (centring->held_count) centring->move();
    for (int m = 0; m < op.count; ++m) sums[m] += centring->about[m];
  }
  if (!read.inside(sample))
    for (int m = 0; m < op.count; ++m) sums[m] = NAN;
}

template void moments<float>(const Moments&, int64_t, int64_t, int64_t, double*);
template void moments<double>(const Moments&, int64_t, int64_t, int64_t, double*);

}  // namespace lgd
