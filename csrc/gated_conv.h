// gated_conv: the gated convolution of R2R (section 3.4) of images with those of a prior, which is area-resized to their
// size.
#pragma once

#include "common/dispatch.h"
#include "common/tiling.h"

namespace r2r {

// The i-th of `out` places averages [begin, end) of `in` places, as adaptive_avg_pool2d does.
struct Window {
  int64_t begin;
  int64_t end;
};
#if defined(__CUDACC__)
__host__ __device__
#endif
    static inline Window window(int64_t i, int64_t in, int64_t out) {
  return {i * in / out, ((i + 1) * in + out - 1) / out};
}

// weight is [channels, 2 K K], for channels_last [2 K K, channels]: the taps of x, then those of the prior.
template <class T>
struct GatedConv {
  const T* x;
  const T* prior;
  T* y;
  const float* weight;
  const float* bias;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t prior_height;
  int64_t prior_width;
  int64_t kernel;
  const Window* rows;            // the window of each row in the prior; nullptr: the prior has the size of x
  const int32_t* first_columns;  // the first and the last column of the window of each column; LANES more can be read
  const int32_t* last_columns;
  bool streams;  // y is written by streaming stores. Then its rows or pixels are whole cache lines, but for 1x1 in planes.
};

// The prior has the size of x.
template <class T>
struct GatedConvBackward {
  const T* dy;
  const T* x;
  const T* prior;
  T* dx;
  T* dprior;
  const float* weight;
  const float* bias;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t kernel;
};

constexpr int64_t STRIP = 8;  // rows that a plane's walk, or a task of rows, makes at a time: they fit the first-level cache

template <class T>
struct GatedConvKernels {
  // One plane of all images' channels.
  void (*plane)(const GatedConv<T>&, int64_t plane);
  // A tile of image n, channels_last. Without resizing, a 1x1 convolution takes full rows.
  void (*rows)(const GatedConv<T>&, int64_t n, const Tile&);
  // One plane; sums [2 K K + 1] gets its gradients of weight and bias.
  void (*plane_backward)(const GatedConvBackward<T>&, int64_t plane, float* sums);
  // Rows [top, bottom) of image n, channels_last; sums [2 K K + 1, channels] gets their gradients of weight and bias.
  void (*rows_backward)(const GatedConvBackward<T>&, int64_t n, int64_t top, int64_t bottom, float* sums);
};
R2R_DECLARE_KERNELS(GatedConvKernels)

// channels_last: columns of a tile for 3x3 and for resizing. With the columns beside it, a tile is whole groups of columns
// that are read before the walk goes on to the next cache line of channels: streaming stores are a third slower with more
// than 32 pixels open at a time. Six rows of x and of the prior, four that are read and two that are prefetched, take half
// of a second-level cache of 1 MB: pages do not fill all sets of a cache alike.
constexpr int64_t GATED_CONV_GROUP = 16;
static inline int64_t gated_conv_columns(int64_t pixel_bytes) {
  const int64_t groups = ((1 << 19) / 12 / pixel_bytes + 2) / GATED_CONV_GROUP;
  return (groups > 1 ? groups : 1) * GATED_CONV_GROUP - 2;
}

}  // namespace r2r
