// depthwise_gate: a 3x3 depthwise convolution, the product of its two halves, and the mean of that.
#pragma once

#include "common/dispatch.h"
#include "common/tiling.h"

namespace r2r {

// A 3x3 depthwise convolution of 2 * channels planes, gated to `channels` planes of height x width.
struct Depthwise {
  const float* weight;  // [2 * channels, 9]
  const float* bias;    // [2 * channels]
  int64_t channels;
  int64_t height;
  int64_t width;
};

template <class T>
struct DepthwiseGateKernels {
  // Channel c of the gated planes of one image, rows of the tile: x [2 * channels, pixels]. Returns the sum of what it
  // wrote.
  float (*planes)(const Depthwise&, const T* x, T* gated, int64_t c, const Tile&);
  // Rows [top, bottom) of one image, channels_last: x [pixels, 2 * channels], taps [9, 2 * channels]. sums [channels] gets
  // the sums of what it wrote.
  void (*rows)(const Depthwise&, const float* taps, const T* x, T* gated, int64_t top, int64_t bottom, float* sums);
};
R2R_DECLARE_KERNELS(DepthwiseGateKernels)

// The driver for NCHW on raw memory, which naf_block_backward also calls: x [images, 2 * channels, pixels], mean
// [images, channels].
template <class T>
void depthwise_gates(const Depthwise& op, int64_t images, const T* x, T* gated, float* mean);

}  // namespace r2r
