#include "../csrc/energy_mmd/energy_mmd.h"

#include <optional>

#include "arguments.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

constexpr int64_t kMostSlabs = 16, kMostDoubles = int64_t(1) << 23;  // of gradients in parts: 64 MiB

struct Mmd {
  int64_t batch, n, k, dimension;
  const void *x, *y, *x_weights, *y_weights;  // [batch, n, dimension], [batch, k, dimension], [batch, n], [batch, k]
  std::vector<double> parameters;
  int kind;
  double lam, factor;
  bool unbiased, target_term;
};

int64_t tiles_of(int64_t count) { return (count + kMmdTile - 1) / kMmdTile; }

// A set of points in tiles, and, where wanted, gradients to them in as many parts as there are slabs.
template <class S>
struct Set {
  int64_t count, dimension, tiles;
  std::vector<S> packed, weights;
  std::vector<double> parts;
  double sum = 0, squares = 0;  // of the weights

  int64_t padded() const { return tiles * kMmdTile * dimension; }
  Points<S> points() const { return {packed.data(), weights.data(), count, dimension}; }
  double* part(int64_t slab, int64_t tile) {
    return parts.empty() ? nullptr : parts.data() + slab * padded() + tile * kMmdTile * dimension;
  }
  double pairs(bool unbiased) const { return sum * sum - (unbiased ? squares : 0); }

  void fill(const void* rows, const void* given, int64_t item, int threads) {
    packed.resize(padded());
    weights.assign(tiles * kMmdTile, S(0));
    const S* from = static_cast<const S*>(rows) + item * count * dimension;
    const S* own = given ? static_cast<const S*>(given) + item * count : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; ++tile)
      mmd_pack(from, count, dimension, tile, packed.data() + tile * kMmdTile * dimension);
    sum = squares = 0;
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = own ? own[i] : S(1);
      sum += double(weights[i]);
      squares += double(weights[i]) * double(weights[i]);
    }
  }
  // The parts are added up in order.
  void finish(void* gradient, int64_t item, int64_t slabs, int threads) {
    if (!gradient) return;
    S* to = static_cast<S*>(gradient) + item * count * dimension;
    const int64_t length = kMmdTile * dimension;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      double* total = part(0, tile);
      for (int64_t slab = 1; slab < slabs; ++slab)
        for (int64_t i = 0; i < length; ++i) total[i] += part(slab, tile)[i];
      mmd_unpack(total, count, dimension, tile, to);
    }
  }
};

// Tiles of rows are dealt to slabs in turn; a slab has sums and gradients of its own, and how many there are depends on
// the sizes alone, so that results do not depend on the threads.
template <class S>
double run_item(const Mmd& op, int64_t item, void* d_x, void* d_y, int threads) {
  Set<S> x{op.n, op.dimension, tiles_of(op.n), {}, {}, {}}, y{op.k, op.dimension, tiles_of(op.k), {}, {}, {}};
  x.fill(op.x, op.x_weights, item, threads);
  y.fill(op.y, op.y_weights, item, threads);
  int64_t slabs = std::min(kMostSlabs, std::max(x.tiles, y.tiles));
  while (slabs > 2 && slabs * (x.padded() + y.padded()) > kMostDoubles) slabs /= 2;
  if (d_x) x.parts.assign(slabs * x.padded(), 0.0);
  if (d_y) y.parts.assign(slabs * y.padded(), 0.0);
  const MmdKernel kernel{Kernels(op.kind), op.parameters.data(), int(op.parameters.size())};
  const double meets = op.factor / (x.sum * y.sum);
  const double within[] = {op.lam == 0 ? 0 : -op.factor * op.lam / x.pairs(op.unbiased),
                           op.lam == 0 || !op.target_term ? 0 : -op.factor * op.lam / y.pairs(op.unbiased)};
  Set<S>* sets[] = {&x, &y};
  std::vector<double> sums(slabs, 0.0);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t slab = 0; slab < slabs; ++slab) {
    alignas(64) S squares[kMmdTile * kMmdTile];
    double total = 0;
    for (int64_t i = slab; i < x.tiles; i += slabs) {
      double sum = 0;
      for (int64_t j = 0; j < y.tiles; ++j)
        sum += mmd_tile(kernel, x.points(), i, y.points(), j, false, meets, x.part(slab, i), y.part(slab, j), squares);
      total += meets * sum;
    }
    for (int of = 0; of < 2; ++of) {
      if (within[of] == 0) continue;
      Set<S>& set = *sets[of];
      double sum = 0;
      for (int64_t i = slab; i < set.tiles; i += slabs) {
        for (int64_t j = i; j < set.tiles; ++j)
          sum += mmd_tile(kernel, set.points(), i, set.points(), j, i == j, within[of], set.part(slab, i),
                          set.part(slab, j), squares);
        if (!op.unbiased) sum += mmd_itself(kernel, set.points(), i, within[of] / 2, set.part(slab, i)) / 2;
      }
      total += within[of] * sum;
    }
    sums[slab] = total;
  }
  x.finish(d_x, item, slabs, threads);
  y.finish(d_y, item, slabs, threads);
  double loss = 0;
  for (const double sum : sums) loss += sum;
  return loss;
}

// Many small problems: a thread for each; a large one: threads within.
template <class S>
void run(const Mmd& op, double* loss, void* d_x, void* d_y, int threads) {
  const bool many = op.batch >= threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (many && threads > 1)
  for (int64_t item = 0; item < op.batch; ++item) loss[item] = run_item<S>(op, item, d_x, d_y, many ? 1 : threads);
}

struct Block {
  int64_t rows, count, dimension;
  void *products, *x, *y, *x_norms, *y_norms, *x_weights, *y_weights, *d_x, *d_y;
  double closest;
  bool same;
};

// Products become weights; returns the sum. Close pairs add to the gradients themselves, one coordinate range for each
// task, so that the order of additions is that of the pairs.
template <class S>
double run_block(const Block& op, const MmdKernel& kernel, int threads) {
  struct Pair {
    int64_t i, j;
    S weight;
  };
  const auto as = [](void* data, int64_t offset) { return data ? static_cast<S*>(data) + offset : nullptr; };
  std::vector<double> sums(op.rows);
  std::vector<std::vector<Pair>> pairs(op.rows);
  const bool gradients = op.d_x;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < op.rows; ++i) {
    static thread_local std::vector<S> close;
    if (gradients) close.assign(op.count, S(0));
    ProductRow<S> row{as(op.products, i * op.count),
                      gradients ? close.data() : nullptr,
                      as(op.x, i * op.dimension),
                      as(op.y, 0),
                      op.x_norms ? *as(op.x_norms, i) : S(0),
                      *as(op.x_weights, i),
                      as(op.y_norms, 0),
                      as(op.y_weights, 0),
                      op.count,
                      op.dimension,
                      op.same ? std::min(i + 1, op.count) : 0,
                      S(op.closest),
                      false};
    sums[i] = mmd_product_row(kernel, row);
    if (gradients && row.any_close)
      for (int64_t j = row.first; j < op.count; ++j)
        if (close[j] != 0) pairs[i].push_back({i, j, close[j]});
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  if (std::all_of(pairs.begin(), pairs.end(), [](const auto& of_row) { return of_row.empty(); })) return total;
  constexpr int64_t kCoordinates = 256;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < op.dimension; first += kCoordinates) {
    const int64_t count = std::min(kCoordinates, op.dimension - first);
    for (const auto& of_row : pairs)
      for (const Pair& pair : of_row) {
        const int64_t i = pair.i * op.dimension + first, j = pair.j * op.dimension + first;
        mmd_close_pair(as(op.x, i), as(op.y, j), pair.weight, count, as(op.d_x, i), as(op.d_y, j));
      }
  }
  return total;
}

}  // namespace

void bind_energy_mmd(py::module_& module) {
  // x, y, weights and gradients are contiguous, of one dtype: float32 or float64
  module.def("energy_mmd", [](Tensor loss, Tensor d_x, Tensor d_y, Tensor x, Tensor y, Tensor x_weights,
                              Tensor y_weights, int kind, const std::vector<double>& parameters, double lam,
                              double factor, bool unbiased, bool target_term, int threads) {
    const Mmd op{size(x, 0),         size(x, 1), size(y, 1), size(x, 2), address(x), address(y), address(x_weights),
                 address(y_weights), parameters, kind,       lam,        factor,     unbiased,   target_term};
    auto* losses = static_cast<double*>(address(loss));
    void *to_x = address(d_x), *to_y = address(d_y);
    const bool is_wide = dtype(x) == DType::f64;
    py::gil_scoped_release release;
    is_wide ? run<double>(op, losses, to_x, to_y, threads) : run<float>(op, losses, to_x, to_y, threads);
  });
  // products [rows, count] of x [rows, dimension] and y [count, dimension], contiguous as all the rest
  module.def("energy_mmd_block", [](Tensor products, Tensor x, Tensor y, Tensor x_norms, Tensor y_norms,
                                    Tensor x_weights, Tensor y_weights, Tensor d_x, Tensor d_y, int kind,
                                    const std::vector<double>& parameters, double closest, bool same, int threads) {
    const Block op{size(products, 0),
                   size(products, 1),
                   size(x, 1),
                   address(products),
                   address(x),
                   address(y),
                   address(x_norms),
                   address(y_norms),
                   address(x_weights),
                   address(y_weights),
                   address(d_x),
                   address(d_y),
                   closest,
                   same};
    const MmdKernel kernel{Kernels(kind), parameters.data(), int(parameters.size())};
    const bool is_wide = dtype(products) == DType::f64;
    py::gil_scoped_release release;
    return is_wide ? run_block<double>(op, kernel, threads) : run_block<float>(op, kernel, threads);
  });
}

}  // namespace lgd
