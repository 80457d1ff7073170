// A libcuda that does nothing: Triton's own C launcher links to it, loads modules and launches kernels on it.
// `python -m benchmarks host` compiles it into a temporary folder. What it leaves out is what the driver itself takes.
#include <stdint.h>

// Succeed, whatever the arguments.
#define NOTHING(name) \
  int name(void) { return 0; }
// Succeed, and answer through the first argument.
#define ANSWER(name, type, value) \
  int name(type* answer) {        \
    *answer = (type)(value);      \
    return 0;                     \
  }

int launches = 0;

int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  ++launches;
  return 0;
}
int cuLaunchKernel(void) {
  ++launches;
  return 0;
}
// Every attribute of a pointer is its address on the device.
int cuPointerGetAttribute(void* answer, int attribute, uint64_t pointer) {
  *(uint64_t*)answer = pointer;
  return 0;
}
int cuFuncGetAttribute(int* answer, int attribute, void* function) {
  *answer = attribute == 0 ? 1024 : 0;  // threads of a block
  return 0;
}
int cuDeviceGetAttribute(int* answer, int attribute, int device) {
  enum { kMajor = 75, kMinor = 76, kSharedMemory = 227 << 10 };
  *answer = attribute == kMajor ? 9 : attribute == kMinor ? 0 : kSharedMemory;
  return 0;
}
int cuGetErrorString(int code, const char** answer) {
  *answer = "an error of a libcuda that does nothing";
  return 0;
}

ANSWER(cuCtxGetCurrent, void*, 1)
ANSWER(cuCtxGetDevice, int, 0)
ANSWER(cuDeviceGet, int, 0)
ANSWER(cuDeviceGetCount, int, 1)
ANSWER(cuDeviceTotalMem_v2, uint64_t, 1ull << 36)
ANSWER(cuDevicePrimaryCtxRetain, void*, 1)
ANSWER(cuDriverGetVersion, int, 13000)
ANSWER(cuModuleLoadData, void*, 2)
ANSWER(cuModuleGetFunction, void*, 3)
ANSWER(cuOccupancyMaxActiveClusters, int, 1)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxPopCurrent_v2)
NOTHING(cuCtxPushCurrent_v2)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuCtxSynchronize)
NOTHING(cuDevicePrimaryCtxRelease)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorName)
NOTHING(cuInit)
NOTHING(cuMemAlloc_v2)
NOTHING(cuMemFree_v2)
NOTHING(cuMemcpyHtoD_v2)
NOTHING(cuModuleUnload)
NOTHING(cuStreamGetCtx)
NOTHING(cuStreamGetDevice)
NOTHING(cuStreamIsCapturing)
NOTHING(cuStreamSynchronize)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
