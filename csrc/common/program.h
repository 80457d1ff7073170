// The program of a guidance rule: arithmetic on the numbers of one sample, in double. lgd_kernels/guidance/program.py
// records it.
#pragma once
#include <cmath>

#include "scalar.h"

namespace lgd {

enum class Op : int {  // in the order of OPS in lgd_kernels/guidance/program.py
  constant,
  number,
  add,
  sub,
  mul,
  div,
  pow,
  eq,
  ne,
  gt,
  ge,
  lt,
  le,
  and_,
  or_,
  max,
  min,
  sqrt,
  exp,
  log,
  abs,
  neg,
  where,
};

struct Instruction {
  Op op;
  int a, b, c;  // places of values; of a constant or a number, where it is among those
};

// A program starts with the moments of c, u and D, in the order of `PairMoments` in lgd_kernels/guidance/rules.py: nine
// products, row by row, and three sums; then nine products of deviations from the means.
constexpr int kPlainMoments = 12, kAllMoments = 21;
constexpr int kMostValues = 256;

struct Program {
  Instruction instructions[kMostValues - kAllMoments];
  int count;
  double constants[kMostValues];
  PerSample numbers[kMostValues];

  // Sets values[kAllMoments + i] to the result of instruction i, which reads values before it. A comparison gives 0
  // or 1.
  LGD_INLINE void run(int64_t sample, double* values) const {
    for (int i = 0; i < count; ++i) {
      const Instruction& step = instructions[i];
      const double a = values[step.a], b = values[step.b];
      double& out = values[kAllMoments + i];
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
        case Op::sub:
          out = a - b;
          break;
        case Op::mul:
          out = a * b;
          break;
        case Op::div:
          out = a / b;
          break;
        case Op::pow:
          out = std::pow(a, b);
          break;
        case Op::eq:
          out = a == b;
          break;
        case Op::ne:
          out = a != b;
          break;
        case Op::gt:
          out = a > b;
          break;
        case Op::ge:
          out = a >= b;
          break;
        case Op::lt:
          out = a < b;
          break;
        case Op::le:
          out = a <= b;
          break;
        case Op::and_:
          out = a != 0 && b != 0;
          break;
        case Op::or_:
          out = a != 0 || b != 0;
          break;
        case Op::max:
          out = a < b ? b : a;
          break;  // a NaN in `a` stays
        case Op::min:
          out = a > b ? b : a;
          break;
        case Op::sqrt:
          out = std::sqrt(a);
          break;
        case Op::exp:
          out = std::exp(a);
          break;
        case Op::log:
          out = std::log(a);
          break;
        case Op::abs:
          out = std::fabs(a);
          break;
        case Op::neg:
          out = -a;
          break;
        case Op::where:
          out = a != 0 ? b : values[step.c];
          break;
      }
    }
  }
};

}  // namespace lgd
