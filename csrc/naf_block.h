// A NAF block in two sweeps. First: norm, conv1, conv2, gate and the sums for the attention; only the gated channels are
// written. Second: attention, conv3, residual, norm, conv4, gate, conv5, residual; only the output is written.
//
// First keeps a tile's normalised pixels, and of conv1's output only the planes of up to ROWS channels at a time, which
// conv2 and the gate use up at once. What conv2 reads beside the tile is computed again.
//
// What the 1x1 convolutions multiply (F) are floats, or pairs of bfloat16 in dot products; all else is float.
#pragma once

#include "depthwise_gate.h"
#include "panel.h"

namespace r2r::R2R_ISA {

// Calls body(begin, end) for pieces of [0, count), about equal, no longer than `most`, cut at multiples of `unit`.
template <class Body>
inline void pieces(int64_t count, int64_t most, int64_t unit, const Body& body) {
  const int64_t units = (count + unit - 1) / unit, each = most / unit, number = (units + each - 1) / each;
  for (int64_t i = 0; i < number; i++) {
    body(units * i / number * unit, least(count, units * (i + 1) / number * unit));
  }
}

template <class F, class T>
void first_sweep(
    const NAFBlock<T>& op, const F* conv1, int64_t n, const Tile& tile, int64_t begin, int64_t end, float* sums,
    float* scratch) {
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels, depth = channels / VALUES_OF<F>, width = op.width, height = op.height;
  const int64_t top = tile.top > 0 ? tile.top - 1 : 0, bottom = least(tile.bottom + 1, height);
  const int64_t left = tile.left > 0 ? tile.left - 1 : 0, right = least(tile.right + 1, width);
  const int64_t columns = right - left, pixels = (bottom - top) * columns, rows = tile.bottom - tile.top;
  F* normed = (F*)scratch;

  for (int64_t first = 0; first < pixels; first += PANEL) {
    const int64_t count = least(PANEL, pixels - first);
    F* panel = normed + first * depth;
    if (columns == width) {
      fill(op.x, n, top * width + first, count, panel);
    } else {  // a panel may run over several rows of the tile
      F* piece = normed + panels(pixels) * PANEL * depth;
      __builtin_memset(panel, 0, PANEL * depth * sizeof(F));
      for (int64_t p = 0; p < count;) {
        const int64_t row = (first + p) / columns, column = (first + p) % columns;
        const int64_t run = least(count - p, columns - column);
        fill(op.x, n, (top + row) * width + left + column, run, piece);
        for (int64_t k = 0; k < depth; k++) {
          __builtin_memcpy(panel + k * PANEL + p, piece + k * PANEL, run * sizeof(F));
        }
        p += run;
      }
    }
    normalise(panel, panel, channels, w.norm1_weight, w.norm1_bias, op.eps);
  }

  const int64_t size = plane_floats(rows, tile.right - tile.left);
  float* planes = (float*)(normed + panels(pixels) * PANEL * depth) + PANEL;  // over the piece, which is used up
  pieces(end - begin, ROWS / 2, 1, [&](int64_t from, int64_t to) {
    const int64_t c = begin + from, pairs = to - from;
    float* inside = planes + (tile.top == 0 ? columns : 0);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      multiply_panel(
          pairs, conv1 + c * depth, conv1 + (channels + c) * depth, depth, normed + first * depth, pixels - first,
          [&](auto& hidden, int step) __attribute__((always_inline)) {
            constexpr int M = sizeof(hidden) / sizeof(hidden[0]), V = sizeof(hidden[0]) / sizeof(vec);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) {
              const float bias = w.conv1_bias[i < M / 2 ? c + i : channels + c + i - M / 2];
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) store(inside + i * size + first + (step + v) * WIDTH, hidden[i][v] + bias);
            }
          });
    }
    for (int64_t i = 0; i < 2 * pairs; i++) {  // conv2 pads conv1's output with zeros
      float* plane = planes + i * size;
      if (tile.top == 0) __builtin_memset(plane, 0, columns * sizeof(float));
      if (tile.bottom == height) __builtin_memset(plane + (rows + 1) * columns, 0, columns * sizeof(float));
    }
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t a = c + i, b = channels + a;
      sums[a] = sum(gate_planes(
          planes + i * size, planes + (pairs + i) * size, columns, tile.left - left, tile.right - left, rows,
          w.conv2_weight + a * 9, w.conv2_weight + b * 9, w.conv2_bias[a], w.conv2_bias[b],
          op.gated + (n * channels + a) * op.x.pixels + tile.top * width + tile.left, width));
    }
  });
}

template <class T>
void naf_block_attention(const T* weight, const float* bias, int64_t channels, const float* mean, float* attention) {
  for (int64_t i = 0; i < channels; i++) {
    vec total{};
    for (int64_t k = 0; k < channels; k += WIDTH) {
      total += load_upto(weight + i * channels + k, channels - k) * load_upto(mean + k, channels - k);
    }
    attention[i] = sum(total) + bias[i];
  }
}

// to = from + (weight @ x + bias) * scale, for the panels of `pixels` pixels, the weights of ROWS channels at a time.
template <class F, class From, class To>
inline void residual_convolution(
    const F* weight, const float* bias, const float* scale, int64_t channels, const F* x, const From* from, To* to,
    int64_t pixels) {
  constexpr int UNIT = VALUES_OF<F>;
  const int64_t depth = channels / UNIT;
  pieces(channels, ROWS, UNIT, [&](int64_t c, int64_t end) {
    const int64_t pairs = (end - c + 1) / 2, second = end - pairs;  // of an odd number, the middle one is computed twice
    for (int64_t first = 0; first < pixels; first += PANEL) {
      const From* before = from + first * channels / VALUES_OF<From>;
      To* after = to + first * channels / VALUES_OF<To>;
      multiply_panel(
          pairs, weight + c * depth, weight + second * depth, depth, x + first * depth, pixels - first,
          [&](auto& sums, int step) __attribute__((always_inline)) {
            constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
#pragma GCC unroll 16
            for (int i = 0; i < M; i += UNIT) {
              const int64_t o = i < M / 2 ? c + i : second + i - M / 2;
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) {
                const int64_t at = (step + v) * WIDTH;
                put<UNIT>(after + at, o, [&](int j) __attribute__((always_inline)) {
                  return channel(before + at, o, j) + (sums[i + j][v] + bias[o + j]) * scale[o + j];
                });
              }
            }
          });
    }
  });
}

template <class F, class T>
void second_sweep(
    const NAFBlock<T>& op, const F* conv3, const F* conv4, const F* conv5, int64_t n, const float* attention, int64_t begin,
    int64_t end, float* scratch) {
  constexpr int UNIT = VALUES_OF<F>;
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels, depth = channels / UNIT;
  const T* first_half = attention ? op.gated + n * channels * op.x.pixels : nullptr;
  float* y = scratch;
  F *x = (F*)(y + SECOND_PANELS * PANEL * channels), *gated = x + SECOND_PANELS * PANEL * depth;
  for (int64_t start = begin; start < end; start += SECOND_PANELS * PANEL) {
    const int64_t pixels = least(end - start, SECOND_PANELS * PANEL);
    if (attention == nullptr) {  // the second half alone: y is what comes in
      for (int64_t first = 0; first < pixels; first += PANEL) {
        fill(op.x, n, start + first, least(PANEL, pixels - first), y + first * channels);
      }
    } else {
      for (int64_t first = 0; first < pixels; first += PANEL) {
        fill(op.x, n, start + first, least(PANEL, pixels - first), x + first * depth);
      }
      for (int64_t c = 0; c < channels; c += UNIT) {
        const T* from = first_half + c * op.x.pixels + start;
        for (int64_t p = 0; p < pixels; p += WIDTH) {
          put<UNIT>(gated + p / PANEL * PANEL * depth + p % PANEL, c, [&](int i) __attribute__((always_inline)) {
            const T* at = from + i * op.x.pixels + p;
            __builtin_prefetch(at + SECOND_PANELS * PANEL);  // too many planes for the processor to see to it
            return load_upto(at, pixels - p) * attention[c + i];
          });
        }
      }
      residual_convolution(conv3, w.conv3_bias, w.beta, channels, gated, x, y, pixels);
    }
    F* normed = x;  // x has served
    for (int64_t first = 0; first < pixels; first += PANEL) {
      normalise(y + first * channels, normed + first * depth, channels, w.norm2_weight, w.norm2_bias, op.eps);
    }
    pieces(channels, ROWS / 2, UNIT, [&](int64_t c, int64_t stop) {
      for (int64_t first = 0; first < pixels; first += PANEL) {
        multiply_panel(
            stop - c, conv4 + c * depth, conv4 + (channels + c) * depth, depth, normed + first * depth, pixels - first,
            [&](auto& sums, int step) __attribute__((always_inline)) {
              constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
              if constexpr (M / 2 % UNIT == 0) {
#pragma GCC unroll 8
                for (int j = 0; j < M / 2; j += UNIT) {
#pragma GCC unroll 2
                  for (int v = 0; v < V; v++) {
                    put<UNIT>(gated + first * depth + (step + v) * WIDTH, c + j, [&](int i) __attribute__((always_inline)) {
                      const vec a = sums[j + i][v] + w.conv4_bias[c + j + i];
                      return a * (sums[M / 2 + j + i][v] + w.conv4_bias[channels + c + j + i]);
                    });
                  }
                }
              }
            });
      }
    });
    F* result = x;
    residual_convolution(conv5, w.conv5_bias, w.gamma, channels, gated, y, result, pixels);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      spill(result + first * depth, op.y, n, start + first, least(PANEL, pixels - first));
    }
  }
}

template <class T>
void naf_block_first(
    const NAFBlock<T>& op, int64_t n, const Tile& tile, int64_t begin, int64_t end, float* sums, float* scratch) {
  if constexpr (MULTIPLIES_PAIRS<T>) {
    if (op.pairs) return first_sweep(op, (const Pair*)op.matrices.conv1, n, tile, begin, end, sums, scratch);
  }
  first_sweep(op, op.weights.conv1_weight, n, tile, begin, end, sums, scratch);
}

template <class T>
void naf_block_second(const NAFBlock<T>& op, int64_t n, const float* attention, int64_t begin, int64_t end, float* scratch) {
  const auto sweep = [&](auto* conv3, auto* conv4, auto* conv5) {
    second_sweep(op, conv3, conv4, conv5, n, attention, begin, end, scratch);
  };
  if constexpr (MULTIPLIES_PAIRS<T>) {
    const auto& m = op.matrices;
    if (op.pairs) return sweep((const Pair*)m.conv3, (const Pair*)m.conv4, (const Pair*)m.conv5);
  }
  sweep(op.weights.conv3_weight, op.weights.conv4_weight, op.weights.conv5_weight);
}

}  // namespace r2r::R2R_ISA
