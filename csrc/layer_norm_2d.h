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

// For the `count` pixels of a panel: from the gradient dy of the result to that of x, which becomes the normalised x z:
// dx = rstd * (g - mean(g) - z * mean(g * z)) with g = dy * weight. dweight += dy * z, dbias += dy, both [channels, LANES]:
// narrow vectors take the lanes in turn, so that their chains of additions are no longer than those of wide ones.
inline void normalise_backward(
    float* dy, float* x, int64_t channels, int64_t count, const float* weight, const vec (&mean)[STEPS],
    const vec (&rstd)[STEPS], float* dweight, float* dbias) {
  for (int s = 0; s * WIDTH < count; s++) {
    vec mean_g{}, mean_gz{};
    for (int64_t c = 0; c < channels; c++) {
      float *d = dy + c * PANEL + s * WIDTH, *z = x + c * PANEL + s * WIDTH;
      const vec normed = (load(z) - mean[s]) * rstd[s];
      store(z, normed);
      const int64_t lane = c * LANES + s * WIDTH % LANES;
      store(dweight + lane, load(dweight + lane) + load(d) * normed);
      store(dbias + lane, load(dbias + lane) + load(d));
      const vec g = load(d) * weight[c];
      store(d, g);
      mean_g += g;
      mean_gz += g * normed;
    }
    mean_g /= (float)channels;
    mean_gz /= (float)channels;
    for (int64_t c = 0; c < channels; c++) {
      float *d = dy + c * PANEL + s * WIDTH, *z = x + c * PANEL + s * WIDTH;
      store(d, rstd[s] * (load(d) - mean_g - load(z) * mean_gz));
    }
  }
}

template <class T>
void layer_norm_2d_backward(
    const LayerNorm2dBackward<T>& op, int64_t n, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t channels = op.x.channels;
  float *dy = scratch, *x = dy + channels * PANEL, *dweight = x + channels * PANEL, *dbias = dweight + channels * LANES;
  for (int64_t i = 0; i < 2 * channels * LANES; i += WIDTH) store(dweight + i, vec{});
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, op.x.pixels - first);
    fill(op.dy, n, first, count, dy);
    fill(op.x, n, first, count, x);
    vec mean[STEPS] = {}, rstd[STEPS] = {};  // 0 behind the last pixel
    for (int s = 0; s * WIDTH < count; s++) {
      const int64_t at = n * op.x.pixels + first + s * WIDTH;
      mean[s] = load_upto(op.mean + at, count - s * WIDTH);
      rstd[s] = load_upto(op.rstd + at, count - s * WIDTH);
    }
    normalise_backward(dy, x, channels, count, op.weight, mean, rstd, dweight, dbias);
    spill(dy, op.dx, n, first, count);
  }
  for (int64_t c = 0; c < channels; c++) {
    sums[c] = sum_lanes(dweight + c * LANES);
    sums[channels + c] = sum_lanes(dbias + c * LANES);
  }
}

}  // namespace r2r::R2R_ISA
