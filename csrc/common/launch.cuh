// How a kernel is launched and how it declares shared memory. tests/cuda/ has both in plain C++, to run kernels on a
// CPU.
#pragma once
#include <cuda_runtime.h>

#ifndef LGD_LAUNCH

// LGD_LAUNCH(kernel, blocks, threads, stream, arguments...)
#define LGD_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// LGD_SHARED(name, type), the type of an array written as float[4][8].
#define LGD_SHARED(name, ...) __shared__ lgd::Type<__VA_ARGS__> name

#endif

namespace lgd {

template <class T>
using Type = T;

}  // namespace lgd
