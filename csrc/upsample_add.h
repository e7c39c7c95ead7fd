// upsample_add: 1x1 convolution without bias, PixelShuffle(2), and the skip added.
#pragma once

#include "common/dispatch.h"
#include "common/tiling.h"

namespace r2r {

// x has 2 * channels channels; skip and y have `channels`, and twice the height and width. channels_last is for float32
// only: PyTorch's products of bfloat16 are faster there.
template <class T>
struct UpsampleAdd {
  Images<const T> x;
  const T* skip;
  T* y;
  const float* weight;  // [4 * channels, 2 * channels], for channels_last packed
  int64_t channels;
  int64_t width;
};

template <class T>
struct UpsampleAddKernels {
  // One block of the weights, packed for channels_last as a panel [2 * channels, PANEL].
  void (*pack)(const float* weight, int64_t channels, int64_t block, float* packed);
  // The results of pixels [first, first + pixels) of image n.
  void (*forward)(const UpsampleAdd<T>&, int64_t n, int64_t first, int64_t pixels);
};
R2R_DECLARE_KERNELS(UpsampleAddKernels)

}  // namespace r2r
