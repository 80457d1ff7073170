// LGD_INSTRUCTION_SET=x86-64-v3 (AVX2) or x86-64 (SSE2), set before the module is loaded, selects the code for such a
// processor. Resolvers bind the clones while the module is loaded; they read the processor's features from libgcc.
// setup.py links with --wrap, so that they call this function instead.
#include "scalar.h"

#ifdef LGD_HAS_CLONES
// noplt: called through the global offset table, which is filled before the first resolver runs, unlike the PLT.
extern "C" __attribute__((noplt)) char* getenv(const char* name);
extern "C" int __real___cpu_indicator_init();
extern "C" __attribute__((visibility("hidden"))) struct {
  unsigned vendor, type, subtype, features[1];
} __cpu_model;
extern "C" __attribute__((visibility("hidden"))) unsigned __cpu_features2[];

// The bits of gcc's i386-cpuinfo.h. They are part of gcc's ABI, so they do not change.
extern "C" __attribute__((visibility("hidden"), no_sanitize("address", "undefined"))) int
__wrap___cpu_indicator_init() {
  constexpr unsigned kAvx512f = 1u << 15, kAvx2 = 1u << 10, kFma = 1u << 14;  // features[0]
  constexpr unsigned kF16c = 1u << 17, kV3 = 1u << 1, kV4 = 1u << 2;          // features2[0], [2], [2]
  const int result = __real___cpu_indicator_init();
  const char* wanted = getenv("LGD_INSTRUCTION_SET");
  const auto is = [wanted](const char* name) {
    int i = 0;
    for (; wanted[i] && wanted[i] == name[i];) ++i;
    return wanted[i] == name[i];
  };
  if (!wanted) return result;
  if (is("x86-64-v3") || is("x86-64")) {
    __cpu_model.features[0] &= ~kAvx512f;
    __cpu_features2[2] &= ~kV4;
  }
  if (is("x86-64")) {
    __cpu_model.features[0] &= ~(kAvx2 | kFma);
    __cpu_features2[0] &= ~kF16c;
    __cpu_features2[2] &= ~kV3;
  }
  return result;
}
#endif
