// The value and the gradients of one problem, from differences, a block of tiles with another at a time. The caller
// owns memory and threads, and what threads share.
#pragma once
#include <algorithm>

#include "energy_mmd.h"

namespace lgd {

constexpr int64_t kSmall = 1 << 24;  // pairs times the cost of one: below, about 1 ms, more threads do not pay
constexpr int64_t kTasks = 32, kMostTiles = 4;  // blocks wanted on a side, and the longest; most bytes of one:
constexpr int64_t kBlockBytes = 1 << 18;        // points and their gradients stay near a core while other blocks pass
constexpr int64_t kStretch = 1024;  // coordinates of a tile (4 million multiply-adds) between two checks for a stop

// A set of points in tiles, and, where wanted, their gradients, in one or several parts.
template <class S>
struct TiledSet {
  int64_t count, dimension, tiles;
  const S* rows;                // [count, dimension]
  S* weights = nullptr;         // [tiles, 64]
  S* packed = nullptr;          // [tiles, dimension, 64]
  double* gradients = nullptr;  // [parts, tiles, dimension, 64]; null: not wanted
  int64_t parts = 1;
  double sum = 0, squares = 0;  // of the weights

  TiledSet(const void* data, int64_t item, int64_t count, int64_t dimension)
      : count(count),
        dimension(dimension),
        tiles((count + kMmdTile - 1) / kMmdTile),
        rows(static_cast<const S*>(data) + item * count * dimension) {}

  // Fills the weights, of memory that is 0; `given`: [batch, count], or null for weights 1.
  void weigh(const void* given, int64_t item) {
    const S* own = given ? static_cast<const S*>(given) + item * count : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      weights[i] = own ? own[i] : S(1);
      sum += double(weights[i]);
      squares += double(weights[i]) * double(weights[i]);
    }
  }
  void pack(int64_t tile) const { mmd_pack(rows, count, dimension, tile, 0, dimension, packed + tile * length()); }
  // Adds up the parts of the gradient in order, and rounds it.
  void unpack(int64_t tile, S* to) const {
    double* total = gradient(0, tile);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < length(); ++i) total[i] += gradient(part, tile)[i];
    mmd_unpack(total, count, dimension, tile, 0, dimension, to);
  }

  int64_t length() const { return kMmdTile * dimension; }
  int64_t blocks(int64_t width) const { return (tiles + width - 1) / width; }
  int64_t points(int64_t tile) const { return std::min<int64_t>(kMmdTile, count - tile * kMmdTile); }
  double* gradient(int64_t part, int64_t tile) const {
    return gradients ? gradients + (part * tiles + tile) * length() : nullptr;
  }
  double pairs(bool unbiased) const { return sum * sum - (unbiased ? squares : 0); }
};

// The coefficients of the sums over pairs in the loss; 0: the term does not count.
struct MmdCoefficients {
  double between, within_x, within_y;

  template <class S>
  MmdCoefficients(const EnergyMmd& op, const TiledSet<S>& x, const TiledSet<S>& y) {
    const auto within = [&](const TiledSet<S>& set) { return -op.kernel.factor() * op.lam / set.pairs(op.unbiased); };
    between = op.between ? op.kernel.factor() / (x.sum * y.sum) : 0;
    within_x = op.lam != 0 ? within(x) : 0;
    within_y = op.lam != 0 && op.target_term ? within(y) : 0;
  }
};

// How the sets of a problem are cut: tiles in a block, and parts of the gradient of the shorter set, one for each
// stretch of the longer set.
struct MmdCut {
  int64_t width, stretches;

  template <class S>
  MmdCut(const TiledSet<S>& longer, const TiledSet<S>& shorter) {
    const int64_t bytes = kMmdTile * longer.dimension * int64_t(sizeof(S) + sizeof(double));
    width = std::clamp(std::min(longer.tiles / kTasks, kBlockBytes / bytes), int64_t(1), kMostTiles);
    stretches = std::clamp(std::min(longer.tiles, kTasks) / shorter.tiles, int64_t(1), kTasks);
  }
};

// Which block meets which, and when. Blocks of x and y meet in rounds: no two tasks of a round have a block in common,
// and a block ends a round before it begins the next. So each gradient has one writer at a time, the order of additions
// is that of the rounds, whatever the threads, and a thread that wakes up late leaves its tasks to the others. A set y
// of few blocks has a part of its gradient for each stretch of x.
struct Rounds {
  int64_t rows, columns, stretches;
  bool same;  // x is y: a pair of blocks meets once
  int64_t length = (rows + stretches - 1) / stretches, rounds = std::max(length, columns);

  struct Task {
    int64_t round, stretch, row, column;
    bool empty, has_row, has_column;
  };

  int64_t tasks() const { return rounds * stretches * rounds; }
  Task operator[](int64_t task) const {
    const int64_t of_round = stretches * rounds;
    const int64_t round = task / of_round, stretch = task % of_round / rounds, own = task % rounds;
    const int64_t i = stretch * length + own, j = (same ? round + rounds - own : round + own) % rounds;
    return {round,      stretch, i, j, same && j < i /* the same pair comes as (j, i) */, own < length && i < rows,
            j < columns};
  }
};

// The sum over the pairs of two sets, or within one (then those with i < j, and, with `itself`, half of those with
// i = j), and its gradients.
template <class S>
struct PairSum {
  const MmdKernel& kernel;
  TiledSet<S>&x, &y;
  double coefficient;
  bool itself;
  int64_t width;
  Rounds schedule;
  int64_t before;  // rounds of earlier sums that the sets have been in
  double* sums;    // [blocks of x], 0

  int64_t rounds() const { return coefficient == 0 ? 0 : schedule.rounds; }

  // By every thread, with a gate of its own: gate.take() returns 0, 1, 2, ..., each once for all threads.
  // gate.wait(set, block, count) returns once that block of x (0) or y (1) has been in so many rounds, or false if the
  // call is to stop. gate.pass(set, block, count) records so many rounds. gate.stops(): whether the call is to stop.
  template <class Gate>
  void work(Gate& gate) const {
    const int64_t tasks = coefficient == 0 ? 0 : schedule.tasks();
    for (int64_t number; (number = gate.take()) < tasks;) {
      const Rounds::Task task = schedule[number];
      if (task.empty) continue;
      const int64_t round = before + task.round, part = task.stretch * schedule.columns + task.column;
      // tasks are begun in order, so that what is waited for is under way
      if (task.has_row && !gate.wait(0, task.row, round)) return;
      if (task.has_column && !gate.wait(1, part, round)) return;
      if (task.has_row && task.has_column) sums[task.row] += block(task.row, task.column, task.stretch, gate);
      if (gate.stops()) return;
      if (task.has_row) gate.pass(0, task.row, round + 1);
      if (task.has_column) gate.pass(1, part, round + 1);
    }
  }
  double total() const {
    double total = 0;
    for (int64_t row = 0; row < schedule.rows; ++row) total += sums[row];
    return coefficient * total;
  }

 private:
  template <class Gate>
  double block(int64_t row, int64_t column, int64_t part, Gate& gate) const {
    double sum = 0;
    for (int64_t i = row * width; i < std::min(x.tiles, (row + 1) * width); ++i)
      for (int64_t j = column * width; j < std::min(y.tiles, (column + 1) * width); ++j)
        if (!schedule.same || i <= j) sum += tile(i, j, x.gradient(0, i), y.gradient(part, j), gate);
    return sum;
  }

  template <class Gate>
  double tile(int64_t i, int64_t j, double* d_x, double* d_y, Gate& gate) const {
    alignas(64) S squares[kMmdTile * kMmdTile];
    const TilePairs of(x.points(i), y.points(j), schedule.same && i == j);
    const S *a = x.packed + i * x.length(), *b = y.packed + j * y.length();
    const S *p = x.weights + i * kMmdTile, *q = y.weights + j * kMmdTile;
    for (int64_t at = 0; at < x.dimension; at += kStretch) {
      const int64_t some = std::min(kStretch, x.dimension - at), to = at * kMmdTile;
      mmd_squares(kernel, of, a + to, b + to, some, at > 0, squares);
      if (gate.stops()) return 0;
    }
    double sum = mmd_values(kernel, of, p, q, d_x || d_y, squares);
    for (int64_t at = 0; at < x.dimension && (d_x || d_y); at += kStretch) {
      const int64_t some = std::min(kStretch, x.dimension - at), to = at * kMmdTile;
      mmd_gradients(kernel, of, a + to, b + to, some, squares, coefficient, d_x ? d_x + to : d_x, d_y ? d_y + to : d_y);
      if (gate.stops()) return 0;
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

}  // namespace lgd
