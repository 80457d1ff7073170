// Vectors of 32 bytes, as gcc's extension: each instruction set computes them with the registers that it has.
#pragma once
#include "scalar.h"

namespace lgd {

template <class S>
struct Vector {
  static constexpr int kLanes = 32 / sizeof(S);
  typedef S type __attribute__((vector_size(32)));
  typedef S unaligned __attribute__((vector_size(32), aligned(sizeof(S)), may_alias));
  typedef double wide __attribute__((vector_size(8 * kLanes)));
  typedef double wide_unaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
};

template <class S>
LGD_INLINE const typename Vector<S>::unaligned& load(const S* from) {
  return *reinterpret_cast<const typename Vector<S>::unaligned*>(from);
}
template <class S>
LGD_INLINE void store(S* to, const typename Vector<S>::type& lanes) {
  *reinterpret_cast<typename Vector<S>::unaligned*>(to) = lanes;
}

}  // namespace lgd
