// 3x3 depthwise convolution, gate and sum in one pass: over planes of one channel (vectors of neighbouring pixels), or over
// channels_last rows (vectors of neighbouring channels).
#pragma once

#include <type_traits>

#include "vec.h"

namespace r2r::R2R_ISA {

// COUNT rows x one vector of columns of one plane. `rows` points at the row above the first, at the vector's column.
// left and right are the masks of the outer taps, used where EDGE.
template <int COUNT, bool EDGE>
inline __attribute__((always_inline)) void convolve(
    const float* rows, int64_t stride, const float* weight, float bias, ivec left, ivec right, vec (&out)[COUNT]) {
  for (int r = 0; r < COUNT; r++) out[r] = splat(bias);
#pragma GCC unroll 8
  for (int k = 0; k < COUNT + 2; k++) {
    const float* p = rows + k * stride;
    vec taps[3] = {load(p - 1), load(p), load(p + 1)};
    if constexpr (EDGE) {
      taps[0] = keep(taps[0], left);
      taps[2] = keep(taps[2], right);
    }
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; r++) {
      if (k - r < 0 || k - r > 2) continue;
      for (int t = 0; t < 3; t++) out[r] += weight[(k - r) * 3 + t] * taps[t];
    }
  }
}

// Two planes of `columns` columns whose row 0 lies above output row 0. Output columns are [left, right) of the planes;
// what lies outside the planes counts as 0. out points at output row 0, output column 0.
template <class T>
inline vec gate_planes(
    const float* a, const float* b, int64_t columns, int64_t left, int64_t right, int64_t rows, const float* weight_a,
    const float* weight_b, float bias_a, float bias_b, T* out, int64_t out_stride) {
  constexpr int BLOCK = 4;
  vec total{};  // a sum of sums of rows: long chains of additions would lose digits
  const auto some_rows = [&]<int COUNT>(int64_t r) __attribute__((always_inline)) {
    vec of_rows{};
    for (int64_t column = left; column < right; column += WIDTH) {
      const int64_t valid = least(WIDTH, right - column);
      const float *at_a = a + r * columns + column, *at_b = b + r * columns + column;
      vec first[COUNT], second[COUNT];
      if (column == 0 || column + WIDTH >= columns) {
        const ivec position = lanes() + (int)column;
        const ivec not_first = position != 0, not_last = position != (int)columns - 1;
        convolve<COUNT, true>(at_a, columns, weight_a, bias_a, not_first, not_last, first);
        convolve<COUNT, true>(at_b, columns, weight_b, bias_b, not_first, not_last, second);
      } else {
        convolve<COUNT, false>(at_a, columns, weight_a, bias_a, ivec{}, ivec{}, first);
        convolve<COUNT, false>(at_b, columns, weight_b, bias_b, ivec{}, ivec{}, second);
      }
      for (int i = 0; i < COUNT; i++) {
        const vec gated = first[i] * second[i];
        store_upto(out + (r + i) * out_stride + (column - left), gated, valid);
        of_rows += valid < WIDTH ? keep(gated, lanes() < (int)valid) : gated;
      }
    }
    total += of_rows;
  };
  int64_t r = 0;
  for (; r + BLOCK <= rows; r += BLOCK) some_rows.template operator()<BLOCK>(r);
  for (; r < rows; r++) some_rows.template operator()<1>(r);
  return total;
}

template <class T>
float depthwise_gate(const Depthwise& op, const T* x, T* gated, int64_t c, const Tile& tile, float* scratch) {
  const int64_t rows = tile.bottom - tile.top, columns = op.width, size = plane_floats(rows, columns);
  float* planes[2] = {scratch + PANEL, scratch + size + PANEL};
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

// COUNT neighbouring pixels x one vector of channels of a channels_last image, from x at the first of them. Taps lie `stride`
// apart in x and in the weights, rows `row` apart in x; not `inside`, taps outside of the image are skipped.
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
void depthwise_gate_channels_last(
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

}  // namespace r2r::R2R_ISA
