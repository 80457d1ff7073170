#include "../csrc/energy_mmd/energy_mmd.h"

#include <atomic>
#include <memory>
#include <thread>

#include "../csrc/energy_mmd/few_points.h"
#include "../csrc/energy_mmd/rounds.h"
#include "aligned.h"
#include "arguments.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

// Memory of a set of points, and, for each block of each part, the number of rounds that it has been in.
template <class S>
struct Held {
  TiledSet<S> set;
  Aligned<S> weights, packed;
  Aligned<double> gradients;
  std::vector<std::atomic<int64_t>> rounds;

  Held(const void* data, const void* given, int64_t item, int64_t count, int64_t dimension)
      : set(data, item, count, dimension), weights(set.tiles * kMmdTile) {
    set.weights = weights.data();
    set.weigh(given, item);
  }
  void begin(int64_t parts, int64_t width, bool wanted, int threads) {
    rounds = std::vector<std::atomic<int64_t>>(parts * set.blocks(width));
    packed.resize(set.tiles * set.length());
    set.packed = packed.data();
    set.parts = parts;
    if (wanted) {
      gradients.assign(parts * set.tiles * set.length(), 0.0);
      set.gradients = gradients.data();
    }
    for_tasks(set.tiles, threads_for(threads), [&](int64_t tile) { set.pack(tile); });
  }
  void finish(S* to, int threads) {
    if (to) for_tasks(set.tiles, threads_for(threads), [&](int64_t tile) { set.unpack(tile, to); });
  }

 private:
  int threads_for(int threads) const { return set.tiles * set.length() > kSerial ? threads : 1; }
};

// A thread's view of a sum over pairs, as PairSum::work uses it.
class Gate {
 public:
  using Counts = std::vector<std::atomic<int64_t>>;
  Gate(std::atomic<int64_t>& next, Counts& x, Counts& y) : next_(next), rounds_{&x, &y} {}

  int64_t take() { return next_++; }
  bool stops() { return watch_.stops(); }
  bool wait(int set, int64_t block, int64_t count) {
    while ((*rounds_[set])[block].load(std::memory_order_acquire) < count) {
      if (stops()) return false;
      std::this_thread::yield();
    }
    return true;
  }
  void pass(int set, int64_t block, int64_t count) { (*rounds_[set])[block].store(count, std::memory_order_release); }

 private:
  std::atomic<int64_t>& next_;
  Counts* rounds_[2];
  Watch watch_;
};

// A sum over the pairs of two sets, of which `before` rounds have passed.
template <class S>
struct Sum {
  Held<S>&x, &y;
  std::vector<double> sums;
  std::atomic<int64_t> next{0};
  PairSum<S> of;

  Sum(const EnergyMmd& op, Held<S>& x, Held<S>& y, double coefficient, const MmdCut& cut, int64_t before)
      : x(x),
        y(y),
        sums(x.set.blocks(cut.width)),
        of{op.kernel,
           x.set,
           y.set,
           coefficient,
           &x == &y && !op.unbiased,
           cut.width,
           Rounds{x.set.blocks(cut.width), y.set.blocks(cut.width), &x == &y ? 1 : cut.stretches, &x == &y},
           before,
           sums.data()} {}
  void work() {
    Gate gate(next, x.rounds, y.rounds);
    of.work(gate);
  }
};

template <class S>
double few_points(const EnergyMmd& op, const Held<S>& x, const Held<S>& y, const MmdCoefficients& terms, S* d_x,
                  S* d_y) {
  const std::unique_ptr<FewPointsMemory<S>> memory(new FewPointsMemory<S>);
  const bool turned = op.n < op.k;
  FewPoints<S> few{op.kernel, {&x.set, &y.set}, {d_x, d_y}, *memory};
  few.add({turned, !turned, terms.between, false});
  few.add({0, 0, terms.within_x, !op.unbiased});
  few.add({1, 1, terms.within_y, !op.unbiased});
  Watch watch;
  return few.run([&] { return watch.stops(); });
}

template <class S>
double run_item(const EnergyMmd& op, int64_t item, void* to_x, void* to_y, int threads) {
  Held<S> x(op.x, op.x_weights, item, op.n, op.dimension), y(op.y, op.y_weights, item, op.k, op.dimension);
  S* d_x = to_x ? static_cast<S*>(to_x) + item * op.n * op.dimension : nullptr;
  S* d_y = to_y ? static_cast<S*>(to_y) + item * op.k * op.dimension : nullptr;
  const MmdCoefficients terms(op, x.set, y.set);
  if (x.set.tiles == 1 && y.set.tiles == 1 && op.dimension > kLong) return few_points(op, x, y, terms, d_x, d_y);
  Held<S>&longer = op.n < op.k ? y : x, &shorter = op.n < op.k ? x : y;
  const MmdCut cut(longer.set, shorter.set);
  longer.begin(1, cut.width, &longer == &x ? d_x : d_y, threads);
  shorter.begin(cut.stretches, cut.width, &shorter == &x ? d_x : d_y, threads);
  Sum<S> between(op, longer, shorter, terms.between, cut, 0);
  Sum<S> within_x(op, x, x, terms.within_x, cut, between.of.rounds());
  Sum<S> within_y(op, y, y, terms.within_y, cut, between.of.rounds());
  const bool small = (op.n + op.k) * (op.n + op.k) * (op.dimension + 8) < kSmall;
  const int workers = small ? 1 : threads;
  for_tasks(workers, workers, [&](int64_t) {
    for (Sum<S>* sum : {&between, &within_x, &within_y}) sum->work();
  });
  const double loss = between.of.total() + within_x.of.total() + within_y.of.total();
  x.finish(d_x, threads);
  y.finish(d_y, threads);
  return loss;
}

// Many small problems: a thread for each. A large one: threads within.
template <class S>
void run(const EnergyMmd& op, double* loss, void* d_x, void* d_y, int threads) {
  const bool many = op.batch >= threads;
  for_tasks(op.batch, many ? threads : 1,
            [&](int64_t item) { loss[item] = run_item<S>(op, item, d_x, d_y, many ? 1 : threads); });
}

// Products become weights; returns the sum. Close pairs are added to the gradients here, a range of coordinates in each
// task, so that the order of additions is that of the pairs.
template <class S>
double run_block(const ProductBlock& op, S* d_x, S* d_y, int threads) {
  struct Pair {
    int64_t i, j;
    S weight;
  };
  std::vector<double> sums(op.rows);
  std::vector<std::vector<Pair>> pairs(op.rows);
  const auto one_row = [&](int64_t i) {
    static thread_local std::vector<S> close;
    if (d_x) close.assign(op.columns, S(0));
    ProductRow<S> row(op, i, d_x ? close.data() : nullptr);
    sums[i] = mmd_product_row(op.kernel, row);
    if (d_x && row.any_close)
      for (int64_t j = row.first; j < op.columns; ++j)
        if (close[j] != 0) pairs[i].push_back({i, j, close[j]});
  };
  for_tasks(op.rows, threads, one_row, op.columns * op.dimension < kSmall ? 16 : 1);
  double total = 0;
  for (const double sum : sums) total += sum;
  if (std::all_of(pairs.begin(), pairs.end(), [](const auto& of_row) { return of_row.empty(); })) return total;
  constexpr int64_t kCoordinates = 256;
  const auto *x = static_cast<const S*>(op.x), *y = static_cast<const S*>(op.y);
  for_tasks((op.dimension + kCoordinates - 1) / kCoordinates, threads, [&](int64_t range) {
    const int64_t first = range * kCoordinates, count = std::min(kCoordinates, op.dimension - first);
    for (const auto& of_row : pairs)
      for (const Pair& pair : of_row) {
        const int64_t i = pair.i * op.dimension + first, j = pair.j * op.dimension + first;
        mmd_close_pair(x + i, y + j, pair.weight, count, d_x + i, d_y + j);
      }
  });
  return total;
}

// An MmdKernel of structs.py, with its parameters.
struct Function {
  std::vector<double> parameters;
  MmdKernel kernel;

  explicit Function(const Fields& from)
      : parameters(from[1].cast<std::vector<double>>()),
        kernel{kind(from[0].cast<std::string>()), parameters.data(), int(parameters.size())} {}
  Function(const Function&) = delete;

 private:
  static MmdKernels kind(const std::string& name) {
    const char* names[] = {"energy", "gaussian", "laplace", "rational", "polynomial"};
    for (int code = 0; code < 5; ++code)
      if (name == names[code]) return MmdKernels(code);
    throw py::value_error("unknown kernel");
  }
};

}  // namespace

const Binding binding([](py::module_& module) {
  // Outputs: loss, float64, and d_x and d_y or None, contiguous. All points and weights have one dtype, float32 or
  // float64.
  module.def("energy_mmd", [](Tensor outputs, Tensor arguments, int threads) {
    Call call;
    const Fields to(outputs), a(arguments);
    const Tensor x = call.contiguous(a[0]), y = call.contiguous(a[1]);
    const Function function(a.fields(4));
    const EnergyMmd op{size(x, 0),
                       size(x, 1),
                       size(y, 1),
                       size(x, 2),
                       address(x),
                       address(y),
                       address(call.contiguous(a[2])),
                       address(call.contiguous(a[3])),
                       function.kernel,
                       a.real(5),
                       a.flag(6),
                       a.flag(7),
                       a.flag(8)};
    auto* loss = static_cast<double*>(address(to[0]));
    void *d_x = address(to[1]), *d_y = address(to[2]);
    const bool is_wide = dtype(x) == DType::f64;
    py::gil_scoped_release release;
    is_wide ? run<double>(op, loss, d_x, d_y, threads) : run<float>(op, loss, d_x, d_y, threads);
  });
  // Outputs: what is added to the gradients of x and y, or None for both. All tensors are contiguous and of one dtype.
  module.def("energy_mmd_block", [](Tensor outputs, Tensor arguments, int threads) {
    const Tensors to = outputs;
    const Fields a(arguments);
    const Function function(a.fields(7));
    const ProductBlock op{size(a[0], 0),   size(a[0], 1), size(a[1], 1), address(a[0]), address(a[1]),
                          address(a[2]),   address(a[3]), address(a[4]), address(a[5]), address(a[6]),
                          function.kernel, a.real(8),     a.flag(9)};
    void *d_x = address(item(to, 0)), *d_y = address(item(to, 1));
    const bool is_wide = dtype(a[0]) == DType::f64;
    py::gil_scoped_release release;
    return is_wide ? run_block(op, static_cast<double*>(d_x), static_cast<double*>(d_y), threads)
                   : run_block(op, static_cast<float*>(d_x), static_cast<float*>(d_y), threads);
  });
});

}  // namespace lgd
