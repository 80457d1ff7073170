// The part of CUDA that csrc/ uses, for a C++ compiler. simulator.cpp runs each thread of a block as a fiber.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
extern "C" {
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
}

namespace simulator {

// Where a barrier or a shuffle stands in the source.
struct Site {
  const char* file;
  int line;
};

struct Thread {
  uint3 thread, block, blocks, threads;
};
extern Thread* running;

// End the grid with an error. The thread does not go on.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, Site site);

void barrier(Site site);

// Gives `word` to the other lanes of the warp, and returns the 32 words once all lanes gave theirs.
const uint64_t* exchange(unsigned mask, uint64_t word, Site site);

// Returns the block's memory of a shared variable; `variable` identifies it.
void* shared(const void* variable, size_t bytes, size_t alignment);
template <class T>
T& shared(const void* variable, size_t alignment) {
  return *static_cast<T*>(shared(variable, sizeof(T), alignment > alignof(T) ? alignment : alignof(T)));
}

// Calls body(context) as each thread of each block.
void run(const char* kernel, int64_t blocks, int64_t threads, void (*body)(const void*), const void* context);

template <class Call>
void launch(const char* kernel, int64_t blocks, int64_t threads, const Call& call) {
  run(kernel, blocks, threads, [](const void* context) { (*static_cast<const Call*>(context))(); }, &call);
}

inline int lane() { return int(running->thread.x % 32); }

// The value of lane `from`, or this lane's own if the warp has no such lane.
template <class T>
T shuffle(unsigned mask, T value, int from, Site site) {
  static_assert(sizeof(T) <= 8, "a word");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const uint64_t* words = exchange(mask, word, site);
  if (from >= 0 && from < 32) std::memcpy(&value, words + from, sizeof value);
  return value;
}

}  // namespace simulator

#define threadIdx (simulator::running->thread)
#define blockIdx (simulator::running->block)
#define gridDim (simulator::running->blocks)
#define blockDim (simulator::running->threads)

#define LGD_HERE \
  simulator::Site { __FILE__, __LINE__ }
#define __syncthreads() simulator::barrier(LGD_HERE)
#define __shfl_xor_sync(mask, value, bits) simulator::shuffle(mask, value, simulator::lane() ^ (bits), LGD_HERE)
#define __shfl_down_sync(mask, value, step) simulator::shuffle(mask, value, simulator::lane() + (step), LGD_HERE)

#define LGD_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), simulator::launch(#kernel, blocks, threads, [&] { kernel(__VA_ARGS__); }))
// An `alignas` before the macro applies to the variable that identifies the memory, and so to the memory.
#define LGD_SHARED(name, ...)        \
  static const char name##_site = 0; \
  auto& name = simulator::shared<::lgd::Type<__VA_ARGS__>>(&name##_site, __alignof__(name##_site))
