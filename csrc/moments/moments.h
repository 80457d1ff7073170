// Inner products and sums of columns over each sample, in one read; also centred, of columns less their means.
#pragma once
#include "../common/columns.h"

namespace lgd {

constexpr int kMostProducts = 96;

// Of two columns; right < 0: the left column alone.
struct Product {
  int left, right;
};

struct Moments {
  Columns read;
  Product products[kMostProducts];
  int same_as[kMostProducts];  // the first product that equals this one: only that is summed
  int count;                   // of products
  unsigned wanted = ~0u;       // a bit for each product: the sums of the others may stay 0
  Rows prefetched[2];          // rows that are read, and written, right after the moments; or absent
  bool centred;                // products are all K x K and the sums; of columns less their origins, for `centre`

  void find_equal_products() {
    for (int m = 0; m < count; ++m) {
      const Product own = products[m];
      int first = 0;
      for (; first < m; ++first) {
        const Product other = products[first];
        if (own.left == other.left && own.right == other.right) break;
        if (own.right >= 0 && own.left == other.right && own.right == other.left) break;
      }
      same_as[m] = first;
    }
  }
};

// Adds to sums[m] product m summed over elements [first, last) of one sample. S: float, or double where a tensor is.
//
// If centred, each column's first element, its origin, is subtracted, so that sums of the parts of a sample can be
// added.
template <class S>
void moments(const Moments& op, int64_t sample, int64_t first, int64_t last, double* sums);

}  // namespace lgd
