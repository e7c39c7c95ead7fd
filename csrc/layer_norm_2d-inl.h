// layer_norm_2d: panel by panel; x is read once, y is written once.
#include "common/panel-inl.h"
#include "layer_norm_2d.h"

namespace r2r::R2R_ISA {

template <class T>
void layer_norm_2d(const LayerNorm2d<T>& op, int64_t n, int64_t begin, int64_t end) {
  const int64_t channels = op.x.channels;
  const auto [panel] = scratch_parts(channels * PANEL);
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, op.x.pixels - first);
    load_panel(op.x, n, first, count, panel);
    vec mean[STEPS], rstd[STEPS];
    statistics(panel, channels, op.eps, mean, rstd);
    normalise(panel, panel, channels, op.weight, op.bias, mean, rstd);
    store_panel(panel, op.y, n, first, count);
    for (int s = 0; s * WIDTH < count; s++) {
      const int64_t at = n * op.x.pixels + first + s * WIDTH;
      store_upto(op.mean + at, mean[s], count - s * WIDTH);
      store_upto(op.rstd + at, rstd[s], count - s * WIDTH);
    }
  }
}

template <class T>
void layer_norm_2d_backward(const LayerNorm2dBackward<T>& op, int64_t n, int64_t begin, int64_t end, float* sums) {
  const int64_t channels = op.x.channels;
  const auto [dy, x, dweight, dbias] = scratch_parts(channels * PANEL, channels * PANEL, channels * LANES, channels * LANES);
  for (int64_t i = 0; i < 2 * channels * LANES; i += WIDTH) store(dweight + i, vec{});  // and dbias, behind it
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, op.x.pixels - first);
    load_panel(op.dy, n, first, count, dy);
    load_panel(op.x, n, first, count, x);
    vec mean[STEPS] = {}, rstd[STEPS] = {};  // 0 behind the last pixel
    for (int s = 0; s * WIDTH < count; s++) {
      const int64_t at = n * op.x.pixels + first + s * WIDTH;
      mean[s] = load_upto(op.mean + at, count - s * WIDTH);
      rstd[s] = load_upto(op.rstd + at, count - s * WIDTH);
    }
    normalise_backward(dy, x, channels, count, op.weight, mean, rstd, dweight, dbias);
    store_panel(dy, op.dx, n, first, count);
  }
  for (int64_t c = 0; c < channels; c++) {
    sums[c] = sum_lanes(dweight + c * LANES);
    sums[channels + c] = sum_lanes(dbias + c * LANES);
  }
}

template <class T>
constexpr LayerNorm2dKernels<T> layer_norm_2d_kernels{
    .forward = layer_norm_2d<T>,
    .backward = layer_norm_2d_backward<T>,
};
R2R_DEFINE_KERNELS(LayerNorm2dKernels, layer_norm_2d_kernels)

}  // namespace r2r::R2R_ISA
