#include "philox_cpu.h"

namespace lgd {
namespace {

constexpr int kQuads = 64;  // words and normals of a group stay in the nearest cache

struct Group {
  uint32_t words[4][kQuads];
  float normals[4][kQuads];
};

// Separate loops: integer products, then the polynomials, then the interleaving; each one vectorises.
LGD_CLONES void fill_group(Group& group, uint64_t key, uint64_t quad, uint32_t sample, uint32_t stream, float* out) {
  for (int i = 0; i < kQuads; ++i) {
    uint32_t words[4] = {uint32_t(quad + i), uint32_t((quad + i) >> 32), sample, stream};
    philox(words, uint32_t(key), uint32_t(key >> 32));
    for (int lane = 0; lane < 4; ++lane) group.words[lane][i] = words[lane];
  }
  for (int pair = 0; pair < 4; pair += 2)
    for (int i = 0; i < kQuads; ++i)
      box_muller(group.words[pair][i], group.words[pair + 1][i], group.normals[pair][i], group.normals[pair + 1][i]);
  for (int i = 0; i < kQuads; ++i)
    for (int lane = 0; lane < 4; ++lane) out[4 * i + lane] = group.normals[lane][i];
}

}  // namespace

void philox_fill(float* out, int64_t count, int64_t first, const Seed& seed, int64_t sample, uint32_t stream) {
  Group group;
  const uint64_t key = seed.key(sample);
  const uint32_t index = seed.index(sample);
  int64_t done = 0;
  for (; done + 4 * kQuads <= count; done += 4 * kQuads)
    fill_group(group, key, uint64_t(first + done) >> 2, index, stream, out + done);
  for (float z[4]; done < count; done += 4) {
    philox_normal4(key, uint64_t(first + done) >> 2, index, stream, z);
    for (int64_t lane = 0; lane < 4 && done + lane < count; ++lane) out[done + lane] = z[lane];
  }
}

}  // namespace lgd
