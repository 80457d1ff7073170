// The loops over a block that more than one op runs.
#pragma once
#include "scalar.h"

namespace lgd {

// out = factor * in
template <class S>
void scale(S* out, const S* in, S factor, int64_t count);

// <upstream, cond - uncond>, the difference taken before the sum
template <class S>
S dot_difference(const S* upstream, const S* cond, const S* uncond, int64_t count);

}  // namespace lgd
