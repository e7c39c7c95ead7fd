// What the CPU kernels of one instruction set offer, and the choice among instruction sets.
//
// The arithmetic lives in <operator>.h, on raw pointers, and is compiled once for each instruction set (kernels.cpp); the
// drivers in <operator>_cpu.cpp see tensors, split the work among threads, and are compiled once. Kernels work on panels:
// PANEL neighbouring pixels of every channel, [channels][PANEL] floats, so that a vector holds pixels, statistics over
// channels need no shuffles, and the weights of 1x1 convolutions are read as PyTorch keeps them.
#pragma once

#include <cstdint>

namespace r2r {

constexpr int64_t PANEL = 32;
constexpr int64_t LANES = 16;  // values of the widest vector: room for sums that are not yet summed across

struct bfloat16 {
  uint16_t bits;
};

// An image batch [N, channels, pixels], or [N, pixels, channels] where channels_last.
template <class T>
struct Images {
  T* data;
  int64_t channels;
  int64_t pixels;
  bool channels_last;

  T* image(int64_t n) const {
    return data + n * channels * pixels;
  }
};

// Rows of two halves of `length` values, of which `count` are meant.
struct Halves {
  int64_t rows;
  int64_t length;
  int64_t count;
};

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

// A 3x3 depthwise convolution of 2 * channels planes, gated to `channels` planes of height x width.
struct Depthwise {
  const float* weight;  // [2 * channels, 9]
  const float* bias;    // [2 * channels]
  int64_t channels;
  int64_t height;
  int64_t width;
};

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

// The part of an image that one task of a 3x3 convolution makes.
struct Tile {
  int64_t top;
  int64_t bottom;
  int64_t left;
  int64_t right;
};

struct NAFBlockWeights {
  const float* norm1_weight;
  const float* norm1_bias;
  const float* conv1_weight;
  const float* conv1_bias;
  const float* conv2_weight;
  const float* conv2_bias;
  const float* sca_weight;
  const float* sca_bias;
  const float* conv3_weight;
  const float* conv3_bias;
  const float* beta;
  const float* norm2_weight;
  const float* norm2_bias;
  const float* conv4_weight;
  const float* conv4_bias;
  const float* conv5_weight;
  const float* conv5_bias;
  const float* gamma;
};

// The matrices of a block as its tensors keep them, [outputs, inputs].
template <class T>
struct NAFBlockMatrices {
  const T* conv1;
  const T* sca;
  const T* conv3;
  const T* conv4;
  const T* conv5;
};

template <class T>
struct NAFBlock {
  NAFBlockWeights weights;
  Images<const T> x;
  Images<T> y;
  T* gated;  // [N, channels, pixels]
  int64_t height;
  int64_t width;
  float eps;
  NAFBlockMatrices<T> matrices;
  bool pairs;  // the 1x1 convolutions multiply pairs of channels with `matrices`, and `weights` lacks theirs
};

// What a block's backward multiplies pixels with.
template <class T>
struct NAFBlockProducts {
  const T* conv1;  // [2 * channels, channels]
  const T* conv3;  // [channels, channels]
  const T* conv4;
  const T* transposed_conv1;  // [channels, 2 * channels]
  const T* transposed_conv3;  // [channels, channels], times beta
  const T* transposed_conv4;
  const T* transposed_conv5;  // times gamma
};

template <class T>
struct NAFBlockBackward {
  NAFBlockWeights weights;
  NAFBlockProducts<float> products;
  NAFBlockProducts<T> in_pairs;
  bool pairs;  // products are of pairs, with `in_pairs`; `products` are empty, and `weights` lacks conv1's and conv4's
  Images<const T> dz;
  Images<const T> x;
  Images<T> dx;
  T* hidden;   // [N, 2 * channels, pixels], what conv1 makes
  T* gated;    // [N, channels, pixels]
  T* dy;       // [N, channels, pixels], of the second half's residual
  T* dhidden;  // [N, 2 * channels, pixels]
  float eps;
};

// Sums over pixels. Of a convolution's weight: products of the gradient of its output with its input, [rows,
// padded(channels)]; beta and gamma, which scale that output, are still to be taken in. All else [rows, LANES].
struct NAFBlockSums {
  float* norm1_weight;
  float* norm1_bias;
  float* conv1_weight;
  float* conv1_bias;
  float* conv3_weight;
  float* conv3_bias;
  float* norm2_weight;
  float* norm2_bias;
  float* conv4_weight;
  float* conv4_bias;
  float* conv5_weight;
  float* conv5_bias;
};

// What the i-th of `out` places averages of `in` places: [begin, end), as adaptive_avg_pool2d.
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

// The gated convolution of planes of x with those of the prior. weight is [channels, 2 K K], for channels_last
// [2 K K, channels]: the taps of x, then those of the prior.
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
  const Window* rows;            // of the prior, that each row averages; nullptr: they are of the same size
  const int32_t* first_columns;  // and each column; LANES of these beyond the last can be read
  const int32_t* last_columns;
  bool streams;  // lines of y are written past the caches; but for 1x1 in planes, its rows or pixels are whole lines
};

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

template <class T>
struct SlotConv {
  const T* x;
  T* y;
  const float* weight;  // [tasks, channels, kernel, 9]
  const float* bias;    // [tasks, channels]
  int64_t slots;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t kernel;
};

template <class T>
struct SlotConvBackward {
  const T* dy;
  const T* x;
  T* dx;
  const float* weight;
  float* dweight;
  float* dbias;
  int64_t slots;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t kernel;
};

// The mean over a window, no larger than the image; backward: of the gradients, over the windows that hold each pixel.
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

// mean and gated are [N, channels, pixels].
template <class T>
struct LocalAttention {
  Images<const T> mean;
  Images<T> gated;
  const float* weight;  // [channels, channels]
  const float* bias;
};

// x has 2 * channels channels; skip and y have `channels`, and twice the height and width.
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
struct Kernels {
  const char* name;
  bool pairs;  // has dot products of T; they take an even number of channels

  void (*widen)(const T* from, float* to, int64_t count);
  void (*narrow)(const float* from, T* to, int64_t count);
  // Panels [begin, end) of one image.
  void (*layer_norm_2d)(const LayerNorm2d<T>&, int64_t n, int64_t begin, int64_t end, float* scratch);
  // As above; the sums over these panels for the weight and the bias go to sums [2, channels].
  void (*layer_norm_2d_backward)(
      const LayerNorm2dBackward<T>&, int64_t n, int64_t begin, int64_t end, float* sums, float* scratch);
  void (*multiply)(const T* x, T* y, const Halves&);
  void (*multiply_backward)(const T* dy, const T* x, T* dx, const Halves&);
  // Channel c of one image [2 * channels, pixels], rows of the tile; returns the sum of what it wrote.
  float (*depthwise_gate)(const Depthwise&, const T* x, T* gated, int64_t c, const Tile&, float* scratch);
  // Rows of one image [pixels, 2 * channels]; taps [9, 2 * channels]; the sums go to sums [channels].
  void (*depthwise_gate_channels_last)(
      const Depthwise&, const float* taps, const T* x, T* gated, int64_t top, int64_t bottom, float* sums);
  // Norm, conv1, conv2 and gate of channels [begin, end) of a tile of image n; the sums go to sums [channels].
  void (*naf_block_first)(
      const NAFBlock<T>&, int64_t n, const Tile&, int64_t begin, int64_t end, float* sums, float* scratch);
  // attention [channels] = the 1x1 convolution `sca` of mean [channels].
  void (*naf_block_attention)(const T* weight, const float* bias, int64_t channels, const float* mean, float* attention);
  // The rest of the block for pixels [begin, end) of image n; without attention (nullptr) the second half alone, of x.
  void (*naf_block_second)(
      const NAFBlock<T>&, int64_t n, const float* attention, int64_t begin, int64_t end, float* scratch);

  // One plane of all images' channels, or a tile (full rows for 1x1) of image n, channels_last. Backward: one plane, or rows
  // [top, bottom); sums [2 K K + 1] or [2 K K + 1, channels] are the gradients of weight and bias from there.
  void (*gated_conv_plane)(const GatedConv<T>&, int64_t plane, float* scratch);
  void (*gated_conv_rows)(const GatedConv<T>&, int64_t n, const Tile&, float* scratch);
  void (*gated_conv_plane_backward)(const GatedConvBackward<T>&, int64_t plane, float* sums, float* scratch);
  void (*gated_conv_rows_backward)(
      const GatedConvBackward<T>&, int64_t n, int64_t top, int64_t bottom, float* sums, float* scratch);

  // out[n] = key . queries[n], all [depth]; returns key . key.
  float (*dot_products)(const T* key, int64_t depth, const T* queries, int64_t count, float* out);
  // totals[m] [length] += sum over slots of weights[m][slot] * values[slot], `stride` apart, for m < count.
  void (*add_weighted)(
      const T* values, int64_t stride, int64_t slots, int64_t length, const float* const* weights, float* const* totals,
      int64_t count);

  void (*slot_conv)(const SlotConv<T>&, int64_t task, int64_t channel, float* scratch);
  void (*slot_conv_backward)(const SlotConvBackward<T>&, int64_t task, int64_t channel, float* scratch);

  // Channels [begin, end) of the gates of a tile of image n; the sums for weight and bias are added to totals
  // [2 * channels, 10, LANES].
  void (*depthwise_gate_backward)(
      const DepthwiseGateBackward<T>&, int64_t n, const Tile&, int64_t begin, int64_t end, float* totals, float* scratch);

  // Panels [begin, end) of image n: norm and conv1, to op.hidden; from op.gated to op.dy, with op.gated becoming the
  // gradient of what the attention scaled, and dattention [channels]; from op.dhidden and op.dy to op.dx. Adds to the sums.
  void (*naf_block_hidden)(const NAFBlockBackward<T>&, int64_t n, int64_t begin, int64_t end, float* scratch);
  void (*naf_block_second_backward)(
      const NAFBlockBackward<T>&, int64_t n, const float* attention, int64_t begin, int64_t end, float* dattention,
      const NAFBlockSums&, float* scratch);
  void (*naf_block_first_backward)(
      const NAFBlockBackward<T>&, int64_t n, int64_t begin, int64_t end, const NAFBlockSums&, float* scratch);
  // Rows [begin, end) of a matrix, each times its scale (nullptr: 1), as columns of to [columns, rows].
  void (*transpose_matrix)(
      const T* matrix, const float* scale, int64_t rows, int64_t columns, int64_t begin, int64_t end, T* to);
  // Rows of one plane of image n, or for channels_last of STRAND of its channels.
  void (*local_mean_2d)(const LocalMean2d<T>&, int64_t n, int64_t part, int64_t top, int64_t bottom, float* scratch);
  // Panels [begin, end) of image n.
  void (*local_attention)(const LocalAttention<T>&, int64_t n, int64_t begin, int64_t end, float* scratch);
  // One block of the weights as channels_last wants them; what becomes of pixels [first, first + pixels) of image n.
  void (*upsample_add_pack)(const float* weight, int64_t channels, int64_t block, float* packed);
  void (*upsample_add)(const UpsampleAdd<T>&, int64_t n, int64_t first, int64_t pixels, float* scratch);
};

static inline int64_t panels(int64_t pixels) {
  return (pixels + PANEL - 1) / PANEL;
}

// Floats of scratch that the kernels above need. (static: a copy made for one instruction set must not serve another)
static inline int64_t layer_norm_2d_scratch(int64_t channels) {
  return (2 * PANEL + 2 * 16) * channels;
}
static inline int64_t plane_floats(int64_t rows, int64_t columns) {
  return (rows + 2) * (columns + 2) + 3 * PANEL;  // reads reach one pixel before and a vector behind
}
static inline int64_t gradient_plane_floats(int64_t rows, int64_t columns) {
  return (rows + 4) * (columns + 4) + PANEL;  // two pixels around a tile; reads reach a vector behind
}
static inline int64_t naf_block_first_scratch(int64_t channels, const Tile& t) {
  const int64_t area = (t.bottom - t.top + 2) * (t.right - t.left + 2);
  // The tile, a piece of it, and the planes of the most channels that a micro-kernel makes.
  return (panels(area) + 1) * PANEL * channels + 14 * plane_floats(t.bottom - t.top, t.right - t.left);
}
constexpr int64_t SECOND_PANELS = 4;
static inline int64_t naf_block_second_scratch(int64_t channels) {
  return 3 * SECOND_PANELS * PANEL * channels;
}

constexpr int64_t MOST_BACKWARD_PANELS = 16;
// How many panels a sweep of the backward takes at a time: what it keeps of them should fit the second-level cache, and of
// a plane it should read as much as it can at once.
static inline int64_t backward_panels(int64_t channels) {
  const int64_t fitting = 256 / channels;
  return fitting < 2 ? 2 : fitting > MOST_BACKWARD_PANELS ? MOST_BACKWARD_PANELS : fitting;
}
static inline int64_t padded(int64_t channels) {
  return (channels + LANES - 1) / LANES * LANES;
}
static inline int64_t naf_block_backward_scratch(int64_t channels) {
  return backward_panels(channels) * PANEL * (8 * channels + padded(channels)) + channels * LANES;
}

constexpr int64_t STRIP = 8;  // rows that the gated convolution makes at a time: they fit the first-level cache
static inline int64_t gated_conv_plane_scratch(int64_t width, int64_t prior_width) {
  return 5 * (STRIP + 4) * (width + 3 * PANEL) + prior_width + 2 * PANEL;
}
// In channels_last 3x3 makes so many rows at a time, reading so many columns of a line of channels before the next line:
// writing past the caches is a third slower with more than 32 pixels open at a time.
constexpr int GATED_CONV_ROWS = 2;
constexpr int64_t GATED_CONV_GROUP = 16;
// Columns of a tile: with those beside it, whole groups. Six rows of x and of the prior, four that are read and the next two,
// take half of a second-level cache of 1 MB, of which pages do not fill all parts alike.
static inline int64_t gated_conv_columns(int64_t pixel_bytes) {
  const int64_t groups = ((1 << 19) / 12 / pixel_bytes + 2) / GATED_CONV_GROUP;
  return (groups > 1 ? groups : 1) * GATED_CONV_GROUP - 2;
}
static inline int64_t gated_conv_rows_scratch(int64_t channels, int64_t kernel, int64_t columns) {
  const int64_t rows = GATED_CONV_ROWS + 2, padded = channels + LANES;
  if (kernel == 1) return 3 * padded + columns * (channels + 1);
  return (24 + 2 * GATED_CONV_ROWS) * padded + (columns + 2) * (rows * (channels + 4) + 1);
}
static inline int64_t gated_conv_rows_backward_scratch(int64_t channels, int64_t width) {
  return channels * (1 + 6 * width) + PANEL;
}
static inline int64_t slot_plane_floats(int64_t height, int64_t width) {
  return (height + 2) * (width + 2) + PANEL;
}
static inline int64_t slot_conv_scratch(int64_t slots, int64_t kernel, int64_t height, int64_t width) {
  return (2 * slots + 4) * slot_plane_floats(height, width) + 9 * kernel + PANEL;
}

constexpr int64_t STRAND = 16;  // rows or channels that a row's running sum takes along
static inline int64_t local_mean_2d_scratch(int64_t width) {
  return 5 * STRAND * (width + STRAND);
}
static inline int64_t local_attention_scratch(int64_t channels) {
  return 3 * PANEL * channels;
}
constexpr int64_t UPSAMPLE_PANELS = 4;

const Kernels<float>& kernels(const float*);  // the best this processor has
const Kernels<bfloat16>& kernels(const bfloat16*);

}  // namespace r2r
