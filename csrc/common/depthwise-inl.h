// The 3x3 depthwise convolution of planes and the gate: what the operators that contain them share.
#pragma once

#include "vec-inl.h"

namespace r2r::R2R_ISA {

// Memory for a plane of rows of floats that gate_planes reads. The plane begins at PANEL of it: a read may begin one pixel
// before the plane, and end a vector behind it.
inline int64_t plane_floats(int64_t rows, int64_t columns) {
  return (rows + 2) * (columns + 2) + 3 * PANEL;
}

// Convolves COUNT rows x one vector of columns of one plane. `rows` points at the vector's column in the row above the
// first. With EDGE, left and right mask the taps of the outer columns.
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

// gated = convolved a * convolved b, to out at output row 0 and column 0; returns the sums of gated. Row 0 of the planes
// lies above output row 0. The output columns are columns [left, right) of the planes. Columns outside the planes count as
// 0.
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

}  // namespace r2r::R2R_ISA
