// MMD of two sets of points, a tile of 64 x 64 pairs at a time:
//   L = S_xy / (P Q)  -  lam/2 (S_xx / pairs_x + S_yy / pairs_y),  times the factor of the MMD kernel k
// with sums over pairs of p_i q_j k(x_i, y_j), and their gradients:
//   s_ij = ||x_i - y_j||^2 (or <x_i, y_j>)        value += sum_ij p_i q_j k(s_ij)         w_ij = 2 p_i q_j k'(s_ij)
//   d_x_i += c sum_j w_ij (x_i - y_j)             d_y_j += c sum_i w_ij (y_j - x_i)
// (of products, k' without the 2: d_x_i += c sum_j w_ij y_j, d_y_j += c sum_i w_ij x_i).
#pragma once
#include "../common/rows.h"
#include "kernels.h"

namespace lgd {

struct EnergyMmd {
  int64_t batch, n, k, dimension;
  const void *x, *y;                  // [batch, n, dimension], [batch, k, dimension]
  const void *x_weights, *y_weights;  // [batch, n], [batch, k]; null: 1
  MmdKernel kernel;
  double lam;
  bool unbiased, between, target_term;  // between: S_xy counts; target_term: S_yy counts
};

constexpr int kMmdTile = 64;  // points; the pairs of two tiles fill half of the nearest cache

// A tile of points, or a stretch of its coordinates: [count][64], coordinate by coordinate, so that the lanes of a
// vector are points; `first` and `count` are coordinates. With fewer than 64 points the rest of the tile is 0, and so
// are its weights.
template <class S>
void mmd_pack(const S* rows, int64_t points, int64_t dimension, int64_t tile, int64_t first, int64_t count, S* packed);
template <class S>
void mmd_unpack(const double* packed, int64_t points, int64_t dimension, int64_t tile, int64_t first, int64_t count,
                S* rows);

// The pairs of two tiles: numbers of points, rounded up to multiples of 4 and of 16.
struct TilePairs {
  int rows, columns;
  bool same;  // a tile with itself: only pairs with i < j

  TilePairs(int64_t x_points, int64_t y_points, bool same)
      : rows(int((x_points + 3) / 4 * 4)), columns(int((y_points + 15) / 16 * 16)), same(same) {}
};
// Below, x and y are two tiles, or the same stretch of coordinates of both; p and q are weights of their points;
// squares and weights of pairs are [64][64]. s_ij of a stretch (a multiple of 256 coordinates, except the last),
// added to those of the preceding stretches if `more`.
template <class S>
void mmd_squares(const MmdKernel& kernel, const TilePairs& of, const S* x, const S* y, int64_t dimension, bool more,
                 S* squares);
// The sum of p_i q_j k(s_ij). With `slopes`, replaces s_ij by w_ij.
template <class S>
double mmd_values(const MmdKernel& kernel, const TilePairs& of, const S* p, const S* q, bool slopes, S* squares);
// Adds c sum_j w_ij (x_i - y_j), and its negative, to those gradients [dimension][64] that are not null.
template <class S>
void mmd_gradients(const MmdKernel& kernel, const TilePairs& of, const S* x, const S* y, int64_t dimension,
                   const S* weights, double coefficient, double* d_x, double* d_y);

// The same for points with themselves: <x_i, x_i>, or 0; sum p_i^2 k; and the gradients, which are 0 unless k is a
// function of products.
template <class S>
void mmd_own_squares(const MmdKernel& kernel, const S* x, int64_t dimension, S* squares);
template <class S>
double mmd_own_values(const MmdKernel& kernel, const S* p, S* squares);
template <class S>
void mmd_own_gradients(const MmdKernel& kernel, const S* x, int64_t dimension, const S* p, const S* slopes,
                       double coefficient, double* d_x);

// A row of a block of products: products [rows, columns] <x_i, y_j> of x [rows, dimension] and y [columns, dimension],
// with squared norms (null if k is a function of products). Squared distances follow from them. One below `closest`
// times the sum of the norms is computed again from differences. Products become w_ij; those of close pairs become 0,
// and their w_ij go to `close`, which is 0 elsewhere. Returns the sum of the row.
struct ProductBlock {
  int64_t rows, columns, dimension;
  void* products;
  const void *x, *y, *x_norms, *y_norms, *x_weights, *y_weights;
  MmdKernel kernel;
  double closest;
  bool same;  // x is y: pairs with i < j alone
};
template <class S>
struct ProductRow {
  S* products;
  S* close;        // null: gradients are not wanted, and no w_ij are written
  const S *x, *y;  // the point, and all points of y
  S x_norm, x_weight;
  const S *y_norms, *y_weights;
  int64_t count, dimension;
  int64_t first;  // pairs before it do not count
  S closest;
  bool any_close = false;  // out

  ProductRow(const ProductBlock& op, int64_t i, S* close)
      : products(static_cast<S*>(op.products) + i * op.columns),
        close(close),
        x(static_cast<const S*>(op.x) + i * op.dimension),
        y(static_cast<const S*>(op.y)),
        x_norm(op.x_norms ? static_cast<const S*>(op.x_norms)[i] : S(0)),
        x_weight(static_cast<const S*>(op.x_weights)[i]),
        y_norms(static_cast<const S*>(op.y_norms)),
        y_weights(static_cast<const S*>(op.y_weights)),
        count(op.columns),
        dimension(op.dimension),
        first(op.same ? (i + 1 < count ? i + 1 : count) : 0),
        closest(S(op.closest)) {}
};
template <class S>
double mmd_product_row(const MmdKernel& kernel, ProductRow<S>& row);

// d_x += w (x - y), d_y -= w (x - y)
template <class S>
void mmd_close_pair(const S* x, const S* y, S weight, int64_t count, S* d_x, S* d_y);

}  // namespace lgd
