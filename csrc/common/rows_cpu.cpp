#include "rows.h"

namespace lgd {
namespace {

template <class T, class S>
LGD_CLONES void widen(const T* __restrict in, S* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = S(to_float(in[i]));
}

template <class T, class S>
LGD_CLONES void round_to(const S* __restrict in, T* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(float(in[i]));
}

}  // namespace

template <class S>
const S* read_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, S* buffer) {
  if (rows.dtype == dtype_of<S>()) return rows.at<S>(sample, first);
  switch (rows.dtype) {
    case DType::bf16:
      widen(rows.at<bf16>(sample, first), buffer, count);
      break;
    case DType::f16:
      widen(rows.at<f16>(sample, first), buffer, count);
      break;
    case DType::f32:
      widen(rows.at<float>(sample, first), buffer, count);
      break;
    case DType::f64:
      widen(rows.at<double>(sample, first), buffer, count);
  }
  return buffer;
}

template <class S>
void write_block(const Rows& rows, int64_t sample, int64_t first, int64_t count, const S* block) {
  if (rows.dtype == dtype_of<S>()) return;
  switch (rows.dtype) {
    case DType::bf16:
      round_to(block, rows.at<bf16>(sample, first), count);
      break;
    case DType::f16:
      round_to(block, rows.at<f16>(sample, first), count);
      break;
    case DType::f32:
      round_to(block, rows.at<float>(sample, first), count);
      break;
    case DType::f64:
      round_to(block, rows.at<double>(sample, first), count);
  }
}

template const float* read_block(const Rows&, int64_t, int64_t, int64_t, float*);
template const double* read_block(const Rows&, int64_t, int64_t, int64_t, double*);
template void write_block(const Rows&, int64_t, int64_t, int64_t, const float*);
template void write_block(const Rows&, int64_t, int64_t, int64_t, const double*);

}  // namespace lgd
