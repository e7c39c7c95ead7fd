// local_mean_2d: the mean over a window, no larger than the image, around each pixel. Backward: of the gradients, over the
// windows that hold each pixel.
#pragma once

#include "common/dispatch.h"
#include "common/tiling.h"

namespace r2r {

template <class T>
struct LocalMean2d {
  const T* x;
  T* y;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t window_height;
  int64_t window_width;
  bool backward;
  bool channels_last;
};

template <class T>
struct LocalMean2dKernels {
  // Rows [top, bottom) of a part of image n. A part is one plane, or in channels_last LANES channels.
  void (*rows)(const LocalMean2d<T>&, int64_t n, int64_t part, int64_t top, int64_t bottom);
};
R2R_DECLARE_KERNELS(LocalMean2dKernels)

// The driver on raw memory, which local_naf_block also calls.
template <class T>
void local_means(const LocalMean2d<T>& op, int64_t images);

}  // namespace r2r
