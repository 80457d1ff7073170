// Inner products and sums of columns over each sample, in one read; also centred, of columns less their means.
#pragma once
#include "../common/columns.h"

namespace lgd {

constexpr int kMostPairs = 96;

struct Moments {
  Columns read;
  Column pairs[kMostPairs];  // columns plus and minus are multiplied; minus < 0: the column's own sum
  int same_as[kMostPairs];   // the pair itself, or its mirror image among those before it: not summed again
  int count;
  unsigned wanted = ~0u;  // a bit for each: the rest may be left at 0
  Rows soon[2];           // what is read, and what is written, right after this: asked for meanwhile; or absent
  bool centred;           // sums about the columns' origins, for `centre`; pairs are then all K x K, and the sums
};

// Adds to sums[m] the part of pair m in elements [first, last) of one sample. S: float, or double where a tensor is.
//
// If centred, a column's first element, its origin, is subtracted, so that sums of the parts of a sample can be added.
template <class S>
void moments(const Moments& op, int64_t sample, int64_t first, int64_t last, double* sums);

}  // namespace lgd
