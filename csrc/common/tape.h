// A rule written down: arithmetic on one sample's numbers, in double. lgd_kernels/guidance/program.py writes it.
#pragma once
#include <cmath>

#include "scalar.h"

namespace lgd {

enum class Op : int {  // in the order of lgd_kernels/guidance/program.py
  constant,
  number,
  add,
  subtract,
  multiply,
  divide,
  power,
  equal,
  unequal,
  greater,
  greater_equal,
  less,
  less_equal,
  both,
  either,
  larger,
  smaller,
  root,
  exponential,
  logarithm,
  magnitude,
  negative,
  choose,
};

struct Instruction {
  Op op;
  int a, b, c;  // places of values; of a constant or a number, where it is among those
};

// Moments of c, u, D, in the order of `Pair` in lgd_kernels/guidance/rules.py: nine products, row by row, and three sums; then
// nine products of deviations from the means.
constexpr int kPlain = 12, kGiven = 21;
constexpr int kMostValues = 256;

struct Tape {
  Instruction instructions[kMostValues - kGiven];
  int count;
  double constants[kMostValues];
  PerSample numbers[kMostValues];

  // values[kGiven + i] is what instruction i makes of the values before it. Comparisons give 0 or 1.
  LGD_INLINE void play(int64_t sample, double* values) const {
    for (int i = 0; i < count; ++i) {
      const Instruction& step = instructions[i];
      const double a = values[step.a], b = values[step.b];
      double& out = values[kGiven + i];
      switch (step.op) {
        case Op::constant:
          out = constants[step.a];
          break;
        case Op::number:
          out = numbers[step.a].at<double>(sample);
          break;
        case Op::add:
          out = a + b;
          break;
        case Op::subtract:
          out = a - b;
          break;
        case Op::multiply:
          out = a * b;
          break;
        case Op::divide:
          out = a / b;
          break;
        case Op::power:
          out = std::pow(a, b);
          break;
        case Op::equal:
          out = a == b;
          break;
        case Op::unequal:
          out = a != b;
          break;
        case Op::greater:
          out = a > b;
          break;
        case Op::greater_equal:
          out = a >= b;
          break;
        case Op::less:
          out = a < b;
          break;
        case Op::less_equal:
          out = a <= b;
          break;
        case Op::both:
          out = a != 0 && b != 0;
          break;
        case Op::either:
          out = a != 0 || b != 0;
          break;
        case Op::larger:
          out = a < b ? b : a;
          break;  // a NaN in a stays
        case Op::smaller:
          out = a > b ? b : a;
          break;
        case Op::root:
          out = std::sqrt(a);
          break;
        case Op::exponential:
          out = std::exp(a);
          break;
        case Op::logarithm:
          out = std::log(a);
          break;
        case Op::magnitude:
          out = std::fabs(a);
          break;
        case Op::negative:
          out = -a;
          break;
        case Op::choose:
          out = a != 0 ? b : values[step.c];
          break;
      }
    }
  }
};

}  // namespace lgd
