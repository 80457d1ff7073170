// One problem of two sets of at most a tile each, of many dimensions. Only one stretch of coordinates is packed at a
// time, once for the squares and once for the gradients: whole tiles of two points would take 32 times the memory of
// the data. The caller owns the memory.
#pragma once
#include "rounds.h"

namespace lgd {

constexpr int64_t kLong = 16384;  // with more dimensions, few points are not packed at once

// Memory that begins at a cache line.
template <class S>
struct FewPointsMemory {
  alignas(64) S packed[2][kStretch * kMmdTile];
  alignas(64) double gradients[2][kStretch * kMmdTile];
  alignas(64) S squares[3][kMmdTile * kMmdTile];  // of each term
  alignas(64) S own[3][kMmdTile];
};

template <class S>
struct FewPoints {
  const MmdKernel& kernel;
  const TiledSet<S>* sets[2];
  S* to[2];  // [count, dimension]: where the gradients go, or null
  FewPointsMemory<S>& memory;
  int terms = 0;

  // A sum over the pairs of sets a and b. With `itself` half of the pairs of a point with itself count, too.
  struct Term {
    int a, b;
    double coefficient;
    bool itself;
  } of[3] = {};

  void add(const Term& term) {
    if (term.coefficient == 0) return;
    std::fill_n(memory.own[terms], kMmdTile, S(0));
    of[terms++] = term;
  }

  // Returns the sum of all terms. stops(): whether the call is to stop.
  template <class Stops>
  double run(const Stops& stops) {
    for_stretches(stops, [&](int64_t first, int64_t some) {
      for (int t = 0; t < terms; ++t) {
        const S *a = memory.packed[of[t].a], *b = memory.packed[of[t].b];
        mmd_squares(kernel, pairs(of[t]), a, b, some, first > 0, memory.squares[t]);
        if (of[t].itself) mmd_own_squares(kernel, a, some, memory.own[t]);
      }
    });
    double loss = 0;
    for (int t = 0; t < terms; ++t) {
      const S *p = sets[of[t].a]->weights, *q = sets[of[t].b]->weights;
      double sum = mmd_values(kernel, pairs(of[t]), p, q, to[0] || to[1], memory.squares[t]);
      if (of[t].itself) sum += mmd_own_values(kernel, p, memory.own[t]) / 2;
      loss += of[t].coefficient * sum;
    }
    if (!to[0] && !to[1]) return loss;
    for_stretches(stops, [&](int64_t first, int64_t some) {
      double* turns[2] = {};
      for (int set = 0; set < 2; ++set)
        if (to[set]) {
          turns[set] = memory.gradients[set];
          std::fill_n(turns[set], some * kMmdTile, 0.0);
        }
      for (int t = 0; t < terms; ++t) {
        const Term& term = of[t];
        const S *a = memory.packed[term.a], *b = memory.packed[term.b], *p = sets[term.a]->weights;
        double *d_a = turns[term.a], *d_b = turns[term.b];
        mmd_gradients(kernel, pairs(term), a, b, some, memory.squares[t], term.coefficient, d_a, d_b);
        if (term.itself) mmd_own_gradients(kernel, a, some, p, memory.own[t], term.coefficient / 2, d_a);
      }
      for (int set = 0; set < 2; ++set)
        if (to[set]) mmd_unpack(turns[set], sets[set]->count, sets[set]->dimension, 0, first, some, to[set]);
    });
    return loss;
  }

 private:
  TilePairs pairs(const Term& term) const {
    return TilePairs(sets[term.a]->count, sets[term.b]->count, term.a == term.b);
  }

  // work(first, count) for each stretch, with its coordinates in `packed`.
  template <class Stops, class Work>
  void for_stretches(const Stops& stops, const Work& work) {
    const int64_t dimension = sets[0]->dimension;
    for (int64_t first = 0; first < dimension && !stops(); first += kStretch) {
      const int64_t some = std::min(kStretch, dimension - first);
      for (int set = 0; set < 2; ++set)
        mmd_pack(sets[set]->rows, sets[set]->count, dimension, 0, first, some, memory.packed[set]);
      work(first, some);
    }
  }
};

}  // namespace lgd
