// 3x3 depthwise convolution, gate and sum in one pass: over planes of one channel (vectors of neighbouring pixels), or over
// channels_last rows (vectors of neighbouring channels).
#pragma once

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

template <class T>
void depthwise_gate_channels_last(
    const Depthwise& op, const float* taps, const T* x, T* gated, int64_t top, int64_t bottom, float* sums) {
  const int64_t channels = op.channels, stride = 2 * channels;
  for (int64_t c = 0; c < channels; c += WIDTH) {
    const int64_t valid = least(WIDTH, channels - c);
    vec weights[2][9], total{};
    for (int half = 0; half < 2; half++) {
      for (int t = 0; t < 9; t++) weights[half][t] = load_upto(taps + t * stride + half * channels + c, valid);
    }
    for (int64_t row = top; row < bottom; row++) {
      vec of_row{};
      for (int64_t column = 0; column < op.width; column++) {
        vec out[2];
        for (int half = 0; half < 2; half++) {
          out[half] = load_upto(op.bias + half * channels + c, valid);
          for (int t = 0; t < 9; t++) {
            const int64_t r = row + t / 3 - 1, k = column + t % 3 - 1;
            if (r < 0 || r >= op.height || k < 0 || k >= op.width) continue;
            out[half] += weights[half][t] * load_upto(x + (r * op.width + k) * stride + half * channels + c, valid);
          }
        }
        const vec product = out[0] * out[1];
        store_upto(gated + (row * op.width + column) * channels + c, product, valid);
        of_row += product;
      }
      total += of_row;
    }
    store_upto(sums + c, total, valid);
  }
}

}  // namespace r2r::R2R_ISA
