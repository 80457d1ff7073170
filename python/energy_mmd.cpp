#include "../csrc/energy_mmd/energy_mmd.h"

#include <atomic>
#include <optional>
#include <thread>
#include <utility>

#include "aligned.h"
#include "arguments.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

constexpr int64_t kSmall = 1 << 24;  // pairs times what one costs: below, about 1 ms, waking others is no gain
constexpr int64_t kTasks = 32, kMostTiles = 4;  // blocks wanted on a side, and the longest; as many bytes in one:
constexpr int64_t kBlockBytes = 1 << 18;        // points and their gradients stay near a core while others pass by
constexpr int64_t kStretch = 1024;  // coordinates of a tile (4 million multiply-adds) between two checks for Ctrl-C
constexpr int64_t kLong = 16384;    // with more dimensions, few points are not packed at once

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
  const S* rows;
  Aligned<S> packed, weights;
  Aligned<double> gradients;
  std::vector<std::atomic<int64_t>> done;  // [part, block]: rounds that a block has been in
  double sum = 0, squares = 0;             // of the weights

  Set(const void* data, const void* given, int64_t item, int64_t count, int64_t dimension)
      : count(count),
        dimension(dimension),
        tiles(tiles_of(count)),
        rows(static_cast<const S*>(data) + item * count * dimension),
        weights(tiles * kMmdTile) {
    const S* own = given ? static_cast<const S*>(given) + item * count : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = own ? own[i] : S(1);
      sum += double(weights[i]);
      squares += double(weights[i]) * double(weights[i]);
    }
  }
  int64_t length() const { return kMmdTile * dimension; }
  int64_t blocks(int64_t width) const { return (tiles + width - 1) / width; }
  int64_t points(int64_t tile) const { return std::min<int64_t>(kMmdTile, count - tile * kMmdTile); }
  double* gradient(int64_t part, int64_t tile) {
    return gradients.empty() ? nullptr : gradients.data() + (part * tiles + tile) * length();
  }
  double pairs(bool unbiased) const { return sum * sum - (unbiased ? squares : 0); }

  void begin(int64_t parts, int64_t width, bool wanted, int threads) {
    done = std::vector<std::atomic<int64_t>>(parts * blocks(width));
    packed.resize(tiles * length());
    if (wanted) gradients.assign(parts * tiles * length(), 0.0);
    for_tasks(tiles, tiles * length() > kSerial ? threads : 1, [&](int64_t tile) {
      mmd_pack(rows, count, dimension, tile, 0, dimension, packed.data() + tile * length());
    });
  }
  // The parts are added up in order.
  void finish(void* to, int64_t item, int threads) {
    if (!to) return;
    S* out = static_cast<S*>(to) + item * count * dimension;
    const int64_t parts = int64_t(gradients.size()) / (tiles * length());
    for_tasks(tiles, tiles * length() > kSerial ? threads : 1, [&](int64_t tile) {
      double* total = gradient(0, tile);
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < length(); ++i) total[i] += gradient(part, tile)[i];
      mmd_unpack(total, count, dimension, tile, 0, dimension, out);
    });
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
  int64_t rounds = coefficient == 0 ? 0 : std::max(length, columns);  // a term with coefficient 0 takes none
  std::vector<double> sums = std::vector<double>(rows);
  std::atomic<int64_t> next{0};

  // By every thread.
  void work() {
    const int64_t tasks = stretches * rounds;
    Watch watch;
    for (int64_t task; (task = next++) < rounds * tasks;) {
      const int64_t round = task / tasks, stretch = task % tasks / rounds, own = task % rounds;
      const int64_t i = stretch * length + own, j = (same() ? round + rounds - own : round + own) % rounds;
      if (same() && j < i) continue;  // the same pair comes as (j, i)
      std::atomic<int64_t>* row = own < length && i < rows ? &x.done[i] : nullptr;
      std::atomic<int64_t>* column = j < columns ? &y.done[stretch * columns + j] : nullptr;
      // tasks are begun in order, so that what is waited for is under way
      for (const auto* of : {row, column})
        while (of && of->load(std::memory_order_acquire) < before + round) {
          if (watch.stops()) return;
          std::this_thread::yield();
        }
      if (row && column) sums[i] += block(i, j, stretch, watch);
      if (watch.stops()) return;
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

  double block(int64_t row, int64_t column, int64_t part, Watch& watch) {
    double sum = 0;
    for (int64_t i = row * width; i < std::min(x.tiles, (row + 1) * width); ++i)
      for (int64_t j = column * width; j < std::min(y.tiles, (column + 1) * width); ++j)
        if (!same() || i <= j) sum += tile(i, j, x.gradient(0, i), y.gradient(part, j), watch);
    return sum;
  }

  double tile(int64_t i, int64_t j, double* d_x, double* d_y, Watch& watch) {
    alignas(64) S squares[kMmdTile * kMmdTile];
    const TilePairs of(x.points(i), y.points(j), same() && i == j);
    const S *a = x.packed.data() + i * x.length(), *b = y.packed.data() + j * y.length();
    const S *p = x.weights.data() + i * kMmdTile, *q = y.weights.data() + j * kMmdTile;
    for (int64_t at = 0; at < x.dimension; at += kStretch) {
      const int64_t some = std::min(kStretch, x.dimension - at), to = at * kMmdTile;
      mmd_squares(kernel, of, a + to, b + to, some, at > 0, squares);
      if (watch.stops()) return 0;
    }
    double sum = mmd_values(kernel, of, p, q, d_x || d_y, squares);
    for (int64_t at = 0; at < x.dimension && (d_x || d_y); at += kStretch) {
      const int64_t some = std::min(kStretch, x.dimension - at), to = at * kMmdTile;
      mmd_gradients(kernel, of, a + to, b + to, some, squares, coefficient, d_x ? d_x + to : d_x, d_y ? d_y + to : d_y);
      if (watch.stops()) return 0;
    }
    if (itself && i == j) {
      alignas(64) S own[kMmdTile] = {};
      mmd_own_squares(kernel, a, x.dimension, own);
      sum += mmd_own_values(kernel, p, own) / 2;
      mmd_own_gradients(kernel, a, x.dimension, p, own, coefficient / 2, d_x);
    }
    return sum;
  }
};

// Sets of one tile each, of many dimensions. Only one stretch of coordinates is packed at a time, once for the squares
// and once for the gradients: whole tiles of two points would take 32 times the memory of the data.
template <class S>
struct Few {
  const MmdKernel& kernel;
  Set<S>* sets[2];
  S* to[2];  // where the gradients go, or null
  struct Term {
    int a, b;
    double coefficient;
    bool itself;
    Aligned<S> squares = Aligned<S>(kMmdTile * kMmdTile), own = Aligned<S>(kMmdTile);
  };
  Aligned<S> packed[2] = {Aligned<S>(kStretch * kMmdTile), Aligned<S>(kStretch * kMmdTile)};
  Aligned<double> gradients[2] = {};

  // work(first, count) for each stretch, with its coordinates in `packed`.
  template <class Work>
  void for_stretches(const Work& work) {
    Watch watch;
    const int64_t dimension = sets[0]->dimension;
    for (int64_t first = 0; first < dimension && !watch.stops(); first += kStretch) {
      const int64_t some = std::min(kStretch, dimension - first);
      for (int of = 0; of < 2; ++of)
        mmd_pack(sets[of]->rows, sets[of]->count, dimension, 0, first, some, packed[of].data());
      work(first, some);
    }
  }

  double run(std::vector<Term> terms) {
    const auto of = [&](const Term& term) {
      return TilePairs(sets[term.a]->count, sets[term.b]->count, term.a == term.b);
    };
    for_stretches([&](int64_t first, int64_t some) {
      for (Term& term : terms) {
        const S *a = packed[term.a].data(), *b = packed[term.b].data();
        mmd_squares(kernel, of(term), a, b, some, first > 0, term.squares.data());
        if (term.itself) mmd_own_squares(kernel, a, some, term.own.data());
      }
    });
    double loss = 0;
    for (Term& term : terms) {
      const S *p = sets[term.a]->weights.data(), *q = sets[term.b]->weights.data();
      double sum = mmd_values(kernel, of(term), p, q, to[0] || to[1], term.squares.data());
      if (term.itself) sum += mmd_own_values(kernel, p, term.own.data()) / 2;
      loss += term.coefficient * sum;
    }
    if (!to[0] && !to[1]) return loss;
    for_stretches([&](int64_t first, int64_t some) {
      double* turns[2] = {};
      for (int set = 0; set < 2; ++set)
        if (to[set]) {
          gradients[set].assign(some * kMmdTile, 0.0);
          turns[set] = gradients[set].data();
        }
      for (const Term& term : terms) {
        const S *a = packed[term.a].data(), *b = packed[term.b].data(), *p = sets[term.a]->weights.data();
        mmd_gradients(kernel, of(term), a, b, some, term.squares.data(), term.coefficient, turns[term.a],
                      turns[term.b]);
        if (term.itself) mmd_own_gradients(kernel, a, some, p, term.own.data(), term.coefficient / 2, turns[term.a]);
      }
      for (int set = 0; set < 2; ++set)
        if (to[set]) mmd_unpack(turns[set], sets[set]->count, sets[set]->dimension, 0, first, some, to[set]);
    });
    return loss;
  }
};

template <class S>
double run_item(const Mmd& op, int64_t item, void* d_x, void* d_y, int threads) {
  Set<S> x(op.x, op.x_weights, item, op.n, op.dimension), y(op.y, op.y_weights, item, op.k, op.dimension);
  const MmdKernel kernel{Kernels(op.kind), op.parameters.data(), int(op.parameters.size())};
  const double between = op.factor / (x.sum * y.sum);
  const auto within = [&](const Set<S>& set, bool counts) {
    return counts && op.lam != 0 ? -op.factor * op.lam / set.pairs(op.unbiased) : 0.0;
  };
  const double of_x = within(x, true), of_y = within(y, op.target_term);
  if (x.tiles == 1 && y.tiles == 1 && op.dimension > kLong) {
    const auto at = [&](void* to, int64_t count) {
      return to ? static_cast<S*>(to) + item * count * op.dimension : nullptr;
    };
    std::vector<typename Few<S>::Term> terms;
    const bool turned = x.count < y.count;
    terms.push_back({turned, !turned, between, false});
    if (of_x != 0) terms.push_back({0, 0, of_x, !op.unbiased});
    if (of_y != 0) terms.push_back({1, 1, of_y, !op.unbiased});
    return Few<S>{kernel, {&x, &y}, {at(d_x, op.n), at(d_y, op.k)}}.run(std::move(terms));
  }
  Set<S>&longer = x.count < y.count ? y : x, &shorter = x.count < y.count ? x : y;
  const int64_t bytes = kMmdTile * op.dimension * int64_t(sizeof(S) + sizeof(double));
  const int64_t width = std::clamp(std::min(longer.tiles / kTasks, kBlockBytes / bytes), int64_t(1), kMostTiles);
  const int64_t stretches = std::clamp(std::min(longer.tiles, kTasks) / shorter.tiles, int64_t(1), kTasks);
  longer.begin(1, width, &longer == &x ? d_x : d_y, threads);
  shorter.begin(stretches, width, &shorter == &x ? d_x : d_y, threads);
  Pairs<S> meet{kernel, longer, shorter, between, false, width, stretches, 0};
  Pairs<S> meet_x{kernel, x, x, of_x, !op.unbiased, width, 1, meet.rounds};
  Pairs<S> meet_y{kernel, y, y, of_y, !op.unbiased, width, 1, meet.rounds};
  Pairs<S>* terms[] = {&meet, &meet_x, &meet_y};
  const bool small = (op.n + op.k) * (op.n + op.k) * (op.dimension + 8) < kSmall;
  const int workers = small ? 1 : threads;
  for_tasks(workers, workers, [&](int64_t) {
    for (Pairs<S>* term : terms) term->work();
  });
  const double loss = meet.total() + meet_x.total() + meet_y.total();
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
  for_tasks(op.rows, threads, one_row, op.count * op.dimension < kSmall ? 16 : 1);
  double total = 0;
  for (const double sum : sums) total += sum;
  if (std::all_of(pairs.begin(), pairs.end(), [](const auto& of_row) { return of_row.empty(); })) return total;
  constexpr int64_t kCoordinates = 256;
  for_tasks((op.dimension + kCoordinates - 1) / kCoordinates, threads, [&](int64_t range) {
    const int64_t first = range * kCoordinates, count = std::min(kCoordinates, op.dimension - first);
    for (const auto& of_row : pairs)
      for (const Pair& pair : of_row) {
        const int64_t i = pair.i * op.dimension + first, j = pair.j * op.dimension + first;
        mmd_close_pair(as(op.x, i), as(op.y, j), pair.weight, count, as(op.d_x, i), as(op.d_y, j));
      }
  });
  return total;
}

}  // namespace

const Binding binding([](py::module_& module) {
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
});

}  // namespace lgd
