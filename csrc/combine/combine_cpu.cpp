#include <utility>

#include "../common/loops.h"
#include "../common/philox_cpu.h"
#include "combine.h"

namespace lgd {
namespace {

constexpr int kBoth = 2;   // outputs of one loop, where nothing passes through buffers
constexpr int kPlain = 3;  // columns of one loop that are tensors; a loop has one more column that is a difference

// The inputs of a loop: Plain tensors, then, with Apart, the two tensors of a difference.
template <class E, class S>
struct Group {
  const E* in[kPlain + 2];
  S factors[kPlain + 1];
  int plain = 0, apart = 0;
};

template <int Plain, int Apart, class S, class... In>
LGD_INLINE S terms(const S (&k)[kPlain + 1], In... in) {
  const S values[] = {in...};
  S sum = 0;
  for (int i = 0; i < Plain; ++i) sum = i ? sum + k[i] * values[i] : k[0] * values[0];
  if (Apart) {
    const S difference = k[Plain] * (values[Plain] - values[Plain + 1]);
    sum = Plain ? sum + difference : difference;
  }
  return sum;
}

template <class S>
LGD_INLINE S clamped(S value, S low, S high) {
  value = value < low ? low : value;  // two statements compile to min and max; NaN stays NaN
  return value > high ? high : value;
}

// sums += terms
template <int Plain, int Apart, class E, class S, size_t... I>
LGD_INLINE void add_indexed(S* sums, const Group<E, S>& group, int64_t count, std::index_sequence<I...>) {
  const auto& k = group.factors;
  S factors[kPlain + 1];
  for (int i = 0; i <= kPlain; ++i) factors[i] = k[i];
  map<S>(
      sums, count, [=](S before, auto... in) LGD_LAMBDA { return before + terms<Plain, Apart, S>(factors, in...); },
      sums, group.in[I]...);
}

template <int Plain, int Apart, class E, class S>
LGD_CLONES void add(S* sums, const Group<E, S>& group, int64_t count) {
  add_indexed<Plain, Apart>(sums, group, count, std::make_index_sequence<Plain + 2 * Apart>());
}

// out = clamped(terms + constant), or clamped(sums + terms) with the sums of earlier groups
template <int Plain, int Apart, class E, class S, size_t... I>
LGD_INLINE void finish_indexed(E* out, const S* sums, const Group<E, S>& group, S constant, S low, S high,
                               int64_t count, std::index_sequence<I...>) {
  S factors[kPlain + 1];
  for (int i = 0; i <= kPlain; ++i) factors[i] = group.factors[i];
  if (sums)
    map<S>(
        out, count,
        [=](S before, auto... in)
            LGD_LAMBDA { return clamped<S>(before + terms<Plain, Apart, S>(factors, in...), low, high); },
        sums, group.in[I]...);
  else
    map<S>(
        out, count,
        [=](auto... in) LGD_LAMBDA { return clamped<S>(terms<Plain, Apart, S>(factors, in...) + constant, low, high); },
        group.in[I]...);
}

template <int Plain, int Apart, class E, class S>
LGD_CLONES void finish(E* out, const S* sums, const Group<E, S>& group, S constant, S low, S high, int64_t count) {
  finish_indexed<Plain, Apart>(out, sums, group, constant, low, high, count,
                               std::make_index_sequence<Plain + 2 * Apart>());
}

// Both outputs of a solver's step with a history: their inputs are read once.
template <int Plain, int Apart, class S, size_t... I>
LGD_INLINE void finish_both_indexed(S* const* outputs, const Group<S, S>* groups, const S* constants, S low, S high,
                                    int64_t count, std::index_sequence<I...>) {
  S first[kPlain + 1], second[kPlain + 1];
  for (int i = 0; i <= kPlain; ++i) first[i] = groups[0].factors[i], second[i] = groups[1].factors[i];
  const S* const in[] = {groups[0].in[I]...};
  S *one = outputs[0], *other = outputs[1];
  const S constant = constants[0], its_constant = constants[1];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    one[i] = clamped<S>(terms<Plain, Apart, S>(first, in[I][i]...) + constant, low, high);
    other[i] = clamped<S>(terms<Plain, Apart, S>(second, in[I][i]...) + its_constant, low, high);
  }
}

template <int Plain, int Apart, class S>
LGD_CLONES void finish_both(S* const* outputs, const Group<S, S>* groups, const S* constants, S low, S high,
                            int64_t count) {
  finish_both_indexed<Plain, Apart>(outputs, groups, constants, low, high, count,
                                    std::make_index_sequence<Plain + 2 * Apart>());
}

template <class S>
LGD_CLONES void begin(S* sums, S constant, S scale, const float* z, int64_t count) {
  map<S>(sums, count, [=](S z) LGD_LAMBDA { return constant + scale * z; }, z);
}

// Calls run(std::integral_constant Plain, Apart) with the counts of a group.
template <class Run>
void with_group(int plain, int apart, const Run& run) {
  using std::integral_constant;
  const auto apart_known = [&](auto known) {
    if (plain == 0) return run(integral_constant<int, 0>(), integral_constant<int, 1>());
    if (plain == 1) return run(integral_constant<int, 1>(), known);
    if (plain == 2) return run(integral_constant<int, 2>(), known);
    return run(integral_constant<int, 3>(), known);
  };
  apart ? apart_known(integral_constant<int, 1>()) : apart_known(integral_constant<int, 0>());
}

// Splits the columns into groups of up to three tensors and one difference.
template <class E, class S>
int group_columns(const Columns& read, const E* const* tensors, const S* coefficients, Group<E, S>* groups) {
  int plain = 0, apart = 0;
  for (int k = 0; k < read.count; ++k)
    if (read.columns[k].minus < 0) {
      Group<E, S>& group = groups[plain++ / kPlain];
      group.in[group.plain] = tensors[read.columns[k].plus];
      group.factors[group.plain++] = coefficients[k];
    }
  for (int k = 0; k < read.count; ++k)
    if (read.columns[k].minus >= 0) {
      Group<E, S>& group = groups[apart++];
      group.in[group.plain] = tensors[read.columns[k].plus];
      group.in[group.plain + 1] = tensors[read.columns[k].minus];
      group.factors[group.plain] = coefficients[k];
      group.apart = 1;
    }
  const int plain_groups = (plain + kPlain - 1) / kPlain;
  return plain_groups > apart ? plain_groups : apart;
}

// Whether neither tensors nor sums of several groups pass through buffers.
template <class E>
bool in_place(const Combine& op) {
  int plain = 0, apart = 0;
  for (int k = 0; k < op.read.count; ++k) ++(op.read.columns[k].minus < 0 ? plain : apart);
  bool found = !op.noise_scale.data && plain <= kPlain && apart <= 1 && op.read.all(dtype_of<E>());
  for (int p = 0; p < op.count; ++p) found = found && op.outputs[p].dtype == dtype_of<E>();
  return found;
}

template <class S>
void add_moments(const S* const* outputs, int count, int64_t elements, double* found) {
  for (int p = 0; p < count; ++p)
    for (int q = p; q < count; ++q) *found++ += dot(outputs[p], outputs[q], elements);
  for (int p = 0; p < count; ++p) *found++ += total(outputs[p], elements);
}

// The numbers of a sample, the same for all of its blocks.
template <class S>
struct Factors {
  S coefficients[kMostOutputs][kMostTensors], constants[kMostOutputs], scales[kMostOutputs];

  Factors(const Combine& op, int64_t sample) {
    for (int p = 0; p < op.count; ++p) {
      const int64_t at = sample * op.count + p;
      for (int k = 0; k < op.read.count; ++k) coefficients[p][k] = op.coefficients.at<S>(at * op.read.count + k);
      constants[p] = op.read.inside(sample) ? op.constant.at<S>(at) : S(NAN);
      scales[p] = op.noise_scale.at<S>(at);
    }
  }
};

// Computes one output, or both outputs of a step, without a buffer between memory and the loop.
template <class E, class S>
void combine_in_place(const Combine& op, int64_t sample, int64_t first, int64_t last, const Factors<S>& factors) {
  const E* tensors[kMostTensors];
  for (int n = 0; n < op.read.tensor_count; ++n)
    tensors[n] = op.read.tensors[n].at<E>(op.read.sample_of(n, sample), first);
  Group<E, S> groups[kBoth];
  E* outputs[kBoth];
  for (int p = 0; p < op.count; ++p) {
    group_columns(op.read, tensors, factors.coefficients[p], &groups[p]);
    outputs[p] = op.outputs[p].at<E>(sample, first);
  }
  with_group(groups[0].plain, groups[0].apart, [&](auto plain_, auto apart_) {
    constexpr int plain = decltype(plain_)::value, apart = decltype(apart_)::value;
    if (op.count == 1)
      finish<plain, apart>(outputs[0], static_cast<const S*>(nullptr), groups[0], factors.constants[0], S(op.low),
                           S(op.high), last - first);
    else if constexpr (std::is_same<E, S>::value)
      finish_both<plain, apart>(outputs, groups, factors.constants, S(op.low), S(op.high), last - first);
  });
}

template <bool Moments, class E, class S>
void combine_blocks(const Combine& op, int64_t sample, int64_t first, int64_t last, double* found) {
  const Columns& read = op.read;
  const Factors<S> factors(op, sample);
  if (!Moments && in_place<E>(op) && op.count <= (std::is_same<E, S>::value ? kBoth : 1))
    return combine_in_place<E>(op, sample, first, last, factors);
  alignas(64) E buffers[kMostOutputs + (Moments ? kMostOutputs : 1)][kBlock];
  alignas(64) S sums[kBlock];
  alignas(64) float drawn[kBlock];
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t count = last - at < kBlock ? last - at : kBlock;
    const E* tensors[kMostOutputs];
    for (int n = 0; n < read.tensor_count; ++n)
      tensors[n] = read_block(read.tensors[n], read.sample_of(n, sample), at, count, buffers[n]);
    const E* outputs[kMostOutputs];
    if (op.noise_scale.data) philox_fill(drawn, count, at, op.seed.key(sample), op.seed.index(sample), kStreamStep);
    for (int p = 0; p < op.count; ++p) {
      Group<E, S> groups[kMostTensors] = {};
      const int last_group = group_columns(read, tensors, factors.coefficients[p], groups) - 1;
      const bool more = op.noise_scale.data || last_group > 0;
      const S constant = factors.constants[p];
      if (op.noise_scale.data)
        begin(sums, constant, factors.scales[p], drawn, count);
      else if (more)
        for (int64_t i = 0; i < count; ++i) sums[i] = constant;
      for (int g = 0; g < last_group; ++g)
        with_group(groups[g].plain, groups[g].apart, [&](auto plain, auto apart) {
          add<decltype(plain)::value, decltype(apart)::value>(sums, groups[g], count);
        });
      E* buffer = buffers[kMostOutputs + (Moments ? p : 0)];
      const bool written = !Moments || p < op.count - op.unwritten;
      E* out = written ? open_block(op.outputs[p], sample, at, buffer) : buffer;
      outputs[p] = out;
      const auto& end = groups[last_group];
      with_group(end.plain, end.apart, [&](auto plain, auto apart) {
        finish<decltype(plain)::value, decltype(apart)::value>(out, more ? sums : nullptr, end, constant, S(op.low),
                                                               S(op.high), count);
      });
      if (written) write_block(op.outputs[p], sample, at, count, out);
    }
    if constexpr (Moments) add_moments(outputs, op.count, count, found);
  }
}

}  // namespace

template <class S>
void combine(const Combine& op, int64_t sample, int64_t first, int64_t last, double* found) {
  if (found) return combine_blocks<true, S, S>(op, sample, first, last, found);
  if constexpr (std::is_same<S, float>::value)
    if (op.read.all(DType::bf16) && op.outputs[0].dtype == DType::bf16)
      return combine_blocks<false, bf16, float>(op, sample, first, last, nullptr);
  combine_blocks<false, S, S>(op, sample, first, last, nullptr);
}

template void combine<float>(const Combine&, int64_t, int64_t, int64_t, double*);
template void combine<double>(const Combine&, int64_t, int64_t, int64_t, double*);

}  // namespace lgd
