// The noise contract (see lgd_kernels/runtime/philox.py): Philox4x32-10 and Box-Muller, one counter to four normals.
#pragma once
#include <cmath>
#include <cstdint>

#include "scalar.h"

namespace lgd {

enum : uint32_t { kStreamUser = 0, kStreamStep = 1, kStreamTargets = 2 };

// One seed for the batch, or one for each item; then the noise of an item does not depend on its place. An item is one
// sample, or several particles, which are consecutive samples.
struct Seed {
  const int64_t* data;  // null: `value`
  int64_t stride;
  int64_t value;
  uint32_t first_item;
  bool own;  // a seed for each item, with any stride (0: all seeds are equal)

  LGD_INLINE uint64_t key(int64_t item) const { return uint64_t(data ? data[item * stride] : value); }
  LGD_INLINE uint32_t index(int64_t item, int64_t particle = 0, int64_t particles = 1) const {
    return uint32_t((own ? 0 : int64_t(first_item) + item) * particles + particle);
  }
};

LGD_INLINE void philox(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * counter[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * counter[2];
    counter[0] = uint32_t(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = uint32_t(product1);
    counter[2] = uint32_t(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// (word + 1/2) 2^-32, kept below 1.
LGD_INLINE float philox_uniform(uint32_t word) {
  const float u = float(word) * 0x1p-32f + 0x1p-33f;
  return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

// a b + c, rounded once wherever there is an instruction for that (the compiler contracts it).
struct Contracted {
  LGD_INLINE static float fused(float a, float b, float c) { return a * b + c; }
};

// The same without FMA. In double the product is exact, and a sum rounded to odd can be rounded again without error.
struct Emulated {
  LGD_INLINE static float fused(float a, float b, float c) {
    const double product = double(a) * b, sum = product + c, part = sum - product;
    const double error = (product - (sum - part)) + (c - part);  // sum + error is exact
    const uint64_t bits = bits_as<uint64_t>(sum);
    const uint64_t odd = (error > 0) == (sum > 0) ? bits + 1 : bits - 1;
    return float(bits_as<double>(error == 0 || (bits & 1) ? bits : odd));
  }
};

// ln u for 0 < u < 1: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), ln(1 + f) = f + f^2 P(f), 3e-8 relative.
template <class By = Contracted>
LGD_INLINE float philox_log(float u) {
  const uint32_t bits = bits_as<uint32_t>(u) - 0x3f3504f3u;  // sqrt(1/2)
  const float e = float(int32_t(bits) >> 23);
  const float f = bits_as<float>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 0.0873475968837738f;
  p = By::fused(p, f, -0.14307497441768646f);
  p = By::fused(p, f, 0.14917992055416107f);
  p = By::fused(p, f, -0.1657051295042038f);
  p = By::fused(p, f, 0.19962070882320404f);
  p = By::fused(p, f, -0.25001755356788635f);
  p = By::fused(p, f, 0.33333951234817505f);
  p = By::fused(p, f, -0.49999991059303284f);
  return By::fused(e, 0.6931471805599453f, By::fused(f * f, p, f));
}

// (cos, sin) of u turns. The nearest quarter turn is taken off exactly, so the angle keeps every bit of u.
template <class By = Contracted>
LGD_INLINE void philox_turn(float u, float& cosine, float& sine) {
  const int32_t quarter = int32_t(u * 4.0f + 0.5f);
  const float f = u - float(quarter) * 0.25f, square = f * f;  // f in [-1/8, 1/8]
  float c = 59.2459602355957f;
  c = By::fused(c, square, -85.44374084472656f);
  c = By::fused(c, square, 64.93932342529297f);
  c = By::fused(c, square, -19.739208221435547f);
  c = By::fused(c, square, 1.0f);
  float s = -75.39356231689453f;
  s = By::fused(s, square, 81.59235382080078f);
  s = By::fused(s, square, -41.3416633605957f);
  s = By::fused(s, square, 6.2831854820251465f);
  s = s * f;
  const bool odd = quarter & 1;
  const float along = odd ? s : c, across = odd ? c : s;
  cosine = bits_as<float>(bits_as<uint32_t>(along) ^ (uint32_t((quarter + 1) & 2) << 30));
  sine = bits_as<float>(bits_as<uint32_t>(across) ^ (uint32_t(quarter & 2) << 30));
}

template <class By = Contracted>
LGD_INLINE void box_muller(uint32_t word0, uint32_t word1, float& z0, float& z1) {
  const float r = sqrtf(-2.0f * philox_log<By>(philox_uniform(word0)));
  float cosine, sine;
  philox_turn<By>(philox_uniform(word1), cosine, sine);
  z0 = r * cosine;
  z1 = r * sine;
}

// Four normals, the lanes of the quad of elements 4 quad to 4 quad + 3.
LGD_INLINE void philox_normal4(uint64_t key, uint64_t quad, uint32_t sample, uint32_t stream, float (&z)[4]) {
  uint32_t words[4] = {uint32_t(quad), uint32_t(quad >> 32), sample, stream};
  philox(words, uint32_t(key), uint32_t(key >> 32));
  box_muller(words[0], words[1], z[0], z[1]);
  box_muller(words[2], words[3], z[2], z[3]);
}

}  // namespace lgd
