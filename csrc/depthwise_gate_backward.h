// The gradient of depthwise_gate.
#pragma once

#include "depthwise_gate.h"

namespace r2r {

template <class T>
struct DepthwiseGateBackward {
  Depthwise conv;
  const T* dgated;
  const T* x;
  T* dx;
  const float* scale;  // [N, channels]: the gradient of what is gated is dgated * scale + shift; nullptr: 1
  const float* shift;  // [N, channels]
  bool channels_last;
};

template <class T>
struct DepthwiseGateBackwardKernels {
  // Channels [begin, end) of the gates of a tile of image n. Adds the sums for weight and bias to totals
  // [2 * channels, 10, LANES].
  void (*tile)(const DepthwiseGateBackward<T>&, int64_t n, const Tile&, int64_t begin, int64_t end, float* totals);
};
R2R_DECLARE_KERNELS(DepthwiseGateBackwardKernels)

// The driver on raw memory, which naf_block_backward also calls: writes dx, dweight [2 * channels, 9] and dbias [2 *
// channels].
template <class T>
void depthwise_gate_gradients(const DepthwiseGateBackward<T>& op, int64_t images, float* dweight, float* dbias);

}  // namespace r2r
