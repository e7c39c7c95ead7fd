// Channel attention of a local block: gated features times the 1x1 convolution of their local mean, in place.
#pragma once

#include "panel.h"

namespace r2r::R2R_ISA {

template <class T>
void local_attention(const LocalAttention<T>& op, int64_t n, int64_t begin, int64_t end, float* scratch) {
  const int64_t channels = op.gated.channels, pixels = op.gated.pixels, groups = (channels + ROWS - 1) / ROWS;
  float *mean = scratch, *gated = mean + channels * PANEL, *attended = gated + channels * PANEL;
  const Images<const T> before{op.gated.data, channels, pixels, false};
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, pixels - first);
    fill(op.mean, n, first, count, mean);
    fill(before, n, first, count, gated);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t c = channels * g / groups, stop = channels * (g + 1) / groups, pairs = (stop - c + 1) / 2;
      const int64_t second = stop - pairs;  // an odd number of channels computes the middle one twice
      multiply_panel(
          pairs, op.weight + c * channels, op.weight + second * channels, channels, mean, count,
          [&](auto& sums, int step) __attribute__((always_inline)) {
            constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
            for (int m = 0; m < M; m++) {
              const int64_t o = m < M / 2 ? c + m : second + m - M / 2;
              for (int v = 0; v < V; v++) {
                const int64_t at = o * PANEL + (step + v) * WIDTH;
                store(attended + at, load(gated + at) * (sums[m][v] + op.bias[o]));
              }
            }
          });
    }
    spill(attended, op.gated, n, first, count);
  }
}

}  // namespace r2r::R2R_ISA
