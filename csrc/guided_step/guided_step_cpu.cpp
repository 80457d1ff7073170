#include "../common/loops.h"
#include "../common/philox_cpu.h"
#include "guided_step.h"

namespace lgd {
namespace {

template <class S>
LGD_CLONES void step(S* out, const S* x, const S* cond, const S* uncond, S a, S b, S omega, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = a * x[i] + b * (cond[i] + omega * (cond[i] - uncond[i]));
}

template <class S, class Z>
LGD_CLONES void noisy_step(S* out, const S* x, const S* cond, const S* uncond, const Z* z, S a, S b, S v, S omega,
                           int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = a * x[i] + b * (cond[i] + omega * (cond[i] - uncond[i])) + v * S(z[i]);
}

// Computed in double, rounded once.
template <class S>
struct Coefficients {
  S x, guided, noise, omega;

  Coefficients(const StepScalars& scalars, int64_t sample) {
    const double churn = scalars.churn.at<double>(sample);
    const auto step = step_coefficients<double>(scalars.levels, sample, scalars.prediction, churn);
    x = S(step.x);
    guided = S(step.guided);
    noise = S(step.noise);
    omega = S(scalars.omega.at<double>(sample));
  }
};

}  // namespace

template <class S>
void guided_step(const GuidedStep& op, int64_t sample, int64_t first, int64_t last) {
  alignas(64) S buffers[5][kBlock];
  alignas(64) float drawn[kBlock];
  const Coefficients<S> k(op.scalars, sample);
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t count = last - at < kBlock ? last - at : kBlock;
    S* out = open_block(op.x_s, sample, at, buffers[0]);
    const S* x = read_block(op.x, sample, at, count, buffers[1]);
    const S* cond = read_block(op.cond, sample, at, count, buffers[2]);
    const S* uncond = read_block(op.uncond, sample, at, count, buffers[3]);
    if (op.draws) {
      philox_fill(drawn, count, at, op.seed, sample, kStreamStep);
      noisy_step(out, x, cond, uncond, drawn, k.x, k.guided, k.noise, k.omega, count);
    } else if (op.noise.data) {
      const S* z = read_block(op.noise, sample, at, count, buffers[4]);
      noisy_step(out, x, cond, uncond, z, k.x, k.guided, k.noise, k.omega, count);
    } else {
      step(out, x, cond, uncond, k.x, k.guided, k.omega, count);
    }
    write_block(op.x_s, sample, at, count, out);
  }
}

template <class S>
double guided_step_backward(const GuidedStepBackward& op, int64_t sample, int64_t first, int64_t last) {
  alignas(64) S buffers[4][kBlock];
  const Coefficients<S> k(op.scalars, sample);
  const Rows* gradients[] = {&op.d_x, &op.d_cond, &op.d_uncond, &op.d_noise};
  const S factors[] = {k.x, k.guided * (1 + k.omega), -k.guided * k.omega, k.noise};
  double sum = 0;
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t count = last - at < kBlock ? last - at : kBlock;
    const S* upstream = read_block(op.d_x_s, sample, at, count, buffers[0]);
    if (op.cond.data)
      sum += dot_difference(upstream, read_block(op.cond, sample, at, count, buffers[1]),
                            read_block(op.uncond, sample, at, count, buffers[2]), count);
    for (int i = 0; i < 4; ++i) {
      if (!gradients[i]->data) continue;
      S* out = open_block(*gradients[i], sample, at, buffers[3]);
      scale(out, upstream, factors[i], count);
      write_block(*gradients[i], sample, at, count, out);
    }
  }
  return k.guided * sum;
}

template void guided_step<float>(const GuidedStep&, int64_t, int64_t, int64_t);
template void guided_step<double>(const GuidedStep&, int64_t, int64_t, int64_t);
template double guided_step_backward<float>(const GuidedStepBackward&, int64_t, int64_t, int64_t);
template double guided_step_backward<double>(const GuidedStepBackward&, int64_t, int64_t, int64_t);

}  // namespace lgd
