// A NAF block in two sweeps. First: norm, conv1, conv2, gate and the sums for the attention; only the gated channels are
// written. Second: attention, conv3, residual, norm, conv4, gate, conv5, residual; only the output is written.
//
// First keeps a tile's normalised pixels, and of conv1's output only the planes of up to ROWS channels at a time, which
// conv2 and the gate use up at once. What conv2 reads beside the tile is computed again.
#pragma once

#include "depthwise_gate.h"
#include "panel.h"

namespace r2r::R2R_ISA {

template <class T>
void naf_block_first(
    const NAFBlock<T>& op, int64_t n, const Tile& tile, int64_t begin, int64_t end, float* sums, float* scratch) {
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels, width = op.width, height = op.height;
  const int64_t top = tile.top > 0 ? tile.top - 1 : 0, bottom = least(tile.bottom + 1, height);
  const int64_t left = tile.left > 0 ? tile.left - 1 : 0, right = least(tile.right + 1, width);
  const int64_t columns = right - left, pixels = (bottom - top) * columns, rows = tile.bottom - tile.top;
  float* normed = scratch;

  for (int64_t first = 0; first < pixels; first += PANEL) {
    const int64_t count = least(PANEL, pixels - first);
    float* panel = normed + first * channels;
    if (columns == width) {
      fill(op.x, n, top * width + first, count, panel);
    } else {  // a panel may run over several rows of the tile
      float* piece = normed + panels(pixels) * PANEL * channels;
      __builtin_memset(panel, 0, PANEL * channels * sizeof(float));
      for (int64_t p = 0; p < count;) {
        const int64_t row = (first + p) / columns, column = (first + p) % columns;
        const int64_t run = least(count - p, columns - column);
        fill(op.x, n, (top + row) * width + left + column, run, piece);
        for (int64_t c = 0; c < channels; c++) {
          for (int64_t i = 0; i < run; i += WIDTH) {
            store_upto(panel + c * PANEL + p + i, load(piece + c * PANEL + i), run - i);
          }
        }
        p += run;
      }
    }
    normalise(panel, panel, channels, w.norm1_weight, w.norm1_bias, op.eps);
  }

  const int64_t size = plane_floats(rows, tile.right - tile.left);
  float* planes = normed + panels(pixels) * PANEL * channels + PANEL;  // over the piece, which is used up
  const int64_t groups = (end - begin + ROWS / 2 - 1) / (ROWS / 2);
  for (int64_t g = 0; g < groups; g++) {
    const int64_t c = begin + (end - begin) * g / groups, pairs = begin + (end - begin) * (g + 1) / groups - c;
    float* inside = planes + (tile.top == 0 ? columns : 0);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      multiply_panel(
          pairs, w.conv1_weight + c * channels, w.conv1_weight + (channels + c) * channels, channels,
          normed + first * channels, pixels - first, [&](auto& hidden, int step) __attribute__((always_inline)) {
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
  }
}

template <class T>
void naf_block_attention(const NAFBlock<T>& op, const float* mean, float* attention) {
  const int64_t channels = op.x.channels;
  for (int64_t i = 0; i < channels; i++) {
    vec total{};
    for (int64_t k = 0; k < channels; k += WIDTH) {
      total += load_upto(op.weights.sca_weight + i * channels + k, channels - k) * load_upto(mean + k, channels - k);
    }
    attention[i] = sum(total) + op.weights.sca_bias[i];
  }
}

// to = from + (weight @ x + bias) * scale, for the panels of `pixels` pixels, the weights of ROWS channels at a time.
inline void residual_convolution(
    const float* weight, const float* bias, const float* scale, int64_t channels, const float* x, const float* from,
    float* to, int64_t pixels) {
  const int64_t groups = (channels + ROWS - 1) / ROWS;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t c = channels * g / groups, end = channels * (g + 1) / groups, pairs = (end - c + 1) / 2;
    const int64_t second = end - pairs;  // an odd number of channels computes the middle one twice
    for (int64_t first = 0; first < pixels; first += PANEL) {
      multiply_panel(
          pairs, weight + c * channels, weight + second * channels, channels, x + first * channels, pixels - first,
          [&](auto& sums, int step) __attribute__((always_inline)) {
            constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) {
              const int64_t o = i < M / 2 ? c + i : second + i - M / 2, at = first * channels + o * PANEL;
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) {
                const int64_t here = at + (step + v) * WIDTH;
                store(to + here, load(from + here) + (sums[i][v] + bias[o]) * scale[o]);
              }
            }
          });
    }
  }
}

template <class T>
void naf_block_second(
    const NAFBlock<T>& op, int64_t n, const float* attention, int64_t begin, int64_t end, float* scratch) {
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels;
  const Images<const T> first_half{op.gated, channels, op.x.pixels, false};
  float *x = scratch, *y = x + SECOND_PANELS * PANEL * channels, *gated = y + SECOND_PANELS * PANEL * channels;
  for (int64_t i = begin; i < end; i += SECOND_PANELS) {
    const int64_t start = i * PANEL, pixels = least(least(end - i, SECOND_PANELS) * PANEL, op.x.pixels - start);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      const int64_t count = least(PANEL, pixels - first);
      fill(op.x, n, start + first, count, x + first * channels);
      float* panel = gated + first * channels;
      fill(first_half, n, start + first, count, panel);
      for (int64_t c = 0; c < channels; c++) {
        for (int s = 0; s < STEPS; s++) {
          store(panel + c * PANEL + s * WIDTH, load(panel + c * PANEL + s * WIDTH) * attention[c]);
        }
      }
    }
    residual_convolution(w.conv3_weight, w.conv3_bias, w.beta, channels, gated, x, y, pixels);
    float* normed = x;  // x has served
    for (int64_t first = 0; first < pixels; first += PANEL) {
      normalise(y + first * channels, normed + first * channels, channels, w.norm2_weight, w.norm2_bias, op.eps);
    }
    const int64_t groups = (channels + ROWS / 2 - 1) / (ROWS / 2);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t c = channels * g / groups, pairs = channels * (g + 1) / groups - c;
      for (int64_t first = 0; first < pixels; first += PANEL) {
        multiply_panel(
            pairs, w.conv4_weight + c * channels, w.conv4_weight + (channels + c) * channels, channels,
            normed + first * channels, pixels - first, [&](auto& sums, int step) __attribute__((always_inline)) {
              constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
#pragma GCC unroll 8
              for (int j = 0; j < M / 2; j++) {
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) {
                  const vec a = sums[j][v] + w.conv4_bias[c + j], b = sums[M / 2 + j][v] + w.conv4_bias[channels + c + j];
                  store(gated + first * channels + (c + j) * PANEL + (step + v) * WIDTH, a * b);
                }
              }
            });
      }
    }
    residual_convolution(w.conv5_weight, w.conv5_bias, w.gamma, channels, gated, y, x, pixels);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      spill(x + first * channels, op.y, n, start + first, least(PANEL, pixels - first));
    }
  }
}

}  // namespace r2r::R2R_ISA
