// omega and the coefficients of a step, from a sample's time and condition, as in lgd_kernels/runtime/levels.py. S is
// the arithmetic type: double on the CPU.
#pragma once
#include <cmath>
#include <cstdint>

#include "scalar.h"

namespace lgd {

enum class Prediction : int { x0, eps, v, flow };

// omega[c, s, t], bilinear between sorted knots and clamped outside.
struct OmegaTable {
  const void* values;  // [conditions, rows, columns]; null: there is no table
  DType values_dtype;
  int64_t conditions, rows, columns;
  const void *s_knots, *t_knots;  // [rows], [columns]
  DType knots_dtype;
  const int64_t* c;  // [B] each
  const void *s, *t;
  DType times_dtype;
};

// The knot at or left of `at`, and the weight of its right neighbour.
template <class S>
LGD_INLINE int64_t table_bracket(const void* knots, DType dtype, int64_t count, S at, S& weight) {
  int64_t left = 0;
  while (left + 2 < count && load_scalar<S>(knots, dtype, left + 1) <= at) ++left;
  weight = at == at ? S(0) : at;  // NaN stays NaN
  if (count > 1) {
    const S low = load_scalar<S>(knots, dtype, left), high = load_scalar<S>(knots, dtype, left + 1);
    weight = (at - low) / (high - low);
    weight = weight < 0 ? S(0) : weight > 1 ? S(1) : weight;
  }
  return left;
}

// A corner with s >= t holds no step: the last row before the diagonal of its column replaces it, and the first column
// with such a row replaces a column without one.
template <class S>
LGD_INLINE int64_t table_cell(const OmegaTable& table, int64_t c, int64_t row, int64_t column) {
  row = row < table.rows ? row : table.rows - 1;
  column = column < table.columns ? column : table.columns - 1;
  const S first_s = load_scalar<S>(table.s_knots, table.knots_dtype, 0);
  while (column + 1 < table.columns && load_scalar<S>(table.t_knots, table.knots_dtype, column) <= first_s) ++column;
  const S t = load_scalar<S>(table.t_knots, table.knots_dtype, column);
  while (row > 0 && load_scalar<S>(table.s_knots, table.knots_dtype, row) >= t) --row;
  return (c * table.rows + row) * table.columns + column;
}

// The cells around a sample's (s, t). There are none if its condition is unknown.
template <class S>
struct TableCells {
  bool known;
  int64_t cell[4];
  S weight[4];

  LGD_INLINE TableCells(const OmegaTable& table, int64_t sample) {
    const int64_t c = table.c[sample];
    known = c >= 0 && c < table.conditions;
    if (!known) return;
    S row_weight, column_weight;
    const S s = load_scalar<S>(table.s, table.times_dtype, sample);
    const S t = load_scalar<S>(table.t, table.times_dtype, sample);
    const int64_t row = table_bracket<S>(table.s_knots, table.knots_dtype, table.rows, s, row_weight);
    const int64_t column = table_bracket<S>(table.t_knots, table.knots_dtype, table.columns, t, column_weight);
    for (int i = 0; i < 4; ++i) {
      cell[i] = table_cell<S>(table, c, row + i / 2, column + i % 2);
      weight[i] = (i / 2 ? row_weight : 1 - row_weight) * (i % 2 ? column_weight : 1 - column_weight);
    }
  }
};

template <class S>
LGD_INLINE S table_omega(const OmegaTable& table, int64_t sample) {
  const TableCells<S> at(table, sample);
  if (!at.known) return S(NAN);
  S found = 0;
  for (int i = 0; i < 4; ++i) found += at.weight[i] * load_scalar<S>(table.values, table.values_dtype, at.cell[i]);
  return found;
}

struct Omega {
  PerSample per_sample;
  OmegaTable table;

  template <class S>
  LGD_INLINE S at(int64_t sample) const {
    return table.values ? table_omega<S>(table, sample) : per_sample.at<S>(sample);
  }
};

// Levels of B samples: signal_t, noise_t, signal_s, noise_s, gap.
struct Levels {
  const void* data[5];
  int64_t stride[5];
  DType dtype;

  template <class S>
  LGD_INLINE S at(int which, int64_t sample) const {
    return load_scalar<S>(data[which], dtype, sample * stride[which]);
  }
};

// x_s = x * x_t + guided * g + noise * z, g the guided prediction.
template <class S>
struct StepCoefficients {
  S x, guided, noise;
};

template <class S>
LGD_INLINE StepCoefficients<S> step_coefficients(const Levels& levels, int64_t sample, Prediction prediction, S churn) {
  const S signal_t = levels.at<S>(0, sample), noise_t = levels.at<S>(1, sample);
  const S signal_s = levels.at<S>(2, sample), noise_s = levels.at<S>(3, sample), gap = levels.at<S>(4, sample);
  const bool defined = gap >= 0 && churn >= 0 && churn <= 1 && (prediction != Prediction::eps || signal_t != 0);
  if (!defined) return {S(NAN), S(NAN), S(NAN)};

  const S q = gap == 0 ? S(0) : gap / (signal_s * noise_t);  // 0/0 at s = t = 0 and at s = t = 1
  const S ratio = noise_t == 0 ? S(1) : noise_s / noise_t;
  const S churned = churn * churn * q;
  const S to_x = ratio * (1 - churned);
  const S to_x0 = signal_s * (q + churned * (1 - q));
  const S noise = noise_s * root(churned * (2 - churned));

  S x0_of_x = 0, x0_of_g = 1;
  if (prediction == Prediction::eps) {
    x0_of_x = 1 / signal_t;
    x0_of_g = -noise_t / signal_t;
  } else if (prediction == Prediction::v) {
    const S square = signal_t * signal_t + noise_t * noise_t;
    x0_of_x = signal_t / square;
    x0_of_g = -noise_t / root(square);
  } else if (prediction == Prediction::flow) {
    x0_of_x = 1 / (signal_t + noise_t);
    x0_of_g = -noise_t / (signal_t + noise_t);
  }
  return {to_x + to_x0 * x0_of_x, to_x0 * x0_of_g, noise};
}

// All that a guided step needs of a sample.
struct StepScalars {
  Omega omega;
  Levels levels;
  Prediction prediction;
  PerSample churn;
};

// Computed in double, rounded once.
template <class S>
struct GuidedCoefficients {
  S x, guided, noise, omega;

  GuidedCoefficients(const StepScalars& scalars, int64_t sample) {
    const double churn = scalars.churn.at<double>(sample);
    const auto step = step_coefficients<double>(scalars.levels, sample, scalars.prediction, churn);
    x = S(step.x);
    guided = S(step.guided);
    noise = S(step.noise);
    omega = S(scalars.omega.at<double>(sample));
  }
};

}  // namespace lgd
