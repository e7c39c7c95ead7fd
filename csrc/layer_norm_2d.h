// LayerNorm over channels and its backward: panels in, panels out; x is read once, y written once.
#pragma once

#include "panel.h"

namespace r2r::R2R_ISA {

template <class T>
void layer_norm_2d(const LayerNorm2d<T>& op, int64_t n, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, op.x.pixels - first);
    fill(op.x, n, first, count, scratch);
    vec mean[STEPS], rstd[STEPS];
    statistics(scratch, op.x.channels, op.eps, mean, rstd);
    normalise(scratch, scratch, op.x.channels, op.weight, op.bias, mean, rstd);
    spill(scratch, op.y, n, first, count);
    for (int s = 0; s * WIDTH < count; s++) {
      const int64_t at = n * op.x.pixels + first + s * WIDTH;
      store_upto(op.mean + at, mean[s], count - s * WIDTH);
      store_upto(op.rstd + at, rstd[s], count - s * WIDTH);
    }
  }
}

// dx = rstd * (g - mean(g) - z * mean(g * z)) with g = dy * weight and z the normalised x; dweight = sum(dy * z), dbias =
// sum(dy).
template <class T>
void layer_norm_2d_backward(
    const LayerNorm2dBackward<T>& op, int64_t n, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t channels = op.x.channels;
  float *dy = scratch, *z = dy + channels * PANEL, *dweight = z + channels * PANEL, *dbias = dweight + channels * WIDTH;
  for (int64_t c = 0; c < 2 * channels; c++) store(dweight + c * WIDTH, vec{});
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, op.x.pixels - first);
    fill(op.dy, n, first, count, dy);
    fill(op.x, n, first, count, z);
    for (int s = 0; s * WIDTH < count; s++) {
      const int64_t at = n * op.x.pixels + first + s * WIDTH;
      const vec mean = load_upto(op.mean + at, count - s * WIDTH), rstd = load_upto(op.rstd + at, count - s * WIDTH);
      vec mean_g{}, mean_gz{};
      for (int64_t c = 0; c < channels; c++) {
        float *d = dy + c * PANEL + s * WIDTH, *x = z + c * PANEL + s * WIDTH;
        const vec normed = (load(x) - mean) * rstd;  // 0 behind the last pixel, where rstd is read as 0
        store(x, normed);
        store(dweight + c * WIDTH, load(dweight + c * WIDTH) + load(d) * normed);
        store(dbias + c * WIDTH, load(dbias + c * WIDTH) + load(d));
        const vec g = load(d) * op.weight[c];
        store(d, g);
        mean_g += g;
        mean_gz += g * normed;
      }
      mean_g /= (float)channels;
      mean_gz /= (float)channels;
      for (int64_t c = 0; c < channels; c++) {
        float *d = dy + c * PANEL + s * WIDTH, *x = z + c * PANEL + s * WIDTH;
        store(d, rstd * (load(d) - mean_g - load(x) * mean_gz));
      }
    }
    spill(dy, op.dx, n, first, count);
  }
  for (int64_t c = 0; c < channels; c++) {
    sums[c] = sum(load(dweight + c * WIDTH));
    sums[channels + c] = sum(load(dbias + c * WIDTH));
  }
}

}  // namespace r2r::R2R_ISA
