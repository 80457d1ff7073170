// Kernels with one mistake each, which test_cuda.py gives to the simulator, and one without.
#include "../../csrc/common/launch.cuh"

namespace {

__global__ void right(int* out) {
  LGD_SHARED(word, int);
  if (threadIdx.x == 0) word = int(blockIdx.x);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = __shfl_xor_sync(0xffffffffu, word + int(threadIdx.x), 1);
}

__global__ void without_a_barrier(int* out) {
  LGD_SHARED(word, int);
  if (threadIdx.x == 0) word = 1;
  out[threadIdx.x] = word;
}

__global__ void different_barriers(int* out) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[0] = 0;
}

__global__ void ended_lane() {
  if (threadIdx.x == 3) return;
  __shfl_down_sync(0xffffffffu, 1.0f, 1);
}

__global__ void different_shuffles() {
  if (threadIdx.x % 2)
    __shfl_down_sync(0xffffffffu, 1.0f, 1);
  else
    __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void part_of_a_warp() {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 1.0f, 1);
}

__global__ void much_shared_memory(float* out) {
  LGD_SHARED(most, float[12288]);
  LGD_SHARED(more, float);
  out[0] = most[0] + more;
}

void call(int which, void* out) {
  auto* integers = static_cast<int*>(out);
  switch (which) {
    case 0:
      return LGD_LAUNCH(right, 3, 64, nullptr, integers);
    case 1:
      return LGD_LAUNCH(without_a_barrier, 1, 32, nullptr, integers);
    case 2:
      return LGD_LAUNCH(different_barriers, 1, 32, nullptr, integers);
    case 3:
      return LGD_LAUNCH(ended_lane, 1, 32, nullptr);
    case 4:
      return LGD_LAUNCH(different_shuffles, 1, 32, nullptr);
    case 5:
      return LGD_LAUNCH(part_of_a_warp, 1, 32, nullptr);
    case 6:
      return LGD_LAUNCH(much_shared_memory, 1, 32, nullptr, static_cast<float*>(out));
    case 7:
      return LGD_LAUNCH(right, int64_t(1) << 31, 64, nullptr, integers);
    case 8:
      return LGD_LAUNCH(right, 1, 1025, nullptr, integers);
  }
}

}  // namespace

// Returns the error, or null.
extern "C" __attribute__((visibility("default"))) const char* misuse(int which, void* out) {
  call(which, out);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
