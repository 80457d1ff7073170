#include "loops.h"

namespace lgd {
namespace {

template <class S>
LGD_CLONES S dot_loop(const S* a, const S* b, int64_t count) {
  return sum<S>(count, [](S a, S b) LGD_LAMBDA { return a * b; }, a, b);
}

template <class S>
LGD_CLONES S total_loop(const S* a, int64_t count) {
  return sum<S>(count, [](S a) LGD_LAMBDA { return a; }, a);
}

template <class E, class S>
LGD_CLONES void scale_loop(E* out, const E* in, S factor, int64_t count) {
  map<S>(out, count, [=](S value) LGD_LAMBDA { return factor * value; }, in);
}

template <class S, class E>
LGD_CLONES S dot_difference_loop(const E* upstream, const E* cond, const E* uncond, int64_t count) {
  const auto term = [](S d, S c, S u) LGD_LAMBDA { return d * (c - u); };
  return sum<S>(count, term, upstream, cond, uncond);
}

}  // namespace

template <class S>
S dot(const S* a, const S* b, int64_t count) {
  return dot_loop(a, b, count);
}

template <class S>
S total(const S* a, int64_t count) {
  return total_loop(a, count);
}

template <class E, class S>
void scale(E* out, const E* in, S factor, int64_t count) {
  scale_loop(out, in, factor, count);
}

template <class S, class E>
S dot_difference(const E* upstream, const E* cond, const E* uncond, int64_t count) {
  return dot_difference_loop<S>(upstream, cond, uncond, count);
}

template float dot(const float*, const float*, int64_t);
template double dot(const double*, const double*, int64_t);
template float total(const float*, int64_t);
template double total(const double*, int64_t);
#define LGD_INSTANTIATE(E, S)                    \
  template void scale(E*, const E*, S, int64_t); \
  template S dot_difference(const E*, const E*, const E*, int64_t);
LGD_INSTANTIATE(float, float)
LGD_INSTANTIATE(double, double)
LGD_INSTANTIATE(bf16, float)
#undef LGD_INSTANTIATE

}  // namespace lgd
