// The digest of csrc/ and python/ that lgd_kernels/runtime/builds.py reads from an extension's bytes.
#pragma once

#if __has_include("source_digest.h")
#include "source_digest.h"  // setup.py writes it into its build folder: one line, #define LGD_SOURCE_DIGEST "..."
#else
#define LGD_SOURCE_DIGEST "unknown"
#endif

namespace lgd {
extern const char source_digest[];  // extern, so that the compiler keeps it as one string
const char source_digest[] = "lgd-sources-" LGD_SOURCE_DIGEST;
}  // namespace lgd
