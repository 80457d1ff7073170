// A guidance rule in one call: for each sample its moments, its coefficients and its combination, while its rows are in
// the cache.
#include <cstring>

#include "../csrc/combine/combine.h"
#include "../csrc/common/program.h"
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
  Program program;
  Combine combine;
  int results[kMostTensors], scale;  // places among the values: of each coefficient, and of noise_scale (-1: none)
};

// Replaces the centred sums of a sample by plain sums and, behind these, centred ones.
template <class S>
void spread(const Moments& op, int64_t sample, int64_t row, double* values) {
  centre<S>(op.read, sample, row, values);
  double *means = values + 9, *centred = values + kPlainMoments;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) centred[3 * i + j] = values[i <= j ? 3 * i + j : 3 * j + i];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) values[3 * i + j] = centred[3 * i + j] + row * means[i] * means[j];
  for (int i = 0; i < 3; ++i) means[i] *= row;
}

// Runs the program for one sample, on the sums of its moments.
template <class S>
void coefficients_of(const Guided& op, int64_t sample, int64_t row, const double* sums, S* coefficients, S* scales) {
  double values[kMostValues];
  std::copy_n(sums, kPlainMoments, values);
  std::fill_n(values + kPlainMoments, kAllMoments - kPlainMoments + op.program.count, 0.0);
  if (op.moments.centred) spread<S>(op.moments, sample, row, values);
  op.program.run(sample, values);
  const int count = op.combine.read.count;
  for (int k = 0; k < count; ++k) coefficients[sample * count + k] = S(values[op.results[k]]);
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
      double found[kPlainMoments] = {};
      if (op.moments.wanted) reduce_row(sample, row, kPlainMoments, found, sums);
      coefficients_of<S>(op, sample, row, found, coefficients.data(), scales.data());
      write(sample, 0, row);
    });
    return;
  }
  op.moments.prefetched[0] = op.moments.prefetched[1] = {};  // other samples are read first
  std::vector<double> totals(batch * kPlainMoments);
  if (op.moments.wanted)
    reduce_rows(batch, row, batch * row < kSerial ? 1 : threads, kPlainMoments, totals.data(), sums);
  for (int64_t sample = 0; sample < batch; ++sample)
    coefficients_of<S>(op, sample, row, totals.data() + sample * kPlainMoments, coefficients.data(), scales.data());
  for_chunks(batch, row, threads, write, serial);
}

// Columns 0, 1 and 2 are c, u and D, made of two predictions. `wanted` has a bit for each moment that the program
// reads.
void fill_moments(Moments& op, const Rows* predictions, py::handle columns, unsigned wanted) {
  op = {};
  op.read.tensors[0] = predictions[0];
  op.read.tensors[1] = predictions[1];
  op.read.tensor_count = 2;
  op.read.count = twos_of(columns, op.read.columns, kMostTensors);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) op.products[3 * i + j] = {i, j};
    op.products[9 + i] = {i, -1};
  }
  op.count = kPlainMoments;
  op.find_equal_products();
  op.centred = wanted >> kPlainMoments;
  if (!op.centred) {
    op.wanted = wanted;
    return;
  }
  op.wanted = 0;
  for (int m = 0; m < 9; ++m)  // plain products are computed from centred ones
    if ((wanted | wanted >> kPlainMoments) >> m & 1)
      op.wanted |= 1u << op.same_as[m] | 1u << (9 + m / 3) | 1u << (9 + m % 3);
  op.wanted |= wanted & (7u << 9);
}

// Fills a program where it is: most of it is empty, and a copy would cost as much as the rest of a call.
void fill_program(Program& program, const Fields& from, Tensors numbers) {
  const int64_t bytes = PyBytes_Size(from[0].ptr()), step = sizeof(Instruction);
  const int constants = int(PySequence_Size(from[1].ptr())), given = int(PySequence_Size(numbers.ptr()));
  if (bytes < 0 || bytes % step) throw std::invalid_argument("bytes that are no instructions");
  if (kAllMoments + bytes / step > kMostValues || constants > kMostValues || given > kMostValues)
    throw std::length_error("a rule of more steps than the kernels have room for");
  program.count = int(bytes / step);
  std::memcpy(program.instructions, PyBytes_AsString(from[0].ptr()), bytes);
  for (int i = 0; i < constants; ++i) program.constants[i] = PyFloat_AsDouble(item(from[1], i).ptr());
  for (int i = 0; i < given; ++i) program.numbers[i] = per_sample(item(numbers, i), 0);
}

// a: `GuidedByRule` of lgd_kernels/guidance/program.py.
void fill(Guided& op, Tensor out, const Fields& a, Call& call) {
  const Fields program = a.fields(3);
  const int predictions = int(a.integer(1));
  fill_program(op.program, program, a[4]);
  op.combine = {};
  op.combine.read = columns_of(a.fields(0), call);
  op.combine.outputs[0] = rows(out);
  op.combine.count = 1;
  op.combine.seed = seed(a.fields(5));
  op.combine.low = -INFINITY;
  op.combine.high = INFINITY;
  fill_moments(op.moments, op.combine.read.tensors + predictions, a[2], unsigned(program.integer(2)));
  if (predictions) op.moments.prefetched[0] = op.combine.read.tensors[0];
  op.moments.prefetched[1] = op.combine.outputs[0];
  const int count = op.combine.read.count, results = int(PySequence_Size(program[3].ptr()));
  if (results != count && results != count + 1) throw std::invalid_argument("as many results as columns, or one more");
  for (int k = 0; k < count; ++k) op.results[k] = int(PyLong_AsLong(item(program[3], k).ptr()));
  op.scale = results > count ? int(PyLong_AsLong(item(program[3], count).ptr())) : -1;
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("guided_by_rule", [](Tensor out, Tensor arguments, int threads) {
    static thread_local Guided op;
    Call call;
    fill(op, out, Fields(arguments), call);
    const auto [batch, row] = Sizes(out);
    int64_t bytes = 0;
    for (int n = 0; n < op.combine.read.tensor_count; ++n) bytes += bytes_of(op.combine.read.tensors[n].dtype);
    py::gil_scoped_release release;
    op.combine.read.any(DType::f64) ? run<double>(op, batch, row, bytes, threads)
                                    : run<float>(op, batch, row, bytes, threads);
  });
});

}  // namespace lgd
