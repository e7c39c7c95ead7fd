// The gradients of naf_block, from its input and what the forward pass kept: stages `hidden` and `gated` are made again, and
// each is taken back. A stage has the name of what it writes; hidden is what conv1 makes. If it was kept, so was all else
// of NAFBlockKept.
#pragma once

#include "naf_block.h"

namespace r2r {

// Matrices that pixels are multiplied with. The transposed ones carry gradients back: conv3's is scaled by beta, conv5's by
// gamma.
template <class F>
struct NAFBlockProducts {
  Parameters<const F> matrices;    // [outputs, inputs]
  Parameters<const F> transposed;  // [inputs, outputs]
};

// In the feed-forward branch alone y is x, and there is no hidden, gated, dy and dhidden.
template <class T>
struct NAFBlockBackward {
  Parameters<const float> weights;  // where pairs are multiplied, without conv1's and conv4's
  NAFBlockProducts<float> products;
  NAFBlockProducts<T> in_pairs;
  bool pairs;          // products are of pairs, with `in_pairs`; `products` are empty
  Images<const T> dz;  // the gradient of the result
  Images<const T> x;
  Images<T> dx;
  NAFBlockKept<T> kept;
  T* hidden;   // [N, 2 * channels, pixels]
  T* gated;    // [N, channels, pixels]
  T* dy;       // [N, channels, pixels]
  T* dhidden;  // [N, 2 * channels, pixels]
  float eps;
};

// How many panels a stage of the backward takes at a time. They should fit the second-level cache, and a plane should be
// read in long runs.
constexpr int64_t MOST_BACKWARD_PANELS = 16;
static inline int64_t backward_panels(int64_t channels) {
  const int64_t fitting = 256 / channels;
  return fitting < 2 ? 2 : fitting > MOST_BACKWARD_PANELS ? MOST_BACKWARD_PANELS : fitting;
}

static inline int64_t padded(int64_t channels) {
  return (channels + LANES - 1) / LANES * LANES;
}

// The kernels take panels [begin, end) of image n. They add sums over pixels to `sums`. For the weight of a 1x1 convolution
// that is [outputs, padded(inputs)]: products of the gradient of its output with its input, without the scale (beta, gamma)
// of the output. For the other parameters it is [values, LANES].
template <class T>
struct NAFBlockBackwardKernels {
  // Norm and conv1: x to op.hidden.
  void (*hidden)(const NAFBlockBackward<T>&, int64_t n, int64_t begin, int64_t end);
  // Stage `result` made again and taken back: op.dz to op.dy. op.gated becomes the gradient of gated * attention; dattention
  // [channels] is the gradient of attention from these panels. Without attention (nullptr): op.dz to op.dx.
  void (*result_backward)(
      const NAFBlockBackward<T>&, int64_t n, const float* attention, int64_t begin, int64_t end, float* dattention,
      const Parameters<float>& sums);
  // Conv1 and norm taken back: op.dhidden and op.dy to op.dx.
  void (*hidden_backward)(const NAFBlockBackward<T>&, int64_t n, int64_t begin, int64_t end, const Parameters<float>& sums);
  // Rows [begin, end) of a matrix [rows, columns], each times its scale (nullptr: 1), as columns of to [columns, rows].
  void (*transpose)(const T* matrix, const float* scale, int64_t rows, int64_t columns, int64_t begin, int64_t end, T* to);
};
R2R_DECLARE_KERNELS(NAFBlockBackwardKernels)

}  // namespace r2r
