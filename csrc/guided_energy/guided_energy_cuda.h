// Launchers: they start kernels on the stream, allocate nothing and do not synchronise. They return a cudaError_t.
#pragma once
#include "guided_energy.h"

namespace lgd {

// Elements in shared memory. A row takes at least a warp's width: the kernels take no more than kMostRows.
constexpr int64_t kStaged = 11264, kMostRows = kStaged / 32;
inline int64_t guided_energy_rows(int64_t m, int64_t k) { return 2 * m + k; }

// How many parts the data of an item is cut into. It depends on nothing else, so the bits of a sum do not either.
int64_t guided_energy_chunks(int64_t batch, int64_t row);

struct EnergyOutputs {
  float *loss, *slope;  // [B]
  double* statistics;   // [B, op.statistics()]
};

// parts: [B, chunks, op.statistics()].
int guided_energy_cuda(const GuidedEnergy& op, const EnergyOptions& options, int64_t batch, int64_t row, float* parts,
                       const EnergyOutputs& out, void* stream);

// Takes any number of particles and targets. One kernel; with at most four particles it reads each byte once.
int guided_energy_backward_cuda(const GuidedEnergyBackward& op, int64_t batch, int64_t row, void* stream);

}  // namespace lgd
