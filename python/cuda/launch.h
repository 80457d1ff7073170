// Turns a launcher's error code into an exception.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace lgd {

inline void check(int error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + cudaGetErrorString(cudaError_t(error)));
}

}  // namespace lgd
