// One block for each chunk of an item adds up the chunk's part of the statistics in float, a few thousand terms to a
// sum. Then one block for each item adds the parts, in order and in double. Up to four particles and four targets are
// kept in registers, more in shared memory.
//
// m = k = 4, B = 256, D = 12288: 101 MB are read in half precision, 201 MB in float (82 and 164 MB with targets made
// here), each byte once; 516 Mflop, for each element of an item 80 for particles and targets, 56 for particles and
// particles, 28 to guide. By these counts the kernel is bound by memory, unless it draws noise: a normal takes about 50
// instructions.
#include "guided_energy.cuh"
#include "guided_energy_cuda.h"

namespace lgd {
namespace {

constexpr int kFew = 128;        // threads of a block if sums stay in registers
constexpr int kMany = 192;       // if rows are staged: with 256, sums spill
constexpr int kTile = 4;         // rows in a warp's registers, and as many others
constexpr int64_t kPart = 1024;  // elements: chunks are multiples

struct Chunks {
  int64_t length;
  int count;

  // Enough blocks to fill a large GPU a few times over, if the data allow.
  static Chunks of(int64_t batch, int64_t row) {
    const int64_t parts = (row + kPart - 1) / kPart, most = (1023 + batch) / batch, wanted = most < 64 ? most : 64;
    const int64_t length = (parts + wanted - 1) / wanted;
    return {length * kPart, int((parts + length - 1) / length)};
  }
};

// The place of a sum among an item's statistics, or -1: of a particle and a target (P0, P1, P2), or of particles j < l.
LGD_INLINE int64_t target_slot(const GuidedEnergy& op, int which, int j, int k) {
  if (j >= op.m || k >= op.target.k) return -1;
  if (which < 2) return which * op.m * op.target.k + j * op.target.k + k;
  return k == 0 ? 2 * op.m * op.target.k + j : -1;
}
LGD_INLINE int64_t particle_slot(const GuidedEnergy& op, int which, int j, int l) {
  if (l <= j || l >= op.m) return -1;
  return 2 * op.m * op.target.k + op.m + which * op.pairs() + j * op.m - int64_t(j) * (j + 1) / 2 + l - j - 1;
}

// Returns the sum of values[i] over the warp, in lane i. Lanes swap halves, so each step adds half as many as the last.
template <int kHalf = 16>
__device__ __forceinline__ float spread_sum(float (&values)[32]) {
  const bool upper = threadIdx.x & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = values[i + kHalf];
    values[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kHalf);
  }
  if constexpr (kHalf > 1) return spread_sum<kHalf / 2>(values);
  return values[0];
}

// Blocks on a multiprocessor, so that every load of an iteration and every sum has a register. A few warps, with 16
// bytes of up to 16 rows in flight for each thread, saturate memory.
template <int M>
constexpr int kResident = M == 4 ? 2 : 3;

// At most M particles and K targets. If there are fewer, the last takes the places left, and its sums are not stored.
template <class T, int M, int K>
__global__ void __launch_bounds__(kFew, kResident<M>) few(GuidedEnergy op, Chunks chunks, int64_t row, float* parts) {
  constexpr int kMeetings = M * K, kPairs = M * (M - 1) / 2, kParticles = 2 * kMeetings + M;
  constexpr int kSums = kParticles + 3 * kPairs, kGroups = (kSums + 31) / 32;
  LGD_SHARED(k, Scalars);
  LGD_SHARED(warps, float[kFew / 32][32 * kGroups]);
  const int64_t item = blockIdx.x / chunks.count, first = blockIdx.x % chunks.count * chunks.length;
  const int64_t last = first + chunks.length < row ? first + chunks.length : row;
  if (threadIdx.x == 0) k.of(op, item);
  __syncthreads();

  float sums[kGroups][32] = {};
  const auto sum = [&](int i) -> float& { return sums[i / 32][i % 32]; };
  for (int64_t at = first + threadIdx.x * kWidth<T>; at < last; at += kFew * kWidth<T>) {
    const int count = last - at < kWidth<T> ? int(last - at) : kWidth<T>;
    Particle<T> particles[M];
    typename Read<T>::type targets[K];
#pragma unroll
    for (int j = 0; j < M; ++j) particles[j].load(op, item * op.m + (j < op.m ? j : op.m - 1), at, count);
    if (op.target.kind == Targets::tensor) {
#pragma unroll
      for (int t = 0; t < K; ++t)
        targets[t] =
            Read<T>::at(op.target.data, item * op.target.k + (t < op.target.k ? t : op.target.k - 1), at, count);
    } else {
      targets[0] = Read<T>::at(op.target.data, item, at, count);  // x0
    }
#pragma unroll
    for (int quad = 0; quad < kWidth<T> / 4; ++quad) {
      float x_s[M][4], slope[M][4], y[K][4];
#pragma unroll
      for (int j = 0; j < M; ++j) guide<T>(op, k, particles[j], targets[0], quad, x_s[j], slope[j]);
      if (op.draws || op.noise.data) {
#pragma unroll
        for (int j = 0; j < M; ++j)
          disturb<T>(op, k, item * op.m + (j < op.m ? j : op.m - 1), j, at, quad, count, x_s[j]);
      }
#pragma unroll
      for (int t = 0; t < K; ++t) aim<T>(op, k, targets[t], t, at, quad, y[t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (std::is_same<T, Mixed>::value && 4 * quad + i >= count) break;
#pragma unroll
        for (int j = 0; j < M; ++j) {
          sum(2 * kMeetings + j) += slope[j][i] * slope[j][i];
#pragma unroll
          for (int t = 0; t < K; ++t) {
            const float apart = x_s[j][i] - y[t][i];
            sum(j * K + t) += apart * apart;
            sum(kMeetings + j * K + t) += apart * slope[j][i];
          }
#pragma unroll
          for (int l = j + 1; l < M; ++l) {
            const int pair = kParticles + j * M - j * (j + 1) / 2 + l - j - 1;
            const float apart = x_s[j][i] - x_s[l][i], turned = slope[j][i] - slope[l][i];
            sum(pair) += apart * apart;
            sum(pair + kPairs) += apart * turned;
            sum(pair + 2 * kPairs) += turned * turned;
          }
        }
      }
    }
  }

#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    warps[threadIdx.x / 32][32 * group + threadIdx.x % 32] = spread_sum(sums[group]);
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= kSums) return;
  float total = 0;
  for (int warp = 0; warp < kFew / 32; ++warp) total += warps[warp][i];
  int64_t slot = -1;
  if (i < 2 * kMeetings) {
    slot = target_slot(op, i / kMeetings, i % kMeetings / K, i % K);
  } else if (i < kParticles) {
    slot = target_slot(op, 2, i - 2 * kMeetings, 0);
  } else if constexpr (M > 1) {
    int j = 0, other = (i - kParticles) % kPairs;
    for (; other >= M - 1 - j; ++j) other -= M - 1 - j;
    slot = particle_slot(op, (i - kParticles) / kPairs, j, j + 1 + other);
  }
  if (slot >= 0) parts[blockIdx.x * op.statistics() + slot] = total;
}

// Any number: a span of all rows is staged, [particles, targets, slopes]. A warp takes the pairs of four particles with
// four rows, its lanes along the span. It alone adds to the sums of these pairs, in `parts`.
template <bool kTargets>
__device__ __forceinline__ void meet(const GuidedEnergy& op, const float* staged, int span, int j, int other,
                                     bool begins, float* parts) {
  float sums[2][32] = {};
  const auto sum = [&](int which, int i, int r) -> float& { return sums[which / 2][which % 2 * 16 + 4 * i + r]; };
  const int m = int(op.m), rows = kTargets ? int(op.target.k) : m;
  const float* values = staged + (kTargets ? m * span : 0);
  const float* slopes = staged + (m + int(op.target.k)) * span;
  for (int at = threadIdx.x % 32; at < span; at += 32) {
    float x_s[kTile], slope[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int place = (j + i < m ? j + i : m - 1) * span + at;  // the last takes the places left
      x_s[i] = staged[place];
      slope[i] = slopes[place];
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const int place = (other + r < rows ? other + r : rows - 1) * span + at;
      const float value = values[place], turn = kTargets ? 0.0f : slopes[place];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const float apart = x_s[i] - value, turned = slope[i] - turn;
        sum(0, i, r) += apart * apart;
        sum(1, i, r) += apart * turned;
        if (!kTargets || r == 0) sum(2, i, r) += turned * turned;
      }
    }
  }
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const float total = spread_sum(sums[group]);
    const int lane = threadIdx.x % 32, which = 2 * group + lane / 16, i = j + lane % 16 / 4, r = other + lane % 4;
    const int64_t slot = which > 2 ? -1 : kTargets ? target_slot(op, which, i, r) : particle_slot(op, which, i, r);
    if (slot >= 0) parts[slot] = begins ? total : parts[slot] + total;
  }
}

template <class T>
__global__ void __launch_bounds__(kMany, 2) many(GuidedEnergy op, Chunks chunks, int64_t row, int span, float* parts) {
  LGD_SHARED(k, Scalars);
  alignas(16) LGD_SHARED(staged, float[kStaged]);
  const int64_t item = blockIdx.x / chunks.count, first = blockIdx.x % chunks.count * chunks.length;
  const int64_t last = first + chunks.length < row ? first + chunks.length : row;
  const int m = int(op.m), rows = int(op.m + op.target.k);
  const int lefts = (m + kTile - 1) / kTile, rights = int(op.target.k + kTile - 1) / kTile, meetings = lefts * rights;
  parts += blockIdx.x * op.statistics();
  if (threadIdx.x == 0) k.of(op, item);
  for (int64_t start = first; start < last; start += span) {
    if (last - start < span) span = int(last - start + 31) / 32 * 32;  // whole warps; what lies outside is 0
    const int packs = span / kWidth<T>;
    __syncthreads();
    for (int unit = threadIdx.x; unit < rows * packs; unit += kMany) {
      const int j = unit / packs, offset = unit % packs * kWidth<T>;
      const int64_t at = start + offset, left = last - at;
      const int count = int(left < 0 ? 0 : left < kWidth<T> ? left : kWidth<T>);
      Particle<T> particle;
      typename Read<T>::type target;
      if (count && j < m) {
        particle.load(op, item * m + j, at, count);
        if (op.target.kind != Targets::tensor) target = Read<T>::at(op.target.data, item, at, count);  // x0
      } else if (count && op.target.kind == Targets::tensor) {
        target = Read<T>::at(op.target.data, item * op.target.k + j - m, at, count);
      }
#pragma unroll
      for (int quad = 0; quad < kWidth<T> / 4; ++quad) {
        Pack<float> value, slope;
        if (count && j < m) {
          guide<T>(op, k, particle, target, quad, value.value, slope.value);
          if (op.draws || op.noise.data) disturb<T>(op, k, item * m + j, j, at, quad, count, value.value);
        }
        if (count && j >= m) aim<T>(op, k, target, j - m, at, quad, value.value);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (4 * quad + i >= count) value.value[i] = slope.value[i] = 0;
        auto* to = reinterpret_cast<Pack<float>*>(staged + j * span + offset + 4 * quad);
        *to = value;
        if (j < m) to[rows * span / 4] = slope;
      }
    }
    __syncthreads();
    const bool begins = start == first;
    for (int tile = threadIdx.x / 32; tile < meetings + lefts * lefts; tile += kMany / 32) {
      const int i = (tile - meetings) / lefts, l = (tile - meetings) % lefts;
      if (tile < meetings)
        meet<true>(op, staged, span, tile / rights * kTile, tile % rights * kTile, begins, parts);
      else if (i <= l)
        meet<false>(op, staged, span, i * kTile, l * kTile, begins, parts);
    }
  }
}

__global__ void __launch_bounds__(kFew)
    finish(GuidedEnergy op, EnergyOptions options, int64_t row, int chunks, const float* parts, EnergyOutputs out) {
  const int64_t item = blockIdx.x, count = op.statistics();
  double* statistics = out.statistics + item * count;
  for (int64_t i = threadIdx.x; i < count; i += kFew) {
    double sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += parts[(item * chunks + chunk) * count + i];
    statistics[i] = sum;
  }
  __syncthreads();
  Energy energy{0, 0};
  for (int64_t i = threadIdx.x; i < guided_energy_terms(op, options); i += kFew) {
    const EnergyPair pair = guided_energy_pair(op, statistics, i, options);
    if (pair.square == 0) continue;  // a pair that coincides adds nothing
    const double power = pair.share * pow(pair.square, options.beta / 2);
    energy.loss += power;
    energy.slope += options.beta * power / pair.square * pair.along;
  }
  LGD_SHARED(energies, Energy[kFew]);
  energies[threadIdx.x] = energy;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double loss = guided_energy_variance(op, item, row), slope = 0;
  for (int i = 0; i < kFew; ++i) {
    loss += energies[i].loss;
    slope += energies[i].slope;
  }
  out.loss[item] = float(loss);
  out.slope[item] = float(slope);
}

}  // namespace

int64_t guided_energy_chunks(int64_t batch, int64_t row) { return Chunks::of(batch, row).count; }

int guided_energy_cuda(const GuidedEnergy& op, const EnergyOptions& options, int64_t batch, int64_t row, float* parts,
                       const EnergyOutputs& out, void* stream) {
  const Chunks chunks = Chunks::of(batch, row);
  const int64_t blocks = batch * chunks.count;
  const int64_t room = kStaged / guided_energy_rows(op.m, op.target.k) / 32 * 32;
  const int span = int(room < 512 ? room : 512);
  const auto launch = [&](auto type) {
    using T = decltype(type);
    if (op.m > 4 || op.target.k > 4) return LGD_LAUNCH(many<T>, blocks, kMany, stream, op, chunks, row, span, parts);
    const auto kernel = op.m <= 1 && op.target.k <= 1   ? few<T, 1, 1>
                        : op.m <= 2 && op.target.k <= 2 ? few<T, 2, 2>
                        : op.target.k <= 1              ? few<T, 4, 1>
                                                        : few<T, 4, 4>;
    LGD_LAUNCH(kernel, blocks, kFew, stream, op, chunks, row, parts);
  };
  dispatch(row, launch, op.x, op.cond, op.uncond, op.noise, op.target.data);
  LGD_LAUNCH(finish, batch, kFew, stream, op, options, row, chunks.count, parts, out);
  return cudaGetLastError();
}

}  // namespace lgd
