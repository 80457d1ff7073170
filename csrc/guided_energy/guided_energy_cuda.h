// Launchers: kernels on the stream, nothing allocated, nothing waited for. They return a cudaError_t.
#pragma once
#include "guided_energy.h"

namespace lgd {

// Staged in shared memory, for at least a warp's width of elements: more rows than this are not taken.
constexpr int64_t kStaged = 11264, kMostRows = kStaged / 32;
inline int64_t guided_energy_rows(int64_t m, int64_t k) { return 2 * m + k; }

// Into how many parts the data of an item is cut. Nothing else decides it, so neither does it the bits of a sum.
int64_t guided_energy_chunks(int64_t batch, int64_t row);

struct EnergyOutputs {
  float *loss, *slope;  // [B]
  double* statistics;   // [B, op.statistics()]
};

// parts: [B, chunks, op.statistics()].
int guided_energy_cuda(const GuidedEnergy& op, const EnergyOptions& options, int64_t batch, int64_t row, float* parts,
                       const EnergyOutputs& out, void* stream);

// Any number of particles and targets. One kernel, one read of each byte where there are four particles at most.
int guided_energy_backward_cuda(const GuidedEnergyBackward& op, int64_t batch, int64_t row, void* stream);

}  // namespace lgd
