// Sums over pairs of points of p_i q_j k(x_i, y_j), and their gradients, a tile of 64 x 64 pairs at a time:
//   s_ij = ||x_i - y_j||^2 (or <x_i, y_j>)        value += sum_ij p_i q_j k(s_ij)         w_ij = 2 p_i q_j k'(s_ij)
//   d_x_i += c sum_j w_ij (x_i - y_j)             d_y_j += c sum_i w_ij (y_j - x_i)
// (of products, k' without the 2: d_x_i += c sum_j w_ij y_j, d_y_j += c sum_i w_ij x_i).
#pragma once
#include "../common/rows.h"
#include "kernels.h"

namespace lgd {

constexpr int kMmdTile = 64;  // points; the pairs of two tiles fill half of the nearest cache

// Points in tiles, coordinate by coordinate: [tile][dimension][64], so that the lanes of a vector are points. The rest
// of the last tile is 0, and so are its weights.
template <class S>
struct Points {
  const S* tiles;
  const S* weights;
  int64_t count, dimension;

  LGD_INLINE int64_t tile_count() const { return (count + kMmdTile - 1) / kMmdTile; }
  LGD_INLINE const S* tile(int64_t index) const { return tiles + index * dimension * kMmdTile; }
};

template <class S>
void mmd_pack(const S* rows, int64_t count, int64_t dimension, int64_t tile, S* packed);
template <class S>
void mmd_unpack(const double* packed, int64_t count, int64_t dimension, int64_t tile, S* rows);

// The pairs of one tile of x and one of y, or, where they are the same tile, those with i < j. Returns their sum; adds
// to the gradients [dimension][64] that are given. `squares` holds 64 x 64.
template <class S>
double mmd_tile(const MmdKernel& kernel, const Points<S>& x, int64_t x_tile, const Points<S>& y, int64_t y_tile,
                bool same, double coefficient, double* d_x, double* d_y, S* squares);

// The sum over pairs of a point with itself of p_i^2 k(x_i, x_i) in a tile; adds to its gradient.
template <class S>
double mmd_itself(const MmdKernel& kernel, const Points<S>& x, int64_t tile, double coefficient, double* d_x);

// A row of products <x_i, y_j>, with norms: how the large dimensions come. Squared distances follow, and where one is
// below `closest` times the sum of the norms it is taken again from differences. products [count] become w_ij; those of
// pairs that were close become 0, and their w_ij go to `close`, others 0 there. Returns the row's sum.
template <class S>
struct ProductRow {
  S* products;
  S* close;        // absent: gradients are not wanted, and no w_ij are written
  const S *x, *y;  // the point, and `count` points, row by row
  S x_norm, x_weight;
  const S *y_norms, *y_weights;
  int64_t count, dimension;
  int64_t first;  // pairs before it do not count
  S closest;
  bool any_close;  // out
};
template <class S>
double mmd_product_row(const MmdKernel& kernel, ProductRow<S>& row);

// d_x += w (x - y), d_y -= w (x - y)
template <class S>
void mmd_close_pair(const S* x, const S* y, S weight, int64_t count, S* d_x, S* d_y);

}  // namespace lgd
