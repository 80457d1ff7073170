// A guidance rule in one call: moments of a sample, its coefficients, and its combination, while it is in the cache.
#include <cstring>

#include "../csrc/combine/combine.h"
#include "../csrc/common/tape.h"
#include "../csrc/moments/centring.h"
#include "binding.h"
#include "columns.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

constexpr int64_t kCached = 384 * 1024;  // bytes of a sample's tensors that a second-level cache still has

struct Guided {
  Moments moments;
  Tape tape;
  Combine combine;
  int factors[kMostTensors], scale;  // places of values: of each column, and of the noise (-1: none)
};

// Replaces centred sums in the place of the plain ones by plain and centred sums.
template <class S>
void spread(const Moments& op, int64_t sample, int64_t row, double* values) {
  centre<S>(op.read, sample, row, values);
  double *means = values + 9, *centred = values + kPlain;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) centred[3 * i + j] = values[i <= j ? 3 * i + j : 3 * j + i];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) values[3 * i + j] = centred[3 * i + j] + row * means[i] * means[j];
  for (int i = 0; i < 3; ++i) means[i] *= row;
}

// The coefficients of one sample, from the sums of its moments.
template <class S>
void play(const Guided& op, int64_t sample, int64_t row, const double* sums, S* coefficients, S* scales) {
  double values[kMostValues];
  std::copy_n(sums, kPlain, values);
  std::fill_n(values + kPlain, kGiven - kPlain + op.tape.count, 0.0);
  if (op.moments.centred) spread<S>(op.moments, sample, row, values);
  op.tape.play(sample, values);
  const int count = op.combine.read.count;
  for (int k = 0; k < count; ++k) coefficients[sample * count + k] = S(values[op.factors[k]]);
  if (op.scale >= 0) scales[sample] = S(values[op.scale]);
}

template <class S>
void run(Guided& op, int64_t batch, int64_t row, int64_t bytes, int threads) {
  std::vector<S> coefficients(batch * op.combine.read.count), scales(op.scale >= 0 ? batch : 0);
  op.combine.coefficients = {coefficients.data(), dtype_of<S>()};
  op.combine.noise_scale = {op.scale >= 0 ? scales.data() : nullptr, dtype_of<S>()};
  const auto sums = [&](int64_t sample, int64_t first, int64_t last, double* found) {
    moments<S>(op.moments, sample, first, last, found);
  };
  const auto write = [&](int64_t sample, int64_t first, int64_t last) { combine<S>(op.combine, sample, first, last); };
  const int64_t serial = op.scale >= 0 ? kSerialDrawn : kSerial;
  if (row * bytes <= kCached && (batch >= 4 * threads || batch * row < serial)) {
    for_tasks(batch, batch * row < serial ? 1 : threads, [&](int64_t sample) {
      double found[kPlain] = {};
      if (op.moments.wanted) reduce_row(sample, row, kPlain, found, sums);
      play<S>(op, sample, row, found, coefficients.data(), scales.data());
      write(sample, 0, row);
    });
    return;
  }
  op.moments.soon[0] = op.moments.soon[1] = {};  // not so soon
  std::vector<double> totals(batch * kPlain);
  if (op.moments.wanted) reduce_rows(batch, row, batch * row < kSerial ? 1 : threads, kPlain, totals.data(), sums);
  for (int64_t sample = 0; sample < batch; ++sample)
    play<S>(op, sample, row, totals.data() + sample * kPlain, coefficients.data(), scales.data());
  for_chunks(batch, row, threads, write, serial);
}

int place(py::handle list, int index) { return int(PyLong_AsLong(item(list, index).ptr())); }

// Columns 0, 1, 2 are c, u and D, of two of the tensors: every product, and every sum; `wanted` has a bit for each
// value that the rule reads.
void fill_moments(Moments& op, const Rows* predictions, py::handle columns, unsigned wanted) {
  op = {};
  op.read.tensors[0] = predictions[0];
  op.read.tensors[1] = predictions[1];
  op.read.tensor_count = 2;
  op.read.count = pairs_of(columns, op.read.columns, kMostTensors);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      op.pairs[3 * i + j] = {i, j};
      op.same_as[3 * i + j] = i <= j ? 3 * i + j : 3 * j + i;
    }
    op.pairs[9 + i] = {i, -1};
    op.same_as[9 + i] = 9 + i;
  }
  op.count = kPlain;
  op.centred = wanted >> kPlain;
  if (!op.centred) {
    op.wanted = wanted;
    return;
  }
  op.wanted = 0;
  for (int m = 0; m < 9; ++m)  // plain products are computed from centred ones
    if ((wanted | wanted >> kPlain) >> m & 1) op.wanted |= 1u << op.same_as[m] | 1u << (9 + m / 3) | 1u << (9 + m % 3);
  op.wanted |= wanted & (7u << 9);
}

// In place: most of a tape is empty, and copied that costs as much as all else here.
void fill_tape(Tape& tape, py::handle code, py::handle constants, Tensors numbers) {
  const int64_t bytes = PyBytes_Size(code.ptr()), step = sizeof(Instruction);
  const int given = int(PySequence_Size(constants.ptr())), counted = int(PySequence_Size(numbers.ptr()));
  if (bytes < 0 || bytes % step) throw std::invalid_argument("notes that are no instructions");
  if (kGiven + bytes / step > kMostValues || given > kMostValues || counted > kMostValues)
    throw std::length_error("a rule of more steps than the kernels have room for");
  tape.count = int(bytes / step);
  std::memcpy(tape.instructions, PyBytes_AsString(code.ptr()), bytes);
  for (int i = 0; i < given; ++i) tape.constants[i] = PyFloat_AsDouble(item(constants, i).ptr());
  for (int i = 0; i < counted; ++i) tape.numbers[i] = per_sample(item(numbers, i), 0);
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("guided_by_rule",
             [](Tensor out, Tensors tensors, int predictions, py::handle moment_columns, unsigned wanted,
                py::handle code, py::handle constants, Tensors numbers, py::handle columns, py::handle factors,
                int scale, Tensor seed_, std::optional<int64_t> seed_value, int64_t first_sample, int threads) {
               static thread_local Guided op;
               fill_tape(op.tape, code, constants, numbers);
               op.combine = {};
               op.combine.read = columns_of(tensors, columns, py::none(), 0);
               for (int k = 0; k < op.combine.read.count; ++k) op.factors[k] = place(factors, k);
               op.combine.outputs[0] = rows(out);
               fill_moments(op.moments, op.combine.read.tensors + predictions, moment_columns, wanted);
               if (predictions) op.moments.soon[0] = op.combine.read.tensors[0];
               op.moments.soon[1] = op.combine.outputs[0];
               op.combine.count = 1;
               op.combine.seed = seed(seed_, seed_value, first_sample);
               op.combine.low = -INFINITY;
               op.combine.high = INFINITY;
               op.scale = scale;
               const Sizes sizes(out);
               int64_t bytes = 0;
               for (int n = 0; n < op.combine.read.tensor_count; ++n)
                 bytes += op.combine.read.tensors[n].dtype == DType::f64   ? 8
                          : op.combine.read.tensors[n].dtype == DType::f32 ? 4
                                                                           : 2;
               py::gil_scoped_release release;
               op.combine.read.any(DType::f64) ? run<double>(op, sizes.batch, sizes.row, bytes, threads)
                                               : run<float>(op, sizes.batch, sizes.row, bytes, threads);
             });
});

}  // namespace lgd
