// Storage types and their conversion from and to float, inline, by integer operations that vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define LGD_INLINE __host__ __device__ __forceinline__
#else
#define LGD_INLINE inline __attribute__((always_inline))
#endif

#define LGD_LAMBDA __attribute__((always_inline))

// Row loops are compiled once for each instruction set, and the best one is bound when the module is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__CUDACC__)
#define LGD_HAS_CLONES
#define LGD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LGD_CLONES
#endif

namespace lgd {

enum class DType : int { f32, bf16, f16, f64 };  // in the order of python/arguments.h

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
LGD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same width");
  return __builtin_bit_cast(To, from);
}

LGD_INLINE float to_float(bf16 value) {
#if defined(__CUDA_ARCH__)  // opaque to the compiler, which would move a shift up to the load and wait there
  float wide;
  asm("mov.b32 %0, {%1, %2};" : "=f"(wide) : "h"(uint16_t(0)), "h"(value.bits));
  return wide;
#else
  return bits_as<float>(uint32_t(value.bits) << 16);
#endif
}

LGD_INLINE float to_float(f16 value) {
#if defined(__CUDA_ARCH__)  // one instruction where there is one
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits = (magnitude << 13) + (112u << 23);  // the biases of the exponents differ by 112
  bits = magnitude < 0x400u ? bits_as<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f) : bits;  // subnormal
  bits = magnitude >= 0x7c00u ? bits | 0x7f800000u : bits;                                     // infinity, NaN
  return bits_as<float>(bits | (uint32_t(value.bits & 0x8000u) << 16));
#endif
}

LGD_INLINE float to_float(float value) { return value; }
LGD_INLINE double to_float(double value) { return value; }

// Rounds to the nearest, ties to even.
template <class T>
LGD_INLINE T from_float(float value);

// The bfloat16 in the upper half of the result.
LGD_INLINE uint32_t round_to_bf16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
}

template <>
LGD_INLINE bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  return {uint16_t(round_to_bf16(value) >> 16)};
#endif
}

template <>
LGD_INLINE f16 from_float<f16>(float value) {
#if defined(__CUDA_ARCH__)
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 leaves the subnormal's bits, rounded, at the low end of the sum.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? special : half;
  return {uint16_t(half | ((bits >> 16) & 0x8000u))};
#endif
}

template <>
LGD_INLINE float from_float<float>(float value) {
  return value;
}

template <>
LGD_INLINE double from_float<double>(float value) {
  return value;
}

// A result of the arithmetic type S, rounded once to its type of storage.
template <class E, class S>
LGD_INLINE E rounded(S value) {
  if constexpr (std::is_same<E, S>::value)
    return value;
  else
    return from_float<E>(float(value));
}

// One scalar of any storage type, as the arithmetic type S.
template <class S>
LGD_INLINE S load_scalar(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return S(static_cast<const float*>(data)[index]);
    case DType::f64:
      return S(static_cast<const double*>(data)[index]);
    case DType::bf16:
      return S(to_float(static_cast<const bf16*>(data)[index]));
    default:
      return S(to_float(static_cast<const f16*>(data)[index]));
  }
}

LGD_INLINE float root(float value) { return sqrtf(value); }
LGD_INLINE double root(double value) { return sqrt(value); }

// A number for each sample: a tensor [B] (stride 0 shares one), or, without data, one value for all.
struct PerSample {
  const void* data;
  DType dtype;
  int64_t stride;
  double value;

  template <class S>
  LGD_INLINE S at(int64_t sample) const {
    return data ? load_scalar<S>(data, dtype, sample * stride) : S(value);
  }
};

}  // namespace lgd
