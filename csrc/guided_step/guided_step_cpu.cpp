#include <algorithm>

#include "../common/loops.h"
#include "../common/philox_cpu.h"
#include "guided_step.h"

namespace lgd {
namespace {

template <class E, class S>
LGD_CLONES void step(E* out, const E* x, const E* cond, const E* uncond, S a, S b, S omega, int64_t count) {
  const auto body = [=](S x, S c, S u) LGD_LAMBDA { return a * x + b * (c + omega * (c - u)); };
  map<S>(out, count, body, x, cond, uncond);
}

template <class E, class Z, class S>
LGD_CLONES void noisy_step(E* out, const E* x, const E* cond, const E* uncond, const Z* z, S a, S b, S v, S omega,
                           int64_t count) {
  const auto body = [=](S x, S c, S u, S z) LGD_LAMBDA { return a * x + b * (c + omega * (c - u)) + v * z; };
  map<S>(out, count, body, x, cond, uncond, z);
}

template <class E, class S>
void step_blocks(const GuidedStep& op, const GuidedCoefficients<S>& k, int64_t sample, int64_t first, int64_t last) {
  alignas(64) E buffers[5][kBlock];
  alignas(64) float drawn[kBlock];
  const int64_t block = op.draws ? kBlock : block_size<E>(op.x_s, op.x, op.cond, op.uncond, op.noise);
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    E* out = open_block(op.x_s, sample, at, buffers[0]);
    const E* x = read_block(op.x, sample, at, count, buffers[1]);
    const E* cond = read_block(op.cond, sample, at, count, buffers[2]);
    const E* uncond = read_block(op.uncond, sample, at, count, buffers[3]);
    if (op.draws) {
      philox_fill(drawn, count, at, op.seed.key(sample), op.seed.index(sample), kStreamStep);
      noisy_step(out, x, cond, uncond, drawn, k.x, k.guided, k.noise, k.omega, count);
    } else if (op.noise.data) {
      const E* z = read_block(op.noise, sample, at, count, buffers[4]);
      noisy_step(out, x, cond, uncond, z, k.x, k.guided, k.noise, k.omega, count);
    } else {
      step(out, x, cond, uncond, k.x, k.guided, k.omega, count);
    }
    write_block(op.x_s, sample, at, count, out);
  }
}

// Returns the part of d_omega.
template <class E, class S>
double backward_blocks(const GuidedStepBackward& op, const GuidedCoefficients<S>& k, int64_t sample, int64_t first,
                       int64_t last) {
  alignas(64) E buffers[4][kBlock];
  const Rows* gradients[] = {&op.d_x, &op.d_cond, &op.d_uncond, &op.d_noise};
  const S factors[] = {k.x, k.guided * (1 + k.omega), -k.guided * k.omega, k.noise};
  const int64_t block = block_size<E>(op.d_x_s, op.cond, op.uncond, op.d_x, op.d_cond, op.d_uncond, op.d_noise);
  double sum = 0;
  for (int64_t at = first; at < last; at += block) {
    const int64_t count = std::min(last - at, block);
    const E* upstream = read_block(op.d_x_s, sample, at, count, buffers[0]);
    if (op.cond.data)
      sum += dot_difference<S>(upstream, read_block(op.cond, sample, at, count, buffers[1]),
                               read_block(op.uncond, sample, at, count, buffers[2]), count);
    for (int i = 0; i < 4; ++i) {
      if (!gradients[i]->data) continue;
      E* out = open_block(*gradients[i], sample, at, buffers[3]);
      scale(out, upstream, factors[i], count);
      write_block(*gradients[i], sample, at, count, out);
    }
  }
  return k.guided * sum;
}

}  // namespace

template <class S>
void guided_step(const GuidedStep& op, int64_t sample, int64_t first, int64_t last) {
  const GuidedCoefficients<S> k(op.scalars, sample);
  with_elements<S>([&](auto element) { step_blocks<decltype(element)>(op, k, sample, first, last); }, op.x_s, op.x,
                   op.cond, op.uncond, op.noise);
}

template <class S>
double guided_step_backward(const GuidedStepBackward& op, int64_t sample, int64_t first, int64_t last) {
  const GuidedCoefficients<S> k(op.scalars, sample);
  return with_elements<S>([&](auto element) { return backward_blocks<decltype(element)>(op, k, sample, first, last); },
                          op.d_x_s, op.cond, op.uncond, op.d_x, op.d_cond, op.d_uncond, op.d_noise);
}

template void guided_step<float>(const GuidedStep&, int64_t, int64_t, int64_t);
template void guided_step<double>(const GuidedStep&, int64_t, int64_t, int64_t);
template double guided_step_backward<float>(const GuidedStepBackward&, int64_t, int64_t, int64_t);
template double guided_step_backward<double>(const GuidedStepBackward&, int64_t, int64_t, int64_t);

}  // namespace lgd
