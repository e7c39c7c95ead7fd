// depthwise_gate in one pass: over planes of one channel, where a vector holds neighbouring pixels, or over channels_last
// rows, where a vector holds neighbouring channels.
#include "common/depthwise-inl.h"
#include "depthwise_gate.h"

namespace r2r::R2R_ISA {

template <class T>
float depthwise_gate_planes(const Depthwise& op, const T* x, T* gated, int64_t c, const Tile& tile) {
  const int64_t rows = tile.bottom - tile.top, columns = op.width, size = plane_floats(rows, columns);
  const auto [first, second] = scratch_parts(size, size);
  float* const planes[2] = {first + PANEL, second + PANEL};
  for (int half = 0; half < 2; half++) {
    const T* plane = x + (c + half * op.channels) * op.height * op.width;
    for (int64_t r = -1; r <= rows; r++) {
      const bool inside = tile.top + r >= 0 && tile.top + r < op.height;
      for (int64_t i = 0; i < columns; i += WIDTH) {
        const vec value = inside ? load_upto(plane + (tile.top + r) * columns + i, columns - i) : vec{};
        store_upto(planes[half] + (r + 1) * columns + i, value, columns - i);
      }
    }
  }
  const int64_t d = c + op.channels;
  return sum(gate_planes(
      planes[0], planes[1], columns, 0, columns, rows, op.weight + c * 9, op.weight + d * 9, op.bias[c], op.bias[d],
      gated + (c * op.height + tile.top) * columns, columns));
}

// Convolves COUNT neighbouring pixels x one vector of channels of a channels_last image. x points at the first of the
// pixels. Neighbouring pixels, and neighbouring taps, lie `stride` apart, rows lie `row` apart. Taps that are not `inside`
// the image are skipped.
template <int COUNT, class T, class Valid, class Inside>
inline __attribute__((always_inline)) void convolve_channels_last(
    const T* x, int64_t row, int64_t stride, const float* taps, const float* bias, Valid valid, Inside inside,
    vec (&out)[COUNT]) {
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i++) out[i] = load_upto(bias, valid);
#pragma GCC unroll 3
  for (int r = 0; r < 3; r++) {
#pragma GCC unroll 8
    for (int k = 0; k < COUNT + 2; k++) {
      if (!inside(r - 1, k - 1)) continue;
      const vec value = load_upto(x + (r - 1) * row + (k - 1) * stride, valid);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; i++) {
        if (k - i >= 0 && k - i <= 2) out[i] += load_upto(taps + (r * 3 + k - i) * stride, valid) * value;
      }
    }
  }
}

template <class T>
void depthwise_gate_rows(
    const Depthwise& op, const float* taps, const T* x, T* gated, int64_t top, int64_t bottom, float* sums) {
  const int64_t channels = op.channels, stride = 2 * channels, width = op.width;
  const auto some_channels = [&](int64_t row, int64_t c, auto valid) __attribute__((always_inline)) {
    vec of_row{};
    const auto some_pixels = [&]<int COUNT>(int64_t column, auto inside) __attribute__((always_inline)) {
      const int64_t at = row * width + column;
      vec a[COUNT], b[COUNT];
      convolve_channels_last<COUNT>(x + at * stride + c, width * stride, stride, taps + c, op.bias + c, valid, inside, a);
      convolve_channels_last<COUNT>(
          x + at * stride + channels + c, width * stride, stride, taps + channels + c, op.bias + channels + c, valid, inside,
          b);
      for (int i = 0; i < COUNT; i++) {
        a[i] *= b[i];
        store_upto(gated + (at + i) * channels + c, a[i], valid);
      }
      for (int half = COUNT / 2; half; half /= 2) {  // in pairs: long chains of additions would lose digits
        for (int i = 0; i < half; i++) a[i] += a[i + half];
      }
      of_row += a[0];
    };
    int64_t column = 0;
    const auto at_the_edge = [&] __attribute__((always_inline)) {
      some_pixels.template operator()<1>(column, [&](int r, int k) {
        return row + r >= 0 && row + r < op.height && column + k >= 0 && column + k < width;
      });
      column++;
    };
    if (row > 0 && row + 1 < op.height) {
      constexpr int BLOCK = 4;
      const auto inside = [](int, int) { return true; };
      at_the_edge();
      for (; column + BLOCK < width; column += BLOCK) some_pixels.template operator()<BLOCK>(column, inside);
      for (; column + 1 < width; column++) some_pixels.template operator()<1>(column, inside);
    }
    while (column < width) at_the_edge();
    store_upto(sums + c, load_upto(sums + c, valid) + of_row, valid);
  };
  __builtin_memset(sums, 0, channels * sizeof(float));
  for (int64_t row = top; row < bottom; row++) {
    int64_t c = 0;
    for (; c + WIDTH <= channels; c += WIDTH) some_channels(row, c, std::integral_constant<int64_t, WIDTH>());
    if (c < channels) some_channels(row, c, channels - c);
  }
}

template <class T>
constexpr DepthwiseGateKernels<T> depthwise_gate_kernels{
    .planes = depthwise_gate_planes<T>,
    .rows = depthwise_gate_rows<T>,
};
R2R_DEFINE_KERNELS(DepthwiseGateKernels, depthwise_gate_kernels)

}  // namespace r2r::R2R_ISA
