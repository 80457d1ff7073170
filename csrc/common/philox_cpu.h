// Noise of consecutive elements, for the CPU kernels.
#pragma once
#include "philox.h"

namespace lgd {

// out[i] = the normal of element first + i, i < count; `first` is a multiple of 4.
void philox_fill(float* out, int64_t count, int64_t first, uint64_t key, uint32_t sample, uint32_t stream);

// The same for `rows` consecutive samples, `stride` elements apart. Short samples are drawn together.
void philox_fill_rows(float* out, int64_t stride, int64_t rows, int64_t count, int64_t first, uint64_t key,
                      uint32_t sample, uint32_t stream);

}  // namespace lgd
