// Panels: filling one from images of either memory format, writing one back, normalising it, and multiplying it.
#pragma once

#include "vec.h"

namespace r2r::R2R_ISA {

constexpr int STEPS = PANEL / WIDTH;

// Transposes `count` <= WIDTH rows of `columns` values, row i at from + i * from_stride, to columns at to + j * to_stride.
template <class From, class To>
inline void transpose_rows(
    const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t count, int64_t columns, int64_t write) {
  for (int64_t j = 0; j < columns; j += WIDTH) {
    const int64_t width = least(WIDTH, columns - j);
    vec rows[WIDTH];
    if (count == WIDTH && width == WIDTH) {
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; i++) rows[i] = load(from + i * from_stride + j);
    } else {
      for (int i = 0; i < WIDTH; i++) rows[i] = i < count ? load_upto(from + i * from_stride + j, width) : vec{};
    }
    transpose(rows);
    if (write == WIDTH && width == WIDTH) {
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; i++) store(to + (j + i) * to_stride, rows[i]);
    } else {
      for (int i = 0; i < width; i++) store_upto(to + (j + i) * to_stride, rows[i], write);
    }
  }
}

// Columns [0, count) of the panel from pixels [first, first + count) of an image; the other columns become 0.
template <class T>
inline void fill(const Images<const T>& x, int64_t n, int64_t first, int64_t count, float* panel) {
  const T* image = x.image(n);
  if (x.channels_last) {
    for (int64_t p = 0; p < PANEL; p += WIDTH) {
      const int64_t valid = count - p < 0 ? 0 : least(WIDTH, count - p);
      transpose_rows(image + (first + p) * x.channels, x.channels, panel + p, PANEL, valid, x.channels, WIDTH);
    }
  } else if (count == PANEL) {
    for (int64_t c = 0; c < x.channels; c++) {
      for (int s = 0; s < STEPS; s++) store(panel + c * PANEL + s * WIDTH, load(image + c * x.pixels + first + s * WIDTH));
    }
  } else {
    for (int64_t c = 0; c < x.channels; c++) {
      for (int s = 0; s < STEPS; s++) {
        const int64_t left = count - s * WIDTH;
        vec value = left > 0 ? load_upto(image + c * x.pixels + first + s * WIDTH, left) : vec{};
        store(panel + c * PANEL + s * WIDTH, value);
      }
    }
  }
}

template <class T>
inline void spill(const float* panel, const Images<T>& y, int64_t n, int64_t first, int64_t count) {
  T* image = y.image(n);
  if (y.channels_last) {
    for (int64_t p = 0; p < count; p += WIDTH) {
      const int64_t valid = least(WIDTH, count - p);
      for (int64_t c = 0; c < y.channels; c += WIDTH) {
        const int64_t channels = least(WIDTH, y.channels - c);
        transpose_rows(panel + c * PANEL + p, PANEL, image + (first + p) * y.channels + c, y.channels, channels, valid, channels);
      }
    }
  } else {
    for (int64_t c = 0; c < y.channels; c++) {
      for (int64_t p = 0; p < count; p += WIDTH) {
        store_upto(image + c * y.pixels + first + p, load(panel + c * PANEL + p), count - p);
      }
    }
  }
}

// Two passes; four partial sums, so that the error grows with a quarter of the channels.
inline void statistics(const float* panel, int64_t channels, float eps, vec (&mean)[STEPS], vec (&rstd)[STEPS]) {
  for (int s = 0; s < STEPS; s++) {
    const float* p = panel + s * WIDTH;
    vec part[4] = {};
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
      for (int i = 0; i < 4; i++) part[i] += load(p + (c + i) * PANEL);
    }
    for (; c < channels; c++) part[0] += load(p + c * PANEL);
    mean[s] = ((part[0] + part[1]) + (part[2] + part[3])) / (float)channels;
    for (int i = 0; i < 4; i++) part[i] = vec{};
    for (c = 0; c + 4 <= channels; c += 4) {
      for (int i = 0; i < 4; i++) {
        vec centred = load(p + (c + i) * PANEL) - mean[s];
        part[i] += centred * centred;
      }
    }
    for (; c < channels; c++) {
      vec centred = load(p + c * PANEL) - mean[s];
      part[0] += centred * centred;
    }
    rstd[s] = 1.0f / square_root(((part[0] + part[1]) + (part[2] + part[3])) / (float)channels + eps);
  }
}

inline void normalise(
    const float* from, float* to, int64_t channels, const float* weight, const float* bias, const vec (&mean)[STEPS],
    const vec (&rstd)[STEPS]) {
  for (int64_t c = 0; c < channels; c++) {
    for (int s = 0; s < STEPS; s++) {
      vec normed = (load(from + c * PANEL + s * WIDTH) - mean[s]) * rstd[s];
      store(to + c * PANEL + s * WIDTH, normed * weight[c] + bias[c]);
    }
  }
}
inline void normalise(
    const float* from, float* to, int64_t channels, const float* weight, const float* bias, float eps) {
  vec mean[STEPS], rstd[STEPS];
  statistics(from, channels, eps, mean, rstd);
  normalise(from, to, channels, weight, bias, mean, rstd);
}

// The heart: M rows of weights (the first M / 2 at `first`, the others at `second`) times V vectors of a panel.
template <int M, int V, class Epilogue>
inline __attribute__((always_inline)) void multiply_rows(
    const float* first, const float* second, int64_t depth, const float* panel, const Epilogue& epilogue) {
  vec sums[M][V] = {};
  for (int64_t k = 0; k < depth; k++) {
    vec x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) x[v] = load(panel + k * PANEL + v * WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const float weight = i < M / 2 ? first[i * depth + k] : second[(i - M / 2) * depth + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[i][v] += weight * x[v];
    }
  }
  epilogue(sums);
}

template <int PAIRS, int V, class Epilogue>
inline void multiply_pairs(
    int64_t pairs, const float* first, const float* second, int64_t depth, const float* panel, const Epilogue& epilogue) {
  if (pairs == PAIRS) {
    multiply_rows<2 * PAIRS, V>(first, second, depth, panel, epilogue);
  } else if constexpr (PAIRS > 1) {
    multiply_pairs<PAIRS - 1, V>(pairs, first, second, depth, panel, epilogue);
  }
}

// epilogue(sums [2 * m][V], step) for the first `count` columns of a panel; `pairs` <= ROWS / 2.
template <class Epilogue>
inline void multiply_panel(
    int64_t pairs, const float* first, const float* second, int64_t depth, const float* panel, int64_t count,
    const Epilogue& epilogue) {
  int s = 0;
  for (; s + 1 < STEPS && count > (s + 1) * WIDTH; s += 2) {
    multiply_pairs<ROWS / 2, 2>(pairs, first, second, depth, panel + s * WIDTH, [&](auto& sums) { epilogue(sums, s); });
  }
  if (s < STEPS && count > s * WIDTH) {
    multiply_pairs<ROWS / 2, 1>(pairs, first, second, depth, panel + s * WIDTH, [&](auto& sums) { epilogue(sums, s); });
  }
}

}  // namespace r2r::R2R_ISA
