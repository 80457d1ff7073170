#include "../csrc/energy_mmd/energy_mmd.h"

#include <atomic>
#include <optional>
#include <thread>

#include "aligned.h"
#include "arguments.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

constexpr int64_t kSmall = 1 << 24;  // pairs times what one costs: below, about 1 ms, waking others is no gain
constexpr int64_t kTasks = 32, kMostTiles = 4;  // blocks wanted on a side, and the longest; as many bytes in one:
constexpr int64_t kBlockBytes = 1 << 18;        // points and their gradients stay near a core while others pass by

struct Mmd {
  int64_t batch, n, k, dimension;
  const void *x, *y, *x_weights, *y_weights;  // [batch, n, dimension], [batch, k, dimension], [batch, n], [batch, k]
  std::vector<double> parameters;
  int kind;
  double lam, factor;
  bool unbiased, target_term;
};

int64_t tiles_of(int64_t count) { return (count + kMmdTile - 1) / kMmdTile; }

// A set of points in tiles, and, where wanted, their gradients, in one or several parts.
template <class S>
struct Set {
  int64_t count, dimension, tiles;
  Aligned<S> packed, weights;
  Aligned<double> gradients;
  std::vector<std::atomic<int64_t>> done;  // [part, block]: rounds that a block has been in
  double sum = 0, squares = 0;             // of the weights

  int64_t padded() const { return tiles * kMmdTile * dimension; }
  int64_t blocks(int64_t width) const { return (tiles + width - 1) / width; }
  Points<S> points() const { return {packed.data(), weights.data(), count, dimension}; }
  double* gradient(int64_t part, int64_t tile) {
    return gradients.empty() ? nullptr : gradients.data() + part * padded() + tile * kMmdTile * dimension;
  }
  double pairs(bool unbiased) const { return sum * sum - (unbiased ? squares : 0); }

  void fill(const void* rows, const void* given, int64_t item, int threads) {
    packed.resize(padded());
    weights.assign(tiles * kMmdTile, S(0));
    const S* from = static_cast<const S*>(rows) + item * count * dimension;
    const S* own = given ? static_cast<const S*>(given) + item * count : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && padded() > kSerial)
    for (int64_t tile = 0; tile < tiles; ++tile)
      mmd_pack(from, count, dimension, tile, packed.data() + tile * kMmdTile * dimension);
    sum = squares = 0;
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = own ? own[i] : S(1);
      sum += double(weights[i]);
      squares += double(weights[i]) * double(weights[i]);
    }
  }
  void begin(int64_t parts, int64_t width, bool wanted) {
    done = std::vector<std::atomic<int64_t>>(parts * blocks(width));
    if (wanted) gradients.assign(parts * padded(), 0.0);
  }
  // The parts are added up in order.
  void finish(void* to, int64_t item, int threads) {
    if (!to) return;
    S* rows = static_cast<S*>(to) + item * count * dimension;
    const int64_t length = kMmdTile * dimension, parts = int64_t(gradients.size()) / padded();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && padded() > kSerial)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      double* total = gradient(0, tile);
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < length; ++i) total[i] += gradient(part, tile)[i];
      mmd_unpack(total, count, dimension, tile, rows);
    }
  }
};

// The pairs of two sets, or within one (then those with i < j, and, where `itself`, half of those with i = j), a block
// of tiles with another at a time, in rounds: no two of a round have a block in common, and a block is done with a
// round before it is in the next. So each gradient has one writer at a time, and what is added to it comes in the order
// of the rounds, whatever the threads; and a thread that wakes up late leaves its part to the others. A set y of few
// blocks has a part of its gradient for each stretch of x.
template <class S>
struct Pairs {
  const MmdKernel& kernel;
  Set<S>&x, &y;
  double coefficient;
  bool itself;
  int64_t width, stretches, before;  // rounds that the sets have been in
  int64_t rows = x.blocks(width), columns = y.blocks(width), length = (rows + stretches - 1) / stretches;
  int64_t rounds = std::max(length, columns);
  std::vector<double> sums = std::vector<double>(rows);
  std::atomic<int64_t> next{0};

  // By every thread.
  void work() {
    if (coefficient == 0) return;
    const int64_t tasks = stretches * rounds;
    for (int64_t task; (task = next++) < rounds * tasks;) {
      const int64_t round = task / tasks, stretch = task % tasks / rounds, own = task % rounds;
      const int64_t i = stretch * length + own, j = (same() ? round + rounds - own : round + own) % rounds;
      if (same() && j < i) continue;  // the same pair comes as (j, i)
      std::atomic<int64_t>* row = own < length && i < rows ? &x.done[i] : nullptr;
      std::atomic<int64_t>* column = j < columns ? &y.done[stretch * columns + j] : nullptr;
      // tasks are begun in order, so that what is waited for is under way
      for (const auto* of : {row, column})
        while (of && of->load(std::memory_order_acquire) < before + round) std::this_thread::yield();
      if (row && column) sums[i] += block(i, j, stretch);
      for (auto* of : {row, column})
        if (of) of->store(before + round + 1, std::memory_order_release);
    }
  }
  double total() const {
    double total = 0;
    for (const double sum : sums) total += sum;
    return coefficient * total;
  }

 private:
  bool same() const { return &x == &y; }

  double block(int64_t row, int64_t column, int64_t part) {
    alignas(64) S squares[kMmdTile * kMmdTile];
    double sum = 0;
    for (int64_t i = row * width; i < std::min(x.tiles, (row + 1) * width); ++i)
      for (int64_t j = column * width; j < std::min(y.tiles, (column + 1) * width); ++j) {
        if (same() && j < i) continue;
        double *d_x = x.gradient(0, i), *d_y = y.gradient(part, j);
        sum += mmd_tile(kernel, x.points(), i, y.points(), j, same() && i == j, coefficient, d_x, d_y, squares);
        if (itself && i == j) sum += mmd_itself(kernel, x.points(), i, coefficient / 2, d_x) / 2;
      }
    return sum;
  }
};

template <class S>
double run_item(const Mmd& op, int64_t item, void* d_x, void* d_y, int threads) {
  Set<S> x{op.n, op.dimension, tiles_of(op.n), {}, {}, {}, {}}, y{op.k, op.dimension, tiles_of(op.k), {}, {}, {}, {}};
  x.fill(op.x, op.x_weights, item, threads);
  y.fill(op.y, op.y_weights, item, threads);
  Set<S>&longer = x.count < y.count ? y : x, &shorter = x.count < y.count ? x : y;
  const int64_t bytes = kMmdTile * op.dimension * int64_t(sizeof(S) + sizeof(double));
  const int64_t width = std::clamp(std::min(longer.tiles / kTasks, kBlockBytes / bytes), int64_t(1), kMostTiles);
  const int64_t stretches = std::clamp(std::min(longer.tiles, kTasks) / shorter.tiles, int64_t(1), kTasks);
  longer.begin(1, width, &longer == &x ? d_x : d_y);
  shorter.begin(stretches, width, &shorter == &x ? d_x : d_y);
  const MmdKernel kernel{Kernels(op.kind), op.parameters.data(), int(op.parameters.size())};
  Pairs<S> meets{kernel, longer, shorter, op.factor / (x.sum * y.sum), false, width, stretches, 0};
  const auto within = [&](Set<S>& set, bool counts) -> Pairs<S> {
    const double coefficient = counts && op.lam != 0 ? -op.factor * op.lam / set.pairs(op.unbiased) : 0;
    return {kernel, set, set, coefficient, !op.unbiased, width, 1, meets.rounds};
  };
  Pairs<S> of_x = within(x, true), of_y = within(y, op.target_term), *terms[] = {&meets, &of_x, &of_y};
  const bool small = (op.n + op.k) * (op.n + op.k) * (op.dimension + 8) < kSmall;
#pragma omp parallel num_threads(threads) if (threads > 1 && !small)
  for (Pairs<S>* term : terms) term->work();
  const double loss = meets.total() + of_x.total() + of_y.total();
  x.finish(d_x, item, threads);
  y.finish(d_y, item, threads);
  return loss;
}

// Many small problems: a thread for each; a large one: threads within.
template <class S>
void run(const Mmd& op, double* loss, void* d_x, void* d_y, int threads) {
  const bool many = op.batch >= threads;
  for_tasks(op.batch, many ? threads : 1,
            [&](int64_t item) { loss[item] = run_item<S>(op, item, d_x, d_y, many ? 1 : threads); });
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
  const auto one_row = [&](int64_t i) {
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
  };
  for_tasks(op.rows, threads, one_row, 16);
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
