// Sums of columns about an origin, from which centred moments follow without loss of accuracy.
#pragma once
#include <algorithm>
#include <cmath>

#include "moments.h"

namespace lgd {

// Reads the first element of each column.
template <class S>
void first_elements(const Columns& read, int64_t sample, S* out) {
  S tensors[kMostTensors], buffer[1];
  for (int n = 0; n < read.tensor_count; ++n) {
    const Rows& rows = read.tensors[n];
    tensors[n] = rows.dtype == DType::bf16 ? S(to_float(*rows.at<bf16>(read.sample_of(n, sample), 0)))
                                           : *read_block(rows, read.sample_of(n, sample), 0, 1, buffer);
  }
  for (int k = 0; k < read.count; ++k) {
    const Column column = read.columns[k];
    out[k] = column.minus < 0 ? tensors[column.plus] : tensors[column.plus] - tensors[column.minus];
  }
}

// Sums of a part of a sample about the columns' origins. Elements are summed about `shifts`, near the means of the
// elements before, so that S loses no digits. Each time that there are four times as many elements, the sums are moved
// to the origins in double.
template <class S>
struct Centring {
  const int columns, sums;
  S origins[kMostTensors], shifts[kMostTensors];
  double held[kMostProducts];         // sums about the shifts, since the last move
  double about[kMostProducts];        // sums about the origins
  int64_t held_count = 0, count = 0;  // of their elements
  int64_t next = 0;                   // how many elements there are at the next move; 0: none was read yet
  static constexpr int64_t kGrowth = 4;

  Centring(const Columns& read, int64_t sample) : columns(read.count), sums(columns * (columns + 1)) {
    first_elements(read, sample, origins);
    std::copy_n(origins, columns, shifts);
    std::fill_n(held, sums, 0.0);
    std::fill_n(about, sums, 0.0);
  }

  bool begun() const { return next > 0; }
  // `held` has sums of the first elements about the origins. They give the first shifts; the elements are summed again.
  void begin(int64_t of) {
    choose_shifts(held, of);
    std::fill_n(held, sums, 0.0);
    next = kGrowth * of;
  }

  void add(int64_t more) {
    held_count += more;
    if (count + held_count < next) return;
    move();
    choose_shifts(about, count);
    next = kGrowth * count;
  }

  // With e = shift - origin and T the sums of a column, sum (x + e)(y + f) = sum x y + e T_y + f T_x + count e f.
  void move() {
    const double* totals = held + columns * columns;
    double apart[kMostTensors];
    for (int i = 0; i < columns; ++i) apart[i] = double(shifts[i]) - double(origins[i]);
    for (int i = 0; i < columns; ++i) {
      for (int j = i; j < columns; ++j)
        about[columns * i + j] +=
            held[columns * i + j] + apart[i] * totals[j] + apart[j] * totals[i] + held_count * apart[i] * apart[j];
      about[columns * columns + i] += totals[i] + held_count * apart[i];
    }
    count += held_count;
    held_count = 0;
    std::fill_n(held, sums, 0.0);
  }

  // The means, rounded to a multiple of a power of two that is at most the spread: deviations of half-precision values
  // then have few digits, and their products and sums are exact; and about a small mean nothing is subtracted.
  void choose_shifts(const double* from, int64_t of) {
    const double share = 1.0 / of;
    for (int i = 0; i < columns; ++i) {
      const double mean = from[columns * columns + i] * share, variance = from[columns * i + i] * share - mean * mean;
      double shift = origins[i] + mean;
      if (variance > 0x1p-900 && variance < 0x1p+900) {
        const int64_t exponent = int64_t(bits_as<uint64_t>(variance) >> 52) - 1023;
        const double step = 1.5 * bits_as<double>(uint64_t(1023 + 52 + (exponent >> 1)) << 52);  // ldexp, ilogb
        shift = (shift + step) - step;
      }
      shifts[i] = S(shift);
    }
  }
};

// Turns the sums of a whole sample of `count` elements about the origins into centred moments: products of columns less
// their means, and the means. A constant column has moments of exactly 0.
template <class S>
void centre(const Columns& read, int64_t sample, int64_t count, double* sums) {
  const int columns = read.count;
  double* totals = sums + columns * columns;
  S origins[kMostTensors];
  first_elements(read, sample, origins);
  for (int i = 0; i < columns; ++i)
    for (int j = i; j < columns; ++j) {
      double& value = sums[columns * i + j];
      const double square = value;
      value -= totals[i] * totals[j] / count;
      // The origin is an element, so a share below 1 / count can only be rounding: the column is constant.
      if (i == j && value <= 0x1p-48 * square) value = 0;
    }
  for (int i = 0; i < columns; ++i) {
    totals[i] = origins[i] + totals[i] / count;
    for (int j = i + 1; j < columns; ++j)
      if (sums[columns * i + i] == 0 || sums[columns * j + j] == 0) sums[columns * i + j] = 0;
  }
}

}  // namespace lgd
