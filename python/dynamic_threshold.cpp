#include "../csrc/dynamic_threshold/dynamic_threshold.h"

#include "arguments.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {
namespace {

// work(part, first, last) for equal parts of a row, one to a thread. Counts, least and greatest do not depend on them.
template <class Work>
void for_parts(int64_t row, int parts, const Work& work) {
  if (parts == 1) return work(0, 0, row);
  for_tasks(parts, parts, [&](int64_t part) { work(int(part), row * part / parts, row * (part + 1) / parts); });
}

// The statistics of ranks `rank` and `rank + 1`, or, where the weight is 0, the first twice; NaN where x0 has one.
template <class S>
void order_of(const DynamicThreshold& op, int64_t sample, int64_t row, int parts, int64_t* counts, double* found) {
  using Bits = typename Magnitude<S>::Bits;
  int64_t rank = op.rank, equal = 0;  // rank: among those that have the prefix
  Known known{0, Magnitude<S>::width, 0};
  while (known.shift > 0) {
    known.bits = std::min(kDigit, known.shift);
    known.shift -= known.bits;
    std::fill_n(counts, int64_t(parts) * kDigits, 0);
    for_parts(row, parts, [&](int part, int64_t first, int64_t last) {
      count_digits<S>(op.x0, sample, first, last, known, counts + int64_t(part) * kDigits);
    });
    int64_t digit = 0;
    for (;; ++digit) {
      equal = 0;
      for (int part = 0; part < parts; ++part) equal += counts[int64_t(part) * kDigits + digit];
      if (rank < equal) break;
      rank -= equal;
    }
    known.prefix = known.prefix << known.bits | uint64_t(digit);
  }
  std::vector<uint64_t> above(parts), largest(parts);
  for_parts(row, parts, [&](int part, int64_t first, int64_t last) {
    next_above<S>(op.x0, sample, first, last, known.prefix, &above[part], &largest[part]);
  });
  const uint64_t next = *std::min_element(above.begin(), above.end());
  const bool alone = op.weight > 0 && rank + 1 == equal;  // the next one is another
  found[0] = bits_as<S>(Bits(known.prefix));
  found[1] = alone ? bits_as<S>(Bits(next)) : found[0];
  if (*std::max_element(largest.begin(), largest.end()) > Magnitude<S>::infinity) found[0] = found[1] = NAN;
}

template <class S>
void run(const DynamicThreshold& op, int64_t batch, int64_t row, int threads, S* order) {
  if (batch * row < kSerial) threads = 1;
  const auto whole = [&](int64_t sample, int parts, int64_t* counts) {
    double found[2];
    order_of<S>(op, sample, row, parts, counts, found);
    for (int i = 0; i < 2; ++i) order[2 * sample + i] = S(found[i]);
    const double threshold = threshold_of(op, found[0], found[1]);
    for_parts(row, parts,
              [&](int, int64_t first, int64_t last) { clip_and_divide<S>(op, sample, first, last, threshold); });
  };
  if (batch < 2 * threads) {  // too few to share out: together at each
    std::vector<int64_t> counts(int64_t(threads) * kDigits);
    return for_tasks(batch, 1, [&](int64_t sample) { whole(sample, threads, counts.data()); });
  }
  for_tasks(batch, threads, [&](int64_t sample) {
    static thread_local std::vector<int64_t> counts(kDigits);
    whole(sample, 1, counts.data());
  });
}

}  // namespace

const Binding binding([](py::module_& module) {
  module.def("dynamic_threshold",
             [](Tensor out, Tensor order, Tensor x0, int64_t rank, double weight, double most, int threads) {
               const DynamicThreshold op{rows(out), rows(x0), rank, weight, most};
               const auto [batch, row] = Sizes(x0);
               void* found = address(order);
               py::gil_scoped_release release;
               wide(op.x0) ? run<double>(op, batch, row, threads, static_cast<double*>(found))
                           : run<float>(op, batch, row, threads, static_cast<float*>(found));
             });
});

}  // namespace lgd
