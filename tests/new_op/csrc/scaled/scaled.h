// out = factor x, one factor for each sample.
#pragma once
#include "../common/rows.h"

namespace lgd {

struct Scaled {
  Rows out;  // out
  Rows x;
  PerSample factor;
};

template <class S>
void scaled(const Scaled& op, int64_t sample, int64_t first, int64_t last);

}  // namespace lgd
