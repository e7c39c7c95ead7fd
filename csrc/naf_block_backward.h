// Backward of a NAF block from its input alone, in sweeps over panels with the depthwise gate and its backward between:
// norm and conv1 again; the second half, made again and taken back pixel by pixel; norm and conv1 taken back.
//
// Weight gradients are sums over pixels of products of channels: a panel of one factor is transposed, so that vectors hold
// channels, and ROWS channels of the other are multiplied with it.
//
// Panels are floats. What products multiply (F) are these, or pairs of bfloat16 made of them.
#pragma once

#include "layer_norm_2d.h"
#include "naf_block.h"

namespace r2r::R2R_ISA {

// epilogue(row, pixel, vector of weight @ x) for the panels of `pixels` pixels, the weights of ROWS rows at a time.
template <class F, class Epilogue>
inline void multiply_panels(
    const F* weight, int64_t rows, int64_t depth, const F* x, int64_t pixels, const Epilogue& epilogue) {
  pieces(rows, ROWS, 1, [&](int64_t r, int64_t end) {
    const int64_t pairs = (end - r + 1) / 2, second = end - pairs;  // of an odd number, the middle one is computed twice
    for (int64_t first = 0; first < pixels; first += PANEL) {
      multiply_panel(
          pairs, weight + r * depth, weight + second * depth, depth, x + first * depth, pixels - first,
          [&](auto& sums, int step) __attribute__((always_inline)) {
            constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) {
              if (i == M / 2 && second < r + M / 2) continue;
              const int64_t row = i < M / 2 ? r + i : second + i - M / 2;
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) epilogue(row, first + (step + v) * WIDTH, sums[i][v]);
            }
          });
    }
  });
}

// Where pixel `pixel` of channel c lies in panels of `channels` channels.
inline int64_t place(int64_t c, int64_t channels, int64_t pixel) {
  return (pixel / PANEL * channels + c) * PANEL + pixel % PANEL;
}

// Panels of `pixels` pixels; of a plane, all of them at once.
template <class T>
inline void fill_panels(const Images<const T>& x, int64_t n, int64_t start, int64_t pixels, float* panels) {
  if (x.channels_last || pixels % PANEL) {
    for (int64_t first = 0; first < pixels; first += PANEL) {
      fill(x, n, start + first, least(PANEL, pixels - first), panels + first * x.channels);
    }
    return;
  }
  for (int64_t c = 0; c < x.channels; c++) {
    const T* plane = x.image(n) + c * x.pixels + start;
    for (int64_t p = 0; p < pixels; p += WIDTH) store(panels + place(c, x.channels, p), load(plane + p));
  }
}

template <class T>
inline void spill_panels(const float* panels, const Images<T>& y, int64_t n, int64_t start, int64_t pixels) {
  if (y.channels_last) {
    for (int64_t first = 0; first < pixels; first += PANEL) {
      spill(panels + first * y.channels, y, n, start + first, least(PANEL, pixels - first));
    }
    return;
  }
  for (int64_t c = 0; c < y.channels; c++) {
    T* plane = y.image(n) + c * y.pixels + start;
    for (int64_t p = 0; p < pixels; p += WIDTH) store_upto(plane + p, load(panels + place(c, y.channels, p)), pixels - p);
  }
}

inline void add_panels(const float* from, float* to, int64_t channels, int64_t pixels) {
  for (int64_t i = 0; i < panels(pixels) * PANEL * channels; i += WIDTH) store(to + i, load(to + i) + load(from + i));
}

// Panels of `pixels` pixels as factors, for products over channels and for those over pixels: floats are factors as they
// are, pairs go into memory. (Behind an odd number of pixels, a pair's second is 0 in one of the factors, the gradient.)
inline const float* factors_of_channels(const float* panels, int64_t, int64_t, float*) {
  return panels;
}
inline const float* factors_of_pixels(const float* panels, int64_t, int64_t, float*) {
  return panels;
}
#if defined(__AVX512BF16__)
inline const Pair* factors_of_channels(const float* panels, int64_t channels, int64_t pixels, Pair* memory) {
  for (int64_t first = 0; first < pixels; first += PANEL) {
    for (int64_t c = 0; c < channels; c += 2) {
      for (int s = 0; s < STEPS; s++) {
        const float* even = panels + place(c, channels, first) + s * WIDTH;
        put<2>(memory + first * channels / 2 + s * WIDTH, c, [&](int i) { return load(even + i * PANEL); });
      }
    }
  }
  return memory;
}
inline const Pair* factors_of_pixels(const float* from, int64_t channels, int64_t pixels, Pair* memory) {
  bfloat16* to = (bfloat16*)memory;
  for (int64_t i = 0; i < panels(pixels) * PANEL * channels; i += WIDTH) store(to + i, load(from + i));
  return memory;
}
#endif

template <class F>
constexpr int64_t ROW = PANEL / VALUES_OF<F>;  // factors of pixels, of a channel of a panel

// Factors of pixels as blocks of WIDTH channels, each [factors, WIDTH]; of the last block's, some are 0.
template <class F>
inline void transpose_panels(const F* rows, int64_t channels, int64_t factors, F* blocks) {
  for (int64_t c = 0; c < channels; c += WIDTH) {
    for (int64_t first = 0; first < factors; first += ROW<F>) {
      transpose_rows(
          (const float*)rows + first * channels + c * ROW<F>, ROW<F>, (float*)blocks + c * factors + first * WIDTH, WIDTH,
          least(WIDTH, channels - c), least(ROW<F>, factors - first), WIDTH);
    }
  }
}

template <int M, int V, class F>
inline void add_products_of_rows(
    const F* rows, int64_t panel, const F* blocks, int64_t factors, float* sums, int64_t stride) {
  vec products[M][V] = {};
  for (int i = 0; i < M; i++) {  // of many channels, they are larger than the caches
    for (int v = 0; v < V; v++) __builtin_prefetch(sums + i * stride + v * WIDTH, 1);
  }
  for (int64_t first = 0; first < factors; first += ROW<F>) {
    const int64_t count = least(ROW<F>, factors - first);
    const F *row = rows + first / ROW<F> * panel, *block = blocks + first * WIDTH;
    for (int64_t k = 0; k < count; k++) {
      vec x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) x[v] = load(block + (v * factors + k) * WIDTH);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const F value = row[i * ROW<F> + k];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) products[i][v] = multiply_add(value, x[v], products[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* to = sums + i * stride + v * WIDTH;
      store(to, load(to) + products[i][v]);
    }
  }
}

template <int M, int V, class F>
inline void add_products_of(
    int64_t count, const F* rows, int64_t panel, const F* blocks, int64_t factors, float* sums, int64_t stride) {
  if (count == M) {
    add_products_of_rows<M, V>(rows, panel, blocks, factors, sums, stride);
  } else if constexpr (M > 1) {
    add_products_of<M - 1, V>(count, rows, panel, blocks, factors, sums, stride);
  }
}

// Of a convolution from x [inputs] to y [outputs], given as panels: sums [outputs, padded(inputs)] += the products of every
// channel of dy with every channel of x, summed over pixels; lanes [outputs, LANES] += dy.
template <class F>
inline void add_products(
    const float* dy, int64_t outputs, const float* x, int64_t inputs, int64_t pixels, F* memory, F* blocks, float* sums,
    float* lanes) {
  const int64_t stride = padded(inputs), factors = (pixels + VALUES_OF<F> - 1) / VALUES_OF<F>;
  transpose_panels(factors_of_pixels(x, inputs, pixels, memory), inputs, factors, blocks);
  const F* rows = factors_of_pixels(dy, outputs, pixels, memory);
  for (int64_t c = 0; c < inputs; c += 2 * WIDTH) {
    pieces(outputs, ROWS, 1, [&](int64_t r, int64_t end) {
      const int64_t count = end - r;
      const F *row = rows + r * ROW<F>, *block = blocks + c * factors;
      float* to = sums + r * stride + c;
      if (c + WIDTH < inputs) {
        add_products_of<ROWS, 2>(count, row, outputs * ROW<F>, block, factors, to, stride);
      } else {
        add_products_of<ROWS, 1>(count, row, outputs * ROW<F>, block, factors, to, stride);
      }
    });
  }
  for (int64_t c = 0; c < outputs; c++) {
    vec total{};
    for (int64_t pixel = 0; pixel < pixels; pixel += WIDTH) total += load(dy + place(c, outputs, pixel));
    store(lanes + c * LANES, load(lanes + c * LANES) + total);
  }
}

// Norm and conv1 of panels [begin, end) of image n, to op.hidden.
template <class F, class T>
void hidden_sweep(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, int64_t begin, int64_t end,
    float* scratch) {
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels, most = backward_panels(channels);
  T* hidden = op.hidden + n * 2 * channels * op.x.pixels;
  F* memory = (F*)(scratch + most * PANEL * channels);
  for (int64_t i = begin; i < end; i += most) {
    const int64_t start = i * PANEL, pixels = least(least(end - i, most) * PANEL, op.x.pixels - start);
    fill_panels(op.x, n, start, pixels, scratch);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      float* panel = scratch + first * channels;
      normalise(panel, panel, channels, w.norm1_weight, w.norm1_bias, op.eps);
    }
    multiply_panels(
        products.conv1, 2 * channels, channels / VALUES_OF<F>, factors_of_channels(scratch, channels, pixels, memory),
        pixels, [&](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
          store_upto(hidden + row * op.x.pixels + start + pixel, value + w.conv1_bias[row], pixels - pixel);
        });
  }
}

// Norm and convolution of panels, taken back: from the gradient of the convolution's output, twice as many channels, to that
// of the norm's input x, which becomes the normalised x.
template <class F>
inline void normed_convolution_backward(
    const F* transposed, const float* dhidden, int64_t channels, int64_t pixels, const float* norm_weight,
    const vec (*mean)[STEPS], const vec (*rstd)[STEPS], F* memory, float* x, float* dx, float* dweight, float* dbias) {
  multiply_panels(
      transposed, channels, 2 * channels / VALUES_OF<F>, factors_of_channels(dhidden, 2 * channels, pixels, memory), pixels,
      [&](int64_t row, int64_t pixel, vec value)
          __attribute__((always_inline)) { store(dx + place(row, channels, pixel), value); });
  for (int64_t p = 0; p * PANEL < pixels; p++) {
    const int64_t at = p * PANEL * channels, count = least(PANEL, pixels - p * PANEL);
    normalise_backward(dx + at, x + at, channels, count, norm_weight, mean[p], rstd[p], dweight, dbias);
  }
}

// The second half of panels [begin, end) of image n, from the gated channels: op.dy gets the gradient of the second half's
// residual, op.gated that of what the attention scaled, dattention [channels] that of the attention, from these panels.
// Without attention (nullptr) x is the second half's residual, and op.dx gets its gradient.
template <class F, class T>
void second_backward_sweep(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, const float* attention, int64_t begin,
    int64_t end, float* dattention, const NAFBlockSums& sums, float* scratch) {
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels, most = backward_panels(channels), size = most * PANEL * channels;
  const int64_t depth = channels / VALUES_OF<F>;
  const Images<const T> gated{op.gated, channels, op.x.pixels, false};
  const Images<T> residual{op.dy, channels, op.x.pixels, false};
  T* dattended = attention ? op.gated + n * channels * op.x.pixels : nullptr;
  float *y = scratch, *normed = y + size, *hidden = normed + size, *gate = hidden + 2 * size, *dy = gate + size;
  float *first_half = dy + size, *lanes = first_half + size;
  F *memory = (F*)(lanes + channels * LANES), *blocks = memory + size;
  for (int64_t c = 0; c < channels; c++) store(lanes + c * LANES, vec{});
  vec mean[MOST_BACKWARD_PANELS][STEPS], rstd[MOST_BACKWARD_PANELS][STEPS];

  for (int64_t i = begin; i < end; i += most) {
    const int64_t start = i * PANEL, pixels = least(least(end - i, most) * PANEL, op.x.pixels - start);
    const auto attend = [&](float* to) {
      for (int64_t first = 0; first < pixels; first += PANEL) {
        for (int64_t c = 0; c < channels; c++) {
          const int64_t at = place(c, channels, first);
          for (int s = 0; s < STEPS; s++) store(to + at + s * WIDTH, load(first_half + at + s * WIDTH) * attention[c]);
        }
      }
    };
    fill_panels(op.dz, n, start, pixels, dy);
    fill_panels(op.x, n, start, pixels, attention ? normed : y);
    if (attention) {
      fill_panels(gated, n, start, pixels, first_half);
      attend(gate);
      residual_convolution(
          products.conv3, w.conv3_bias, w.beta, channels, factors_of_channels(gate, channels, pixels, memory), normed, y,
          pixels);
    }
    for (int64_t p = 0; p * PANEL < pixels; p++) {
      const float* panel = y + p * PANEL * channels;
      statistics(panel, channels, op.eps, mean[p], rstd[p]);
      normalise(panel, normed + p * PANEL * channels, channels, w.norm2_weight, w.norm2_bias, mean[p], rstd[p]);
    }
    multiply_panels(
        products.conv4, 2 * channels, depth, factors_of_channels(normed, channels, pixels, memory), pixels,
        [&](int64_t row, int64_t pixel, vec value)
            __attribute__((always_inline)) { store(hidden + place(row, 2 * channels, pixel), value + w.conv4_bias[row]); });
    for (int64_t first = 0; first < pixels; first += PANEL) {
      const float *a = hidden + 2 * first * channels, *b = a + channels * PANEL;
      for (int64_t j = 0; j < channels * PANEL; j += WIDTH) store(gate + first * channels + j, load(a + j) * load(b + j));
    }

    add_products(dy, channels, gate, channels, pixels, memory, blocks, sums.conv5_weight, sums.conv5_bias);
    multiply_panels(
        products.transposed_conv5, channels, depth, factors_of_channels(dy, channels, pixels, memory), pixels,
        [&](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
          float *a = hidden + place(row, 2 * channels, pixel), *b = a + channels * PANEL;
          const vec first = load(a);
          store(a, value * load(b));
          store(b, value * first);
        });
    add_products(hidden, 2 * channels, normed, channels, pixels, memory, blocks, sums.conv4_weight, sums.conv4_bias);
    float* dnormed = normed;
    normed_convolution_backward(
        products.transposed_conv4, hidden, channels, pixels, w.norm2_weight, mean, rstd, memory, y, dnormed,
        sums.norm2_weight, sums.norm2_bias);
    add_panels(dnormed, dy, channels, pixels);
    spill_panels(dy, attention ? residual : op.dx, n, start, pixels);
    if (!attention) continue;

    attend(gate);
    add_products(dy, channels, gate, channels, pixels, memory, blocks, sums.conv3_weight, sums.conv3_bias);
    multiply_panels(
        products.transposed_conv3, channels, depth, factors_of_channels(dy, channels, pixels, memory), pixels,
        [&](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
          const vec product = value * load(first_half + place(row, channels, pixel));  // 0 behind the last pixel
          store(lanes + row * LANES, load(lanes + row * LANES) + product);
          store_upto(dattended + row * op.x.pixels + start + pixel, value, pixels - pixel);
        });
  }
  for (int64_t c = 0; attention && c < channels; c++) dattention[c] = sum(load(lanes + c * LANES));
}

// Conv1 and norm of panels [begin, end) of image n, from the gradient of op.hidden, and the residual.
template <class F, class T>
void first_backward_sweep(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, int64_t begin, int64_t end,
    const NAFBlockSums& sums, float* scratch) {
  const NAFBlockWeights& w = op.weights;
  const int64_t channels = op.x.channels, most = backward_panels(channels), size = most * PANEL * channels;
  const Images<const T> dhidden{op.dhidden, 2 * channels, op.x.pixels, false};
  const Images<const T> residual{op.dy, channels, op.x.pixels, false};
  float *x = scratch, *normed = x + size, *hidden = normed + size;
  F *memory = (F*)(hidden + 2 * size), *blocks = memory + size;
  vec mean[MOST_BACKWARD_PANELS][STEPS], rstd[MOST_BACKWARD_PANELS][STEPS];
  for (int64_t i = begin; i < end; i += most) {
    const int64_t start = i * PANEL, pixels = least(least(end - i, most) * PANEL, op.x.pixels - start);
    fill_panels(op.x, n, start, pixels, x);
    fill_panels(dhidden, n, start, pixels, hidden);
    for (int64_t p = 0; p * PANEL < pixels; p++) {
      const int64_t at = p * PANEL * channels;
      statistics(x + at, channels, op.eps, mean[p], rstd[p]);
      normalise(x + at, normed + at, channels, w.norm1_weight, w.norm1_bias, mean[p], rstd[p]);
    }
    add_products(hidden, 2 * channels, normed, channels, pixels, memory, blocks, sums.conv1_weight, sums.conv1_bias);
    float* dnormed = normed;
    normed_convolution_backward(
        products.transposed_conv1, hidden, channels, pixels, w.norm1_weight, mean, rstd, memory, x, dnormed,
        sums.norm1_weight, sums.norm1_bias);
    float* dx = hidden;
    fill_panels(residual, n, start, pixels, dx);
    add_panels(dnormed, dx, channels, pixels);
    spill_panels(dx, op.dx, n, start, pixels);
  }
}

// body(products), in floats or in pairs.
template <class T, class Body>
inline void with_products(const NAFBlockBackward<T>& op, const Body& body) {
  if constexpr (MULTIPLIES_PAIRS<T>) {
    const auto pairs = [](const T* matrix) { return (const Pair*)matrix; };
    const NAFBlockProducts<T>& p = op.in_pairs;
    if (op.pairs) {
      return body(
          NAFBlockProducts<Pair>{
              pairs(p.conv1), pairs(p.conv3), pairs(p.conv4), pairs(p.transposed_conv1), pairs(p.transposed_conv3),
              pairs(p.transposed_conv4), pairs(p.transposed_conv5)});
    }
  }
  body(op.products);
}

template <class T>
void naf_block_hidden(const NAFBlockBackward<T>& op, int64_t n, int64_t begin, int64_t end, float* scratch) {
  with_products(op, [&](const auto& products) { hidden_sweep(op, products, n, begin, end, scratch); });
}

template <class T>
void naf_block_second_backward(
    const NAFBlockBackward<T>& op, int64_t n, const float* attention, int64_t begin, int64_t end, float* dattention,
    const NAFBlockSums& sums, float* scratch) {
  with_products(op, [&](const auto& products) {
    second_backward_sweep(op, products, n, attention, begin, end, dattention, sums, scratch);
  });
}

template <class T>
void naf_block_first_backward(
    const NAFBlockBackward<T>& op, int64_t n, int64_t begin, int64_t end, const NAFBlockSums& sums, float* scratch) {
  with_products(op, [&](const auto& products) { first_backward_sweep(op, products, n, begin, end, sums, scratch); });
}

// Rows [begin, end) of a matrix [rows, columns], each times its scale (nullptr: 1), as columns of to [columns, rows].
template <class T>
void transpose_matrix(
    const T* matrix, const float* scale, int64_t rows, int64_t columns, int64_t begin, int64_t end, T* to) {
  float scaled[WIDTH * WIDTH];
  for (int64_t r = begin; r < end; r += WIDTH) {
    const int64_t count = least(WIDTH, end - r);
    for (int64_t c = 0; c < columns; c += WIDTH) {
      const int64_t width = least(WIDTH, columns - c);
      for (int64_t i = 0; i < count; i++) {
        const vec row = load_upto(matrix + (r + i) * columns + c, width);
        store(scaled + i * WIDTH, scale ? row * scale[r + i] : row);
      }
      transpose_rows(scaled, WIDTH, to + c * rows + r, rows, count, width, count);
    }
  }
}

}  // namespace r2r::R2R_ISA
