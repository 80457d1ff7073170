#include "../common/vectors.h"
#include "energy_mmd.h"

namespace lgd {
namespace {

constexpr int kTile = kMmdTile;
constexpr int64_t kSpan = 256;  // coordinates whose squares are added up before they join the rest

// Computes s_ij of the first `rows` x `columns` pairs: four points of x with two vectors of points of y, in registers.
template <class S, bool kProduct>
LGD_CLONES void pair_sums(const S* x, const S* y, int64_t dimension, int rows, int columns, bool more, S* squares) {
  constexpr int kLanes = Vector<S>::kLanes;
  typedef typename Vector<S>::type V;
  for (int64_t first = 0; first < dimension; first += kSpan) {
    const int64_t last = first + kSpan < dimension ? first + kSpan : dimension;
    for (int i = 0; i < rows; i += 4)
      for (int j = 0; j < columns; j += 2 * kLanes) {
        V sums[4][2] = {};
        for (int64_t c = first; c < last; ++c) {
          const V near = load(y + c * kTile + j), far = load(y + c * kTile + j + kLanes);
          const S* at = x + c * kTile + i;
          for (int r = 0; r < 4; ++r) {
            const V d0 = kProduct ? near : at[r] - near, d1 = kProduct ? far : at[r] - far;
            sums[r][0] += (kProduct ? at[r] + V{} : d0) * d0;
            sums[r][1] += (kProduct ? at[r] + V{} : d1) * d1;
          }
        }
        for (int r = 0; r < 4; ++r)
          for (int half = 0; half < 2; ++half) {
            S* to = squares + (i + r) * kTile + j + half * kLanes;
            store(to, first || more ? load(to) + sums[r][half] : sums[r][half]);
          }
      }
  }
}

// Returns sum_ij p_i q_j k(s_ij). With kSlopes, s_ij become w_ij. `same`: pairs with i < j alone.
template <bool kSlopes, class S, class F>
LGD_CLONES double pair_values(const F& kernel, const S* p, const S* q, int rows, int columns, bool same, S two,
                              S* squares) {
  constexpr int kLanes = 16;
  alignas(64) S value[kTile], slope[kTile], later[kTile];
  double total = 0;
  for (int i = 0; i < rows; ++i) {
    if constexpr (kSlopes && std::is_same<F, Distance<float>>::value) {
      if (!same) i = fast_distances({squares, kTile, p, q, rows, columns}, i, total);
      if (i == rows) break;
    }
    S* row = squares + i * kTile;
    const S* weights = q;
    if (same) {
      for (int j = 0; j < kTile; ++j) later[j] = j > i ? q[j] : S(0);
      weights = later;
    }
    kernel(row, value, kSlopes ? slope : nullptr, columns);
    S sums[kLanes] = {};
    const S turn = two * p[i];
    for (int j = 0; j < columns; j += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[lane] += weights[j + lane] * value[j + lane];
        if (kSlopes) row[j + lane] = turn * weights[j + lane] * slope[j + lane];
      }
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    total += double(p[i]) * double(sums[0]);
  }
  return total;
}

// Adds the gradient of a tile to the points of its lanes: sum_i w_ij (y_j - x_i), or sum_i w_ij x_i of products. A few
// coordinates of some vectors of points stay in registers, as in a matrix product, while the loop visits all points of
// x.
template <bool kProduct, int kCoordinates, int kVectors, class S>
LGD_INLINE void pull(const S* x, const S* y, int rows, const S* weights, double coefficient, double* d_y) {
  constexpr int kLanes = Vector<S>::kLanes;
  typedef typename Vector<S>::type V;
  typedef typename Vector<S>::wide_unaligned Wide;
  for (int j = 0; j < kTile; j += kVectors * kLanes) {
    V at[kCoordinates][kVectors], sums[kCoordinates][kVectors] = {};
    for (int c = 0; c < kCoordinates; ++c)
      for (int v = 0; v < kVectors; ++v) at[c][v] = load(y + c * kTile + j + v * kLanes);
    const S *at_x = x, *row = weights + j;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i, ++at_x, row += kTile)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const V weight = load(row + v * kLanes);
#pragma GCC unroll 4
        for (int c = 0; c < kCoordinates; ++c)
          sums[c][v] += weight * (kProduct ? at_x[c * kTile] + V{} : at[c][v] - at_x[c * kTile]);
      }
    for (int c = 0; c < kCoordinates; ++c)
      for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<Wide*>(d_y + c * kTile + j + v * kLanes) +=
            coefficient * __builtin_convertvector(sums[c][v], typename Vector<S>::wide);
  }
}

template <bool kProduct, class S>
LGD_CLONES void pair_gradients(const S* x, const S* y, int64_t dimension, int rows, const S* weights,
                               double coefficient, double* d_y) {
  int64_t c = 0;
  for (; c + 4 <= dimension; c += 4)
    pull<kProduct, 4, 2>(x + c * kTile, y + c * kTile, rows, weights, coefficient, d_y + c * kTile);
  if (dimension - c >= 2) {
    pull<kProduct, 2, 4>(x + c * kTile, y + c * kTile, rows, weights, coefficient, d_y + c * kTile);
    c += 2;
  }
  if (c < dimension) pull<kProduct, 1, 8>(x + c * kTile, y + c * kTile, rows, weights, coefficient, d_y + c * kTile);
}

// Interleaves the elements of the first halves of two vectors, or of the second halves.
template <bool kSecond, class V>
LGD_INLINE void interleave(const V& a, const V& b, V& to) {
  if constexpr (sizeof(a[0]) == 4)
    to = kSecond ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                 : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else
    to = kSecond ? __builtin_shufflevector(a, b, 2, 6, 3, 7) : __builtin_shufflevector(a, b, 0, 4, 1, 5);
}

// Transposes a tile in squares of as many rows as a vector has lanes, in log2 of that many steps; in each, rows half of
// that many apart are interleaved.
template <class S>
LGD_CLONES void transpose(const S* from, S* to) {
  constexpr int kLanes = Vector<S>::kLanes;
  typedef typename Vector<S>::type V;
  for (int i = 0; i < kTile; i += kLanes)
    for (int j = 0; j < kTile; j += kLanes) {
      V rows[kLanes], next[kLanes];
      for (int r = 0; r < kLanes; ++r) rows[r] = load(from + (i + r) * kTile + j);
#pragma GCC unroll 3
      for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 4
        for (int r = 0; r < kLanes / 2; ++r) {
          interleave<false>(rows[r], rows[r + kLanes / 2], next[2 * r]);
          interleave<true>(rows[r], rows[r + kLanes / 2], next[2 * r + 1]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kLanes; ++r) rows[r] = next[r];
      }
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * kTile + i, rows[r]);
    }
}

// Adds the gradients to both sides. `weights` are used as they are for the points of y, and transposed for those of x.
template <bool kProduct, class S>
void gradients(const S* x, const S* y, int64_t dimension, int rows, int columns, const S* weights, double coefficient,
               double* d_x, double* d_y) {
  alignas(64) S turned[kTile * kTile];
  if (d_y) pair_gradients<kProduct>(x, y, dimension, rows, weights, coefficient, d_y);
  if (!d_x) return;
  transpose(weights, turned);
  pair_gradients<kProduct>(y, x, dimension, columns, turned, coefficient, d_x);
}

template <class S, bool kProduct>
LGD_CLONES S pair_of_rows(const S* x, const S* y, int64_t count) {
  constexpr int kSums = 32;
  S sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) {
      const S d = kProduct ? x[i + lane] : x[i + lane] - y[i + lane];
      sums[lane] += d * (kProduct ? y[i + lane] : d);
    }
  for (int lane = 0; i < count; ++i, ++lane) {
    const S d = kProduct ? x[i] : x[i] - y[i];
    sums[lane] += d * (kProduct ? y[i] : d);
  }
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

template <class S>
LGD_CLONES void add_pair(const S* x, const S* y, S weight, int64_t count, S* d_x, S* d_y) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const S turn = weight * (x[i] - y[i]);
    d_x[i] += turn;
    d_y[i] -= turn;
  }
}

// s_j = max(0, ||x||^2 + ||y_j||^2 - 2 <x, y_j>). Returns whether one is below `closest` of the norms.
template <class S>
LGD_CLONES bool squares_of(S* products, const S* y_norms, S x_norm, S closest, int64_t count) {
  int64_t close = 0;
#pragma omp simd reduction(+ : close)
  for (int64_t j = 0; j < count; ++j) {
    const S norms = x_norm + y_norms[j], square = norms - 2 * products[j];
    products[j] = square < 0 ? S(0) : square;
    close += square < closest * norms;
  }
  return close != 0;
}

// Returns sum_j q_j k(s_j) of a stretch of at most a tile. With kSlopes, s_j become w_j.
template <bool kSlopes, class S, class F>
LGD_CLONES S stretch(const F& kernel, S* squares, const S* weights, S turn, int count) {
  alignas(64) S value[kTile], slope[kTile];
  kernel(squares, value, kSlopes ? slope : nullptr, count);
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int j = 0; j < count; ++j) sum += weights[j] * value[j];
  if (kSlopes)
#pragma omp simd
    for (int j = 0; j < count; ++j) squares[j] = turn * weights[j] * slope[j];
  return sum;
}

}  // namespace

template <class S>
void mmd_pack(const S* rows, int64_t points, int64_t dimension, int64_t tile, int64_t first, int64_t count, S* packed) {
  const int64_t here = points - tile * kTile < kTile ? points - tile * kTile : kTile;
  rows += tile * kTile * dimension + first;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < kTile; ++i) packed[c * kTile + i] = i < here ? rows[i * dimension + c] : S(0);
}

template <class S>
void mmd_unpack(const double* packed, int64_t points, int64_t dimension, int64_t tile, int64_t first, int64_t count,
                S* rows) {
  const int64_t here = points - tile * kTile < kTile ? points - tile * kTile : kTile;
  rows += tile * kTile * dimension + first;
  for (int64_t i = 0; i < here; ++i)
    for (int64_t c = 0; c < count; ++c) rows[i * dimension + c] = S(packed[c * kTile + i]);
}

template <class S>
void mmd_squares(const MmdKernel& kernel, const TilePairs& of, const S* x, const S* y, int64_t dimension, bool more,
                 S* squares) {
  if (kernel.of_product())
    pair_sums<S, true>(x, y, dimension, of.rows, of.columns, more, squares);
  else
    pair_sums<S, false>(x, y, dimension, of.rows, of.columns, more, squares);
}

template <class S>
double mmd_values(const MmdKernel& kernel, const TilePairs& of, const S* p, const S* q, bool slopes, S* squares) {
  const double sum = with_kernel<S>(kernel, [&](const auto& functor) {
    const S two = kernel.of_product() ? 1 : 2;
    return slopes ? pair_values<true>(functor, p, q, of.rows, of.columns, of.same, two, squares)
                  : pair_values<false>(functor, p, q, of.rows, of.columns, of.same, two, squares);
  });
  for (int i = 0; i < kTile && slopes; ++i)
    for (int j = i < of.rows ? of.columns : 0; j < kTile; ++j) squares[i * kTile + j] = 0;
  return sum;
}

template <class S>
void mmd_gradients(const MmdKernel& kernel, const TilePairs& of, const S* x, const S* y, int64_t dimension,
                   const S* weights, double coefficient, double* d_x, double* d_y) {
  if (kernel.of_product())
    gradients<true>(x, y, dimension, of.rows, of.columns, weights, coefficient, d_x, d_y);
  else
    gradients<false>(x, y, dimension, of.rows, of.columns, weights, coefficient, d_x, d_y);
}

template <class S>
void mmd_own_squares(const MmdKernel& kernel, const S* x, int64_t dimension, S* squares) {
  if (kernel.of_product())
    for (int64_t c = 0; c < dimension; ++c)
      for (int i = 0; i < kTile; ++i) squares[i] += x[c * kTile + i] * x[c * kTile + i];
}

template <class S>
double mmd_own_values(const MmdKernel& kernel, const S* p, S* squares) {
  alignas(64) S value[kTile], slope[kTile];
  with_kernel<S>(kernel, [&](const auto& functor) { functor(squares, value, slope, kTile); });
  double sum = 0;
  for (int i = 0; i < kTile; ++i) {
    sum += double(p[i]) * double(p[i]) * double(value[i]);
    squares[i] = slope[i];
  }
  return sum;
}

template <class S>
void mmd_own_gradients(const MmdKernel& kernel, const S* x, int64_t dimension, const S* p, const S* slopes,
                       double coefficient, double* d_x) {
  if (!kernel.of_product() || !d_x) return;
  for (int64_t c = 0; c < dimension; ++c)
    for (int i = 0; i < kTile; ++i)
      d_x[c * kTile + i] +=
          coefficient * 2 * double(p[i]) * double(p[i]) * double(slopes[i]) * double(x[c * kTile + i]);
}

template <class S>
double mmd_product_row(const MmdKernel& kernel, ProductRow<S>& row) {
  const bool product = kernel.of_product();
  row.any_close = !product && squares_of(row.products, row.y_norms, row.x_norm, row.closest, row.count);
  if (row.any_close)
    for (int64_t j = row.first; j < row.count; ++j)
      if (row.products[j] < row.closest * (row.x_norm + row.y_norms[j]))
        row.products[j] = pair_of_rows<S, false>(row.x, row.y + j * row.dimension, row.dimension);
  for (int64_t j = 0; j < row.first; ++j) row.products[j] = 0;
  const S turn = (product ? 1 : 2) * row.x_weight;
  double sum = 0;
  for (int64_t at = row.first; at < row.count; at += kTile) {
    const int count = int(row.count - at < kTile ? row.count - at : kTile);
    alignas(64) S before[kTile];
    const bool splits = row.any_close && row.close;
    if (splits)
      for (int j = 0; j < count; ++j) before[j] = row.products[at + j];
    sum += double(with_kernel<S>(kernel, [&](const auto& functor) {
      S* squares = row.products + at;
      const S* weights = row.y_weights + at;
      return row.close ? stretch<true>(functor, squares, weights, turn, count)
                       : stretch<false>(functor, squares, weights, turn, count);
    }));
    if (splits)
      for (int j = 0; j < count; ++j) {
        const bool close = before[j] < 2 * row.closest * (row.x_norm + row.y_norms[at + j]);
        row.close[at + j] = close ? row.products[at + j] : S(0);
        row.products[at + j] = close ? S(0) : row.products[at + j];
      }
  }
  return sum * double(row.x_weight);
}

template <class S>
void mmd_close_pair(const S* x, const S* y, S weight, int64_t count, S* d_x, S* d_y) {
  add_pair(x, y, weight, count, d_x, d_y);
}

#define LGD_INSTANTIATE(S)                                                                                       \
  template void mmd_pack(const S*, int64_t, int64_t, int64_t, int64_t, int64_t, S*);                             \
  template void mmd_unpack(const double*, int64_t, int64_t, int64_t, int64_t, int64_t, S*);                      \
  template void mmd_squares(const MmdKernel&, const TilePairs&, const S*, const S*, int64_t, bool, S*);          \
  template double mmd_values(const MmdKernel&, const TilePairs&, const S*, const S*, bool, S*);                  \
  template void mmd_gradients(const MmdKernel&, const TilePairs&, const S*, const S*, int64_t, const S*, double, \
                              double*, double*);                                                                 \
  template void mmd_own_squares(const MmdKernel&, const S*, int64_t, S*);                                        \
  template double mmd_own_values(const MmdKernel&, const S*, S*);                                                \
  template void mmd_own_gradients(const MmdKernel&, const S*, int64_t, const S*, const S*, double, double*);     \
  template double mmd_product_row(const MmdKernel&, ProductRow<S>&);                                             \
  template void mmd_close_pair(const S*, const S*, S, int64_t, S*, S*);
LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)
#undef LGD_INSTANTIATE

}  // namespace lgd
