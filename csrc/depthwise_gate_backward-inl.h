// The gradient of depthwise_gate, by tiles of the planes of one channel. The convolution is computed again on the tile and
// one pixel around it. The gate turns the gradient of its result into that of the convolution, du. One walk over du gives dx
// and the sums for weight and bias. Planes of channels_last images are gathered and scattered, WIDTH at a time.
#include "common/depthwise-inl.h"
#include "common/panel-inl.h"
#include "depthwise_gate_backward.h"

namespace r2r::R2R_ISA {

// Memory for a plane of a tile with two pixels around it. Reads may end a vector behind it.
inline int64_t gradient_plane_floats(int64_t rows, int64_t columns) {
  return (rows + 4) * (columns + 4) + PANEL;
}

// Loads a tile and `around` pixels around it from `count` neighbouring planes of an image. `image` points at the
// first. The planes lie `size` apart. Outside of the image they are 0. `channels` is the number of channels of a
// channels_last pixel.
template <class T>
void load_planes(
    const T* image, int64_t channels, int64_t count, int64_t height, int64_t width, bool channels_last, const Tile& tile,
    int64_t around, int64_t stride, float* planes, int64_t size) {
  const int64_t begin = tile.left < around ? 0 : tile.left - around, end = least(width, tile.right + around);
  const int64_t margin = begin - (tile.left - around);
  for (int64_t i = 0; i < count; i++) __builtin_memset(planes + i * size, 0, size * sizeof(float));
  for (int64_t r = tile.top < around ? 0 : tile.top - around; r < least(height, tile.bottom + around); r++) {
    float* row = planes + (r - tile.top + around) * stride + margin;
    for (int64_t c = begin; c < end; c += WIDTH) {
      const int64_t valid = least(WIDTH, end - c);
      if (channels_last) {
        transpose_rows(image + (r * width + c) * channels, channels, row + c - begin, size, valid, count, valid);
      } else {
        store_upto(row + c - begin, load_upto(image + r * width + c, valid), valid);
      }
    }
  }
}

// dx of one plane of the tile. du holds one pixel around the tile, x holds two. Adds the sums for the weight and the bias to
// totals [10, LANES].
template <class Out>
void convolve_backward(
    const float* du, const float* x, int64_t stride, int64_t rows, int64_t columns, const float* weight, Out* dx,
    int64_t dx_stride, float* totals) {
  const auto some_rows = [&]<int COUNT>(int64_t r) __attribute__((always_inline)) {
    vec sums[10] = {};
    for (int64_t c = 0; c < columns; c += WIDTH) {
      const int64_t valid = least(WIDTH, columns - c);
      const ivec inside = lanes() < (int)valid;
      vec at[COUNT], out[COUNT] = {};
      for (int i = 0; i < COUNT; i++) at[i] = keep(load(x + (r + i + 2) * stride + c + 2), inside);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT + 2; k++) {
#pragma GCC unroll 3
        for (int t = 0; t < 3; t++) {
          const vec tap = load(du + (r + k) * stride + c + t);
#pragma GCC unroll 2
          for (int i = 0; i < COUNT; i++) {
            if (k - i < 0 || k - i > 2) continue;
            const int mirrored = 8 - (k - i) * 3 - t;
            out[i] += weight[mirrored] * tap;
            sums[mirrored] += at[i] * tap;
            if (mirrored == 4) sums[9] += keep(tap, inside);
          }
        }
      }
      for (int i = 0; i < COUNT; i++) store_upto(dx + (r + i) * dx_stride + c, out[i], valid);
    }
    for (int t = 0; t < 10; t++) store(totals + t * LANES, load(totals + t * LANES) + sums[t]);
  };
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) some_rows.template operator()<2>(r);
  if (r < rows) some_rows.template operator()<1>(r);
}

// The gradients of both planes of the convolution. `gradient` holds the gradient of the gated plane. It becomes that of
// plane a; `other` becomes that of plane b.
inline void gate_backward(
    const float* a, const float* b, int64_t stride, int64_t first_row, int64_t rows, int64_t first, int64_t columns,
    const float* weight_a, const float* weight_b, float bias_a, float bias_b, float scale, float shift, float* gradient,
    float* other) {
  const auto some_rows = [&]<int COUNT>(int64_t r) __attribute__((always_inline)) {
    for (int64_t c = first; c < columns; c += WIDTH) {
      vec made[2][COUNT];
      convolve<COUNT, false>(a + r * stride + c + 1, stride, weight_a, bias_a, ivec{}, ivec{}, made[0]);
      convolve<COUNT, false>(b + r * stride + c + 1, stride, weight_b, bias_b, ivec{}, ivec{}, made[1]);
      const int64_t valid = least(WIDTH, columns - c);
      for (int i = 0; i < COUNT; i++) {
        float *to_a = gradient + (r + i) * stride + c, *to_b = other + (r + i) * stride + c;
        const vec g = load(to_a) * scale + shift;
        store_upto(to_a, g * made[1][i], valid);
        store_upto(to_b, g * made[0][i], valid);
      }
    }
  };
  int64_t r = first_row;
  for (; r + 4 <= rows; r += 4) some_rows.template operator()<4>(r);
  for (; r < rows; r++) some_rows.template operator()<1>(r);
}

template <class T>
void depthwise_gate_backward(
    const DepthwiseGateBackward<T>& op, int64_t n, const Tile& tile, int64_t begin, int64_t end, float* totals) {
  const Depthwise& conv = op.conv;
  const int64_t channels = conv.channels, width = conv.width, area = conv.height * width;
  const int64_t rows = tile.bottom - tile.top, columns = tile.right - tile.left;
  const int64_t stride = columns + 4, size = gradient_plane_floats(rows, columns);
  const int64_t step = op.channels_last ? WIDTH : 1, most = least(step, end - begin);
  const auto [x, du] = scratch_parts(2 * most * size, 2 * most * size);  // planes of a, then those of b
  // Pixels around the tile have a gradient only where they are inside the image.
  const int64_t first_row = tile.top == 0, last_row = rows + 2 - (tile.bottom == conv.height);
  const int64_t first = tile.left == 0, last = columns + 2 - (tile.right == width);
  for (int64_t c = begin; c < end; c += step) {
    const int64_t count = least(step, end - c);
    for (int half = 0; half < 2; half++) {
      const int64_t channel = half * channels + c;
      load_planes(
          op.x + n * 2 * channels * area + channel * (op.channels_last ? 1 : area), 2 * channels, count, conv.height, width,
          op.channels_last, tile, 2, stride, x + half * count * size, size);
    }
    load_planes(
        op.dgated + n * channels * area + c * (op.channels_last ? 1 : area), channels, count, conv.height, width,
        op.channels_last, tile, 1, stride, du, size);
    __builtin_memset(du + count * size, 0, count * size * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
      const int64_t a = c + i, b = channels + a;
      const float scale = op.scale ? op.scale[n * channels + a] : 1.0f;
      gate_backward(
          x + i * size, x + (count + i) * size, stride, first_row, last_row, first, last, conv.weight + a * 9,
          conv.weight + b * 9, conv.bias[a], conv.bias[b], scale, op.shift[n * channels + a], du + i * size,
          du + (count + i) * size);
      for (int half = 0; half < 2; half++) {
        const int64_t channel = half * channels + a;
        float *at = x + (half * count + i) * size, *sums = totals + (channel * 10) * LANES;
        const float *gradient = du + (half * count + i) * size, *weight = conv.weight + channel * 9;
        if (op.channels_last) {
          convolve_backward(gradient, at, stride, rows, columns, weight, at + 2 * stride + 2, stride, sums);
        } else {
          T* dx = op.dx + (n * 2 * channels + channel) * area + tile.top * width + tile.left;
          convolve_backward(gradient, at, stride, rows, columns, weight, dx, width, sums);
        }
      }
    }
    if (!op.channels_last) continue;
    for (int half = 0; half < 2; half++) {
      for (int64_t r = 0; r < rows; r++) {
        T* dx = op.dx + (n * area + (tile.top + r) * width + tile.left) * 2 * channels + half * channels + c;
        transpose_rows(x + half * count * size + (r + 2) * stride + 2, size, dx, 2 * channels, count, columns, count);
      }
    }
  }
}

template <class T>
constexpr DepthwiseGateBackwardKernels<T> depthwise_gate_backward_kernels{.tile = depthwise_gate_backward<T>};
R2R_DEFINE_KERNELS(DepthwiseGateBackwardKernels, depthwise_gate_backward_kernels)

}  // namespace r2r::R2R_ISA
