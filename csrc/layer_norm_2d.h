// layer_norm_2d: LayerNorm over the channels of each pixel.
#pragma once

#include "common/dispatch.h"
#include "common/tiling.h"

namespace r2r {

template <class T>
struct LayerNorm2d {
  Images<const T> x;
  Images<T> y;
  const float* weight;
  const float* bias;
  float eps;
  float* mean;  // [N, pixels]
  float* rstd;
};

template <class T>
struct LayerNorm2dBackward {
  Images<const T> dy;
  Images<const T> x;
  Images<T> dx;
  const float* weight;
  const float* mean;
  const float* rstd;
};

template <class T>
struct LayerNorm2dKernels {
  // Panels [begin, end) of image n.
  void (*forward)(const LayerNorm2d<T>&, int64_t n, int64_t begin, int64_t end);
  // The same; sums [2, channels] gets these panels' gradients of the weight and of the bias.
  void (*backward)(const LayerNorm2dBackward<T>&, int64_t n, int64_t begin, int64_t end, float* sums);
};
R2R_DECLARE_KERNELS(LayerNorm2dKernels)

}  // namespace r2r
