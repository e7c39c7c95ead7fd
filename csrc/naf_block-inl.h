// The stages of naf_block. Stage `gated` keeps a tile's normalised pixels. Of conv1's output it keeps the planes of up to
// ROWS channels at a time, which conv2 and the gate use up at once. What conv2 reads around the tile is computed again.
// Stage `result` keeps a few panels.
//
// The 1x1 convolutions multiply factors F: floats, or pairs of bfloat16 in dot products. All else is float.
#include "common/depthwise-inl.h"
#include "common/panel-inl.h"
#include "naf_block.h"

namespace r2r::R2R_ISA {

// A tile and the pixels around it that conv2 reads: rows [top, bottom) and columns [left, right) of the image.
struct Surrounded {
  int64_t top;
  int64_t bottom;
  int64_t left;
  int64_t right;
  int64_t columns;
  int64_t pixels;

  Surrounded(const Tile& tile, int64_t height, int64_t width)
      : top(tile.top > 0 ? tile.top - 1 : 0),
        bottom(least(tile.bottom + 1, height)),
        left(tile.left > 0 ? tile.left - 1 : 0),
        right(least(tile.right + 1, width)),
        columns(right - left),
        pixels((bottom - top) * columns) {}
};

// The normalised pixels of a tile, as panels. `narrow` is memory for a panel.
template <class F, class T>
inline void normalise_tile(const NAFBlock<T>& op, int64_t n, const Surrounded& tile, F* normed, F* narrow) {
  const int64_t channels = op.x.channels, depth = channels / VALUES_OF<F>, width = op.width;
  for (int64_t first = 0; first < tile.pixels; first += PANEL) {
    const int64_t count = least(PANEL, tile.pixels - first);
    F* panel = normed + first * depth;
    if (tile.columns == width) {
      load_panel(op.x, n, tile.top * width + first, count, panel);
    } else {  // a panel may run over several rows of the tile
      __builtin_memset(panel, 0, PANEL * depth * sizeof(F));
      for (int64_t p = 0; p < count;) {
        const int64_t row = (first + p) / tile.columns, column = (first + p) % tile.columns;
        const int64_t run = least(count - p, tile.columns - column);
        load_panel(op.x, n, (tile.top + row) * width + tile.left + column, run, narrow);
        for (int64_t k = 0; k < depth; k++) {
          __builtin_memcpy(panel + k * PANEL + p, narrow + k * PANEL, run * sizeof(F));
        }
        p += run;
      }
    }
    normalise(panel, panel, channels, op.weights[NORM1_WEIGHT], op.weights[NORM1_BIAS], op.eps);
  }
}

// Rows of a plane, `columns` apart, as rows of an image of that width.
template <class T>
inline void store_rows(const float* from, int64_t columns, int64_t rows, int64_t count, T* to, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t p = 0; p < count; p += WIDTH) store_upto(to + r * width + p, load(from + r * columns + p), count - p);
  }
}

template <class F, class T>
void make_gated(
    const NAFBlock<T>& op, const F* conv1, int64_t n, const Tile& tile, int64_t begin, int64_t end, float* sums) {
  const Parameters<const float>& w = op.weights;
  const int64_t channels = op.x.channels, depth = channels / VALUES_OF<F>, width = op.width, height = op.height;
  const Surrounded around(tile, height, width);
  const int64_t columns = around.columns, pixels = around.pixels, rows = tile.bottom - tile.top;
  const int64_t size = plane_floats(rows, tile.right - tile.left);
  // The planes lie over the narrow panel, which is used up when they are made.
  const int64_t panel_floats = PANEL * depth * sizeof(F) / sizeof(float), planes_floats = ROWS * size;
  const auto [panels_at, rest] =
      scratch_parts(panels(pixels) * panel_floats, panel_floats > planes_floats ? panel_floats : planes_floats);
  F* normed = (F*)panels_at;
  normalise_tile(op, n, around, normed, (F*)rest);

  float* planes = rest + PANEL;
  for_blocks(end - begin, ROWS / 2, 1, [&](int64_t from, int64_t to) {
    const int64_t c = begin + from, pairs = to - from;
    float* inside = planes + (tile.top == 0 ? columns : 0);
    const float *bias_a = w[CONV1_BIAS] + c, *bias_b = bias_a + channels;
    multiply(
        pairs, conv1 + c * depth, conv1 + (channels + c) * depth, depth, normed, pixels,
        [=](auto& hidden, int64_t pixel) __attribute__((always_inline)) {
          constexpr int M = sizeof(hidden) / sizeof(hidden[0]), V = sizeof(hidden[0]) / sizeof(vec);
          unrolled<M>([&](auto i) __attribute__((always_inline)) {
            const float bias = i < M / 2 ? bias_a[i] : bias_b[i - M / 2];
            unrolled<V>([&](auto v) __attribute__((always_inline)) {
              store(inside + i * size + pixel + v * WIDTH, hidden[i][v] + bias);
            });
          });
        });
    for (int64_t i = 0; i < 2 * pairs; i++) {  // conv2 pads conv1's output with zeros
      float* plane = planes + i * size;
      if (tile.top == 0) __builtin_memset(plane, 0, columns * sizeof(float));
      if (tile.bottom == height) __builtin_memset(plane + (rows + 1) * columns, 0, columns * sizeof(float));
    }
    for (int64_t i = 0; op.kept.conv1 && i < 2 * pairs; i++) {
      const int64_t channel = i < pairs ? c + i : channels + c + i - pairs;
      store_rows(
          planes + i * size + columns + tile.left - around.left, columns, rows, tile.right - tile.left,
          op.kept.conv1 + (n * 2 * channels + channel) * op.x.pixels + tile.top * width + tile.left, width);
    }
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t a = c + i, b = channels + a;
      sums[a] = sum(gate_planes(
          planes + i * size, planes + (pairs + i) * size, columns, tile.left - around.left, tile.right - around.left, rows,
          w[CONV2_WEIGHT] + a * 9, w[CONV2_WEIGHT] + b * 9, w[CONV2_BIAS][a], w[CONV2_BIAS][b],
          op.gated + (n * channels + a) * op.x.pixels + tile.top * width + tile.left, width));
    }
  });
}

template <class T>
void naf_block_gated(const NAFBlock<T>& op, int64_t n, const Tile& tile, int64_t begin, int64_t end, float* sums) {
  if constexpr (MULTIPLIES_PAIRS<T>) {
    if (op.pairs) return make_gated(op, (const Pair*)op.matrices[CONV1_WEIGHT], n, tile, begin, end, sums);
  }
  make_gated(op, op.weights[CONV1_WEIGHT], n, tile, begin, end, sums);
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

template <class T>
void local_attention(const LocalAttention<T>& op, int64_t n, int64_t begin, int64_t end) {
  const int64_t channels = op.gated.channels, pixels = op.gated.pixels;
  const auto parts = scratch_parts(channels * PANEL, channels * PANEL, channels * PANEL);
  float *const mean = parts[0], *const gated = parts[1], *const attended = parts[2];
  const Images<const T> before{op.gated.data, channels, pixels, false};
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * PANEL, count = least(PANEL, pixels - first);
    load_panel(op.mean, n, first, count, mean);
    load_panel(before, n, first, count, gated);
    for_blocks(channels, ROWS, 1, [&](int64_t c, int64_t stop) {
      const int64_t pairs = (stop - c + 1) / 2, second = stop - pairs;  // of an odd number, the middle one is computed twice
      multiply(
          pairs, op.weight + c * channels, op.weight + second * channels, channels, mean, count,
          [=, bias = op.bias](auto& sums, int64_t pixel) __attribute__((always_inline)) {
            constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
            unrolled<M>([&](auto m) __attribute__((always_inline)) {
              const int64_t o = m < M / 2 ? c + m : second + m - M / 2;
              unrolled<V>([&](auto v) __attribute__((always_inline)) {
                const int64_t at = o * PANEL + pixel + v * WIDTH;
                store(attended + at, load(gated + at) * (sums[m][v] + bias[o]));
              });
            });
          });
    });
    store_panel(attended, op.gated, n, first, count);
  }
}

constexpr int64_t RESULT_PANELS = 4;  // that stage `result` takes at a time, so that weights are read once for all of them

// gated * attention of `pixels` pixels from `start` on, as factors.
template <class F, class T>
inline void attend(const NAFBlock<T>& op, int64_t n, const float* attention, int64_t start, int64_t pixels, F* attended) {
  constexpr int UNIT = VALUES_OF<F>;
  const int64_t channels = op.x.channels, depth = channels / UNIT;
  for (int64_t c = 0; c < channels; c += UNIT) {
    const T* from = op.gated + (n * channels + c) * op.x.pixels + start;
    for (int64_t p = 0; p < pixels; p += WIDTH) {
      put<UNIT>(attended + p / PANEL * PANEL * depth + p % PANEL, c, [&](int i) __attribute__((always_inline)) {
        const T* at = from + i * op.x.pixels + p;
        __builtin_prefetch(at + RESULT_PANELS * PANEL);  // more planes than the processor's prefetchers follow
        return load_upto(at, pixels - p) * attention[c + i];
      });
    }
  }
}

// gate(conv4(normed)) of `pixels` pixels. Conv4's output is kept where `kept`, of planes of `plane` values, is not nullptr.
template <class F, class T>
inline void gate_of_conv4(
    const F* conv4, const float* bias, int64_t channels, const F* normed, F* gated, int64_t pixels, T* kept, int64_t plane) {
  constexpr int UNIT = VALUES_OF<F>;
  const int64_t depth = channels / UNIT;
  for_blocks(channels, ROWS / 2, UNIT, [&](int64_t c, int64_t stop) {
    const float *bias_a = bias + c, *bias_b = bias_a + channels;
    multiply(
        stop - c, conv4 + c * depth, conv4 + (channels + c) * depth, depth, normed, pixels,
        [=](auto& sums, int64_t pixel) __attribute__((always_inline)) {
          constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
          if (kept) {
            unrolled<M>([&](auto i) __attribute__((always_inline)) {
              const int64_t row = i < M / 2 ? c + i : channels + c + i - M / 2;
              unrolled<V>([&](auto v) __attribute__((always_inline)) {
                const int64_t at = pixel + v * WIDTH;
                store_upto(kept + row * plane + at, sums[i][v] + bias[row], pixels - at);
              });
            });
          }
          if constexpr (M / 2 % UNIT == 0) {
            F* to = gated + pixel / PANEL * PANEL * depth + pixel % PANEL;
            unrolled<M / 2 / UNIT>([&](auto unit) __attribute__((always_inline)) {
              constexpr int j = unit * UNIT;
              unrolled<V>([&](auto v) __attribute__((always_inline)) {
                put<UNIT>(to + v * WIDTH, c + j, [&](int i) __attribute__((always_inline)) {
                  return (sums[j + i][v] + bias_a[j + i]) * (sums[M / 2 + j + i][v] + bias_b[j + i]);
                });
              });
            });
          }
        });
  });
}

template <class F, class T>
void make_result(
    const NAFBlock<T>& op, const F* conv3, const F* conv4, const F* conv5, int64_t n, const float* attention, int64_t begin,
    int64_t end) {
  const Parameters<const float>& w = op.weights;
  const int64_t channels = op.x.channels, depth = channels / VALUES_OF<F>, size = RESULT_PANELS * PANEL * channels;
  const auto [y, second, third] = scratch_parts(size, size, size);
  F *const x = (F*)second, *const gated = (F*)third;
  for (int64_t start = begin; start < end; start += RESULT_PANELS * PANEL) {
    const int64_t pixels = least(end - start, RESULT_PANELS * PANEL);
    if (attention == nullptr) {
      for (int64_t first = 0; first < pixels; first += PANEL) {
        load_panel(op.x, n, start + first, least(PANEL, pixels - first), y + first * channels);
      }
    } else {
      for (int64_t first = 0; first < pixels; first += PANEL) {
        load_panel(op.x, n, start + first, least(PANEL, pixels - first), x + first * depth);
      }
      attend(op, n, attention, start, pixels, gated);
      residual_convolution(conv3, w[CONV3_BIAS], w[BETA], channels, gated, x, y, pixels);
    }
    for (int64_t first = 0; op.kept.y && first < pixels; first += PANEL) {
      const Images<T> kept{op.kept.y, channels, op.x.pixels, false};
      store_panel(y + first * channels, kept, n, start + first, least(PANEL, pixels - first));
    }
    F* normed = x;  // x has served
    for (int64_t first = 0; first < pixels; first += PANEL) {
      normalise(y + first * channels, normed + first * depth, channels, w[NORM2_WEIGHT], w[NORM2_BIAS], op.eps);
    }
    T* of_conv4 = op.kept.conv4 ? op.kept.conv4 + n * 2 * channels * op.x.pixels + start : nullptr;
    gate_of_conv4(conv4, w[CONV4_BIAS], channels, normed, gated, pixels, of_conv4, op.x.pixels);
    F* result = x;
    residual_convolution(conv5, w[CONV5_BIAS], w[GAMMA], channels, gated, y, result, pixels);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      store_panel(result + first * depth, op.result, n, start + first, least(PANEL, pixels - first));
    }
  }
}

template <class T>
void naf_block_result(const NAFBlock<T>& op, int64_t n, const float* attention, int64_t begin, int64_t end) {
  const auto with = [&](const auto* conv3, const auto* conv4, const auto* conv5) {
    make_result(op, conv3, conv4, conv5, n, attention, begin, end);
  };
  if constexpr (MULTIPLIES_PAIRS<T>) {
    const auto pairs = [&](Parameter p) { return (const Pair*)op.matrices[p]; };
    if (op.pairs) return with(pairs(CONV3_WEIGHT), pairs(CONV4_WEIGHT), pairs(CONV5_WEIGHT));
  }
  with(op.weights[CONV3_WEIGHT], op.weights[CONV4_WEIGHT], op.weights[CONV5_WEIGHT]);
}

template <class T>
constexpr NAFBlockKernels<T> naf_block_kernels{
    .pairs = MULTIPLIES_PAIRS<T>,
    .gated = naf_block_gated<T>,
    .attention = naf_block_attention<T>,
    .local_attention = local_attention<T>,
    .result = naf_block_result<T>,
};
R2R_DEFINE_KERNELS(NAFBlockKernels, naf_block_kernels)

}  // namespace r2r::R2R_ISA
