// naf_block: a NAF block in three stages. A stage has the name of what it writes:
//
//   gated      gate(conv2(conv1(norm1(x)))), and sums of it over each tile
//   attention  the matrix `sca` times the mean of gated
//   result     y + conv5(gate(conv4(norm2(y)))) * gamma, with y = x + conv3(gated * attention) * beta
#pragma once

#include "common/dispatch.h"
#include "common/tiling.h"

namespace r2r {

// The parameters of a block, in the order of NAFBlockParams. Those of the feed-forward branch are the last ones.
enum Parameter : int {
  NORM1_WEIGHT,
  NORM1_BIAS,
  CONV1_WEIGHT,
  CONV1_BIAS,
  CONV2_WEIGHT,
  CONV2_BIAS,
  SCA_WEIGHT,
  SCA_BIAS,
  CONV3_WEIGHT,
  CONV3_BIAS,
  BETA,
  NORM2_WEIGHT,
  NORM2_BIAS,
  CONV4_WEIGHT,
  CONV4_BIAS,
  CONV5_WEIGHT,
  CONV5_BIAS,
  GAMMA,
};
constexpr int PARAMETERS = 18;

// A pointer for each parameter; nullptr where it is not used.
template <class T>
struct Parameters {
  T* of[PARAMETERS] = {};

  T* operator[](Parameter p) const {
    return of[p];
  }
  T*& operator[](Parameter p) {
    return of[p];
  }
};

// What the forward pass leaves for the gradients, so that they need not make it again; nullptr where it leaves nothing.
template <class T>
struct NAFBlockKept {
  T* conv1 = nullptr;  // its output [N, 2 * channels, pixels]
  T* conv4 = nullptr;  // its output [N, 2 * channels, pixels]
  T* y = nullptr;      // [N, channels, pixels]
};

template <class T>
struct NAFBlock {
  Parameters<const float> weights;
  Parameters<const T> matrices;  // as the tensors keep them; kernels read the weights of 1x1 convolutions [outputs, inputs]
  bool pairs;  // conv1, conv3, conv4 and conv5 multiply pairs of channels with `matrices`; `weights` lacks theirs
  Images<const T> x;
  Images<T> result;
  T* gated;  // [N, channels, pixels]
  NAFBlockKept<T> kept;
  int64_t height;
  int64_t width;
  float eps;
};

// mean and gated are [N, channels, pixels].
template <class T>
struct LocalAttention {
  Images<const T> mean;
  Images<T> gated;
  const float* weight;  // [channels, channels]
  const float* bias;
};

template <class T>
struct NAFBlockKernels {
  bool pairs;  // has dot products of T; they take an even number of channels

  // Stage `gated` of channels [begin, end) of a tile of image n; their sums go to sums [channels].
  void (*gated)(const NAFBlock<T>&, int64_t n, const Tile&, int64_t begin, int64_t end, float* sums);
  // Stage `attention` of an image: attention [channels] = weight @ mean [channels] + bias.
  void (*attention)(const T* weight, const float* bias, int64_t channels, const float* mean, float* attention);
  // Stage `attention` of a block whose attention is local, for panels [begin, end) of image n. It multiplies `gated` in
  // place.
  void (*local_attention)(const LocalAttention<T>&, int64_t n, int64_t begin, int64_t end);
  // Stage `result` of pixels [begin, end) of image n. Without attention (nullptr) it is the feed-forward branch alone: y is
  // x.
  void (*result)(const NAFBlock<T>&, int64_t n, const float* attention, int64_t begin, int64_t end);
};
R2R_DECLARE_KERNELS(NAFBlockKernels)

// The driver of stage `result` on raw memory, which gated_feed_forward also calls. attention [images, channels].
template <class T>
void make_result(const NAFBlock<T>& op, int64_t images, const float* attention);

}  // namespace r2r
