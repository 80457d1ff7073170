// Loops over a block that several ops run. E is the type of storage, S the arithmetic type.
#pragma once
#include <cstring>

#include "scalar.h"

namespace lgd {

// Two neighbouring elements in one 32-bit lane, unpacked by a shift and a mask, without a change of width.
struct Bf16Pair {
  uint32_t bits;

  LGD_INLINE static Bf16Pair load(const bf16* from) {
    Bf16Pair pair;
    std::memcpy(&pair.bits, from, sizeof pair.bits);
    return pair;
  }
  LGD_INLINE void store(bf16* to) const { std::memcpy(to, &bits, sizeof bits); }
  LGD_INLINE static Bf16Pair of(float first, float second) {
    return {(round_to_bf16(first) >> 16) | (round_to_bf16(second) & 0xffff0000u)};
  }
  LGD_INLINE float first() const { return bits_as<float>(bits << 16); }
  LGD_INLINE float second() const { return bits_as<float>(bits & 0xffff0000u); }
};

constexpr int64_t kLine = 64;  // bytes

// Prefetches a line that is written soon.
LGD_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 1); }

// How far ahead, in bytes, lines are prefetched, one by one between reads, so that no store waits.
constexpr int64_t kAhead = 4096;

// out[i] = body(in[i]...), for a body of S, rounded once. To be called from a function with LGD_CLONES.
template <class S, class E, class Body, class... In>
LGD_INLINE void map(E* out, int64_t count, const Body& body, const In*... in) {
  constexpr int64_t kStrip = kLine / int64_t(sizeof(E)), ahead = kAhead / int64_t(sizeof(E));
  constexpr bool kPairs = (std::is_same<E, bf16>::value && ... && std::is_same<In, bf16>::value);
  const auto some = [&](int64_t first, int64_t last) LGD_LAMBDA {
    if constexpr (kPairs) {
      const int64_t even = first + ((last - first) & ~int64_t(1));
#pragma omp simd
      for (int64_t i = first; i < even; i += 2)
        Bf16Pair::of(body(S(Bf16Pair::load(in + i).first())...), body(S(Bf16Pair::load(in + i).second())...))
            .store(out + i);
      first = even;
    }
#pragma omp simd
    for (int64_t i = first; i < last; ++i) out[i] = rounded<E>(body(S(to_float(in[i]))...));
  };
  int64_t done = 0;
  for (; done + ahead + kStrip <= count; done += kStrip) {
    prefetch(out + done + ahead);
    some(done, done + kStrip);
  }
  some(done, count);
}

constexpr int kSums = 32;  // independent sums, so that no addition waits for the previous one

// The sum of term(in[i]...), in an order that depends on count alone. To be called from a function with LGD_CLONES.
template <class S, class Term, class E, class... In>
LGD_INLINE S sum(int64_t count, const Term& term, const E* first, const In*... in) {
  S sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    if constexpr (std::is_same<E, bf16>::value) {
      for (int j = 0; j < kSums / 2; ++j) {
        sums[j] += term(Bf16Pair::load(first + i + 2 * j).first(), Bf16Pair::load(in + i + 2 * j).first()...);
        sums[j + kSums / 2] +=
            term(Bf16Pair::load(first + i + 2 * j).second(), Bf16Pair::load(in + i + 2 * j).second()...);
      }
    } else {
      for (int j = 0; j < kSums; ++j) sums[j] += term(first[i + j], in[i + j]...);
    }
  }
  for (int j = 0; i + j < count; ++j) sums[j] += term(S(to_float(first[i + j])), S(to_float(in[i + j]))...);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// <a, b>
template <class S>
S dot(const S* a, const S* b, int64_t count);

// <a, 1>
template <class S>
S total(const S* a, int64_t count);

// out = factor * in
template <class E, class S>
void scale(E* out, const E* in, S factor, int64_t count);

// <upstream, cond - uncond>, the difference taken before the sum
template <class S, class E>
S dot_difference(const E* upstream, const E* cond, const E* uncond, int64_t count);

}  // namespace lgd
