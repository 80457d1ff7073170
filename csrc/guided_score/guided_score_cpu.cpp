#include <algorithm>

#include "../common/loops.h"
#include "guided_score.h"

namespace lgd {
namespace {

template <class E, class S>
LGD_CLONES void guide(E* out, const E* cond, const E* uncond, S omega, int64_t count) {
  map<S>(out, count, [=](S c, S u) LGD_LAMBDA { return c + omega * (c - u); }, cond, uncond);
}

template <class E, class S>
void score_blocks(const GuidedScore& op, S omega, int64_t sample, int64_t first, int64_t last) {
  alignas(64) E buffers[3][kBlock];
  const int64_t block = block_size<E>(op.guided, op.cond, op.uncond);
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    E* out = open_block(op.guided, sample, at, buffers[0]);
    guide(out, read_block(op.cond, sample, at, count, buffers[1]), read_block(op.uncond, sample, at, count, buffers[2]),
          omega, count);
    write_block(op.guided, sample, at, count, out);
  }
}

// Returns the part of d_omega.
template <class E, class S>
double backward_blocks(const GuidedScoreBackward& op, S omega, int64_t sample, int64_t first, int64_t last) {
  alignas(64) E buffers[4][kBlock];
  const int64_t block = block_size<E>(op.d_guided, op.cond, op.uncond, op.d_cond, op.d_uncond);
  double sum = 0;
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    const E* upstream = read_block(op.d_guided, sample, at, count, buffers[0]);
    if (op.cond.data)
      sum += dot_difference<S>(upstream, read_block(op.cond, sample, at, count, buffers[1]),
                               read_block(op.uncond, sample, at, count, buffers[2]), count);
    const Rows* gradients[] = {&op.d_cond, &op.d_uncond};
    const S factors[] = {1 + omega, -omega};
    for (int i = 0; i < 2; ++i) {
      if (!gradients[i]->data) continue;
      E* out = open_block(*gradients[i], sample, at, buffers[3]);
      scale(out, upstream, factors[i], count);
      write_block(*gradients[i], sample, at, count, out);
    }
  }
  return sum;
}

}  // namespace

template <class S>
void guided_score(const GuidedScore& op, int64_t sample, int64_t first, int64_t last) {
  const S omega = S(op.omega.at<double>(sample));
  with_elements<S>([&](auto element) { score_blocks<decltype(element)>(op, omega, sample, first, last); }, op.guided,
                   op.cond, op.uncond);
}

template <class S>
double guided_score_backward(const GuidedScoreBackward& op, int64_t sample, int64_t first, int64_t last) {
  const S omega = S(op.omega.at<double>(sample));
  return with_elements<S>(
      [&](auto element) { return backward_blocks<decltype(element)>(op, omega, sample, first, last); }, op.d_guided,
      op.cond, op.uncond, op.d_cond, op.d_uncond);
}

template void guided_score<float>(const GuidedScore&, int64_t, int64_t, int64_t);
template void guided_score<double>(const GuidedScore&, int64_t, int64_t, int64_t);
template double guided_score_backward<float>(const GuidedScoreBackward&, int64_t, int64_t, int64_t);
template double guided_score_backward<double>(const GuidedScoreBackward&, int64_t, int64_t, int64_t);

}  // namespace lgd
