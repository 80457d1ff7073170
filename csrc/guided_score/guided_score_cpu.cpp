#include "../common/loops.h"
#include "guided_score.h"

namespace lgd {
namespace {

template <class S>
LGD_CLONES void guide(S* out, const S* cond, const S* uncond, S omega, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = cond[i] + omega * (cond[i] - uncond[i]);
}

}  // namespace

template <class S>
void guided_score(const GuidedScore& op, int64_t sample, int64_t first, int64_t last) {
  alignas(64) S buffers[3][kBlock];
  const S omega = S(op.omega.at<double>(sample));
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t count = last - at < kBlock ? last - at : kBlock;
    S* out = open_block(op.guided, sample, at, buffers[0]);
    guide(out, read_block(op.cond, sample, at, count, buffers[1]), read_block(op.uncond, sample, at, count, buffers[2]),
          omega, count);
    write_block(op.guided, sample, at, count, out);
  }
}

template <class S>
double guided_score_backward(const GuidedScoreBackward& op, int64_t sample, int64_t first, int64_t last) {
  alignas(64) S buffers[4][kBlock];
  const S omega = S(op.omega.at<double>(sample));
  double sum = 0;
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t count = last - at < kBlock ? last - at : kBlock;
    const S* upstream = read_block(op.d_guided, sample, at, count, buffers[0]);
    if (op.cond.data)
      sum += dot_difference(upstream, read_block(op.cond, sample, at, count, buffers[1]),
                            read_block(op.uncond, sample, at, count, buffers[2]), count);
    const Rows* gradients[] = {&op.d_cond, &op.d_uncond};
    const S factors[] = {1 + omega, -omega};
    for (int i = 0; i < 2; ++i) {
      if (!gradients[i]->data) continue;
      S* out = open_block(*gradients[i], sample, at, buffers[3]);
      scale(out, upstream, factors[i], count);
      write_block(*gradients[i], sample, at, count, out);
    }
  }
  return sum;
}

template void guided_score<float>(const GuidedScore&, int64_t, int64_t, int64_t);
template void guided_score<double>(const GuidedScore&, int64_t, int64_t, int64_t);
template double guided_score_backward<float>(const GuidedScoreBackward&, int64_t, int64_t, int64_t);
template double guided_score_backward<double>(const GuidedScoreBackward&, int64_t, int64_t, int64_t);

}  // namespace lgd
