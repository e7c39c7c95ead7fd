// The gradients of naf_block over panels. Weight gradients are sums over pixels of products of channels: a panel of one
// factor is transposed, so that vectors hold channels, and ROWS channels of the other factor are multiplied with it.
//
// Panels are floats. Products multiply factors F: these floats, or pairs of bfloat16 made of them.
#include "naf_block_backward.h"

#include "common/panel-inl.h"

namespace r2r::R2R_ISA {

// epilogue(row, pixel, vector of weight @ x) for the panels of `pixels` pixels, the weights of ROWS rows at a time.
template <class F, class Epilogue>
inline void multiply_panels(
    const F* weight, int64_t rows, int64_t depth, const F* x, int64_t pixels, const Epilogue& epilogue) {
  for_blocks(rows, ROWS, 2, [&](int64_t r, int64_t end) {
    const int64_t pairs = (end - r + 1) / 2, second = end - pairs;  // of an odd number, the middle one is computed twice
    multiply(
        pairs, weight + r * depth, weight + second * depth, depth, x, pixels,
        [=](auto& sums, int64_t pixel) __attribute__((always_inline)) {
          constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
          unrolled<M>([&](auto i) __attribute__((always_inline)) {
            if (i == M / 2 && second < r + M / 2) return;
            const int64_t row = i < M / 2 ? r + i : second + i - M / 2;
            unrolled<V>([&](auto v) __attribute__((always_inline)) { epilogue(row, pixel + v * WIDTH, sums[i][v]); });
          });
        });
  });
}

// Where pixel `pixel` of channel c lies in panels of `channels` channels.
inline int64_t place(int64_t c, int64_t channels, int64_t pixel) {
  return (pixel / PANEL * channels + c) * PANEL + pixel % PANEL;
}

// Fills the panels of `pixels` pixels. Of NCHW each plane is read in one run.
template <class T>
inline void load_panels(const Images<const T>& x, int64_t n, int64_t start, int64_t pixels, float* panels) {
  if (x.channels_last || pixels % PANEL) {
    for (int64_t first = 0; first < pixels; first += PANEL) {
      load_panel(x, n, start + first, least(PANEL, pixels - first), panels + first * x.channels);
    }
    return;
  }
  for (int64_t c = 0; c < x.channels; c++) {
    const T* plane = x.image(n) + c * x.pixels + start;
    for (int64_t p = 0; p < pixels; p += PANEL) {
      float* to = panels + place(c, x.channels, p);
      for (int s = 0; s < STEPS; s++) {
        __builtin_prefetch(plane + x.pixels + p + s * WIDTH);
        store(to + s * WIDTH, load(plane + p + s * WIDTH));
      }
    }
  }
}

template <class T>
inline void store_panels(const float* panels, const Images<T>& y, int64_t n, int64_t start, int64_t pixels) {
  if (y.channels_last) {
    for (int64_t first = 0; first < pixels; first += PANEL) {
      store_panel(panels + first * y.channels, y, n, start + first, least(PANEL, pixels - first));
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

// The panels of `pixels` pixels as factors of products over channels, or over pixels. Floats are factors as they are. Pairs
// are written to memory. (If the number of pixels is odd, the last pair's second value is 0 in one of the factors, the
// gradient.)
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
constexpr int64_t ROW = PANEL / VALUES_OF<F>;  // factors of pixels in a channel of a panel

// Transposes factors of pixels to blocks of WIDTH channels, each [factors, WIDTH]. The last block is filled up with zeros.
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
  vec products[M][V];
  unrolled<M * V>([&](auto i) __attribute__((always_inline)) { products[i / V][i % V] = vec{}; });
  for (int i = 0; i < M; i++) {  // the sums of many channels are larger than the caches
    for (int v = 0; v < V; v++) __builtin_prefetch(sums + i * stride + v * WIDTH, 1);
  }
  for (int64_t first = 0; first < factors; first += ROW<F>) {
    const int64_t count = least(ROW<F>, factors - first);
    const F *row = rows + first / ROW<F> * panel, *block = blocks + first * WIDTH;
    for (int64_t k = 0; k < count; k++) {
      vec x[V];
      unrolled<V>([&](auto v) __attribute__((always_inline)) { x[v] = load(block + (v * factors + k) * WIDTH); });
      unrolled<M>([&](auto i) __attribute__((always_inline)) {
        const F value = row[i * ROW<F> + k];
        unrolled<V>([&](auto v)
                        __attribute__((always_inline)) { products[i][v] = multiply_add(value, x[v], products[i][v]); });
      });
    }
  }
  unrolled<M * V>([&](auto i) __attribute__((always_inline)) {
    float* to = sums + i / V * stride + i % V * WIDTH;
    store(to, load(to) + products[i / V][i % V]);
  });
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

// The sums of a 1x1 convolution from x to y, both given as panels. sums [outputs, padded(inputs)] += products of every
// channel of dy with every channel of x, summed over pixels. lanes [outputs, LANES] += dy.
template <class F>
inline void add_products(
    const float* dy, int64_t outputs, const float* x, int64_t inputs, int64_t pixels, F* memory, F* blocks, float* sums,
    float* lanes) {
  const int64_t stride = padded(inputs), factors = (pixels + VALUES_OF<F> - 1) / VALUES_OF<F>;
  transpose_panels(factors_of_pixels(x, inputs, pixels, memory), inputs, factors, blocks);
  const F* rows = factors_of_pixels(dy, outputs, pixels, memory);
  for (int64_t c = 0; c < inputs; c += 2 * WIDTH) {
    for_blocks(outputs, ROWS, 1, [&](int64_t r, int64_t end) {
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

// body(start, pixels) for panels [begin, end) of an image of `all` pixels, as many panels at a time as a stage takes.
template <class Body>
inline void for_panels(int64_t begin, int64_t end, int64_t channels, int64_t all, const Body& body) {
  const int64_t most = backward_panels(channels);
  for (int64_t i = begin; i < end; i += most) {
    const int64_t start = i * PANEL;
    body(start, least(least(end - i, most) * PANEL, all - start));
  }
}

// Mean and reciprocal standard deviation of the pixels of some panels.
struct Statistics {
  vec mean[MOST_BACKWARD_PANELS][STEPS];
  vec rstd[MOST_BACKWARD_PANELS][STEPS];
};

inline void normalise_panels(
    const float* from, float* to, int64_t channels, int64_t pixels, const float* weight, const float* bias, float eps,
    Statistics& of) {
  for (int64_t p = 0; p * PANEL < pixels; p++) {
    const int64_t at = p * PANEL * channels;
    statistics(from + at, channels, eps, of.mean[p], of.rstd[p]);
    normalise(from + at, to + at, channels, weight, bias, of.mean[p], of.rstd[p]);
  }
}

// Norm and convolution taken back: from the gradient of the convolution's output (twice as many channels) to the gradient of
// the norm's input x. x becomes the normalised x.
template <class F>
inline void normed_convolution_backward(
    const F* transposed, const float* dhidden, int64_t channels, int64_t pixels, const float* norm_weight,
    const Statistics& of, F* memory, float* x, float* dx, float* dweight, float* dbias) {
  multiply_panels(
      transposed, channels, 2 * channels / VALUES_OF<F>, factors_of_channels(dhidden, 2 * channels, pixels, memory), pixels,
      [=](int64_t row, int64_t pixel, vec value)
          __attribute__((always_inline)) { store(dx + place(row, channels, pixel), value); });
  for (int64_t p = 0; p * PANEL < pixels; p++) {
    const int64_t at = p * PANEL * channels, count = least(PANEL, pixels - p * PANEL);
    normalise_backward(dx + at, x + at, channels, count, norm_weight, of.mean[p], of.rstd[p], dweight, dbias);
  }
}

template <class F, class T>
void make_hidden(const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, int64_t begin, int64_t end) {
  const Parameters<const float>& w = op.weights;
  const int64_t channels = op.x.channels, size = backward_panels(channels) * PANEL * channels;
  const float* bias = w[CONV1_BIAS];
  T* hidden = op.hidden + n * 2 * channels * op.x.pixels;
  const auto [x, memory] = scratch_parts(size, size);
  for_panels(begin, end, channels, op.x.pixels, [&, x = x, memory = (F*)memory](int64_t start, int64_t pixels) {
    load_panels(op.x, n, start, pixels, x);
    for (int64_t first = 0; first < pixels; first += PANEL) {
      float* panel = x + first * channels;
      normalise(panel, panel, channels, w[NORM1_WEIGHT], w[NORM1_BIAS], op.eps);
    }
    multiply_panels(
        products.matrices[CONV1_WEIGHT], 2 * channels, channels / VALUES_OF<F>,
        factors_of_channels(x, channels, pixels, memory), pixels,
        [=, all = op.x.pixels](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
          store_upto(hidden + row * all + start + pixel, value + bias[row], pixels - pixel);
        });
  });
}

// What result_backward keeps of some panels, all of them [channels] but hidden, which is [2 * channels].
template <class F>
struct ResultPanels {
  float* y;
  float* normed;
  float* hidden;    // of conv4, then its gradient
  float* attended;  // gated * attention
  float* gate;      // the gate of conv4, in the memory of `attended`
  float* dy;
  float* gated;
  float* dattention;  // [channels, LANES]
  F* memory;
  F* blocks;

  explicit ResultPanels(int64_t channels) {
    const int64_t pixels = backward_panels(channels) * PANEL, size = pixels * channels;
    const auto parts =
        scratch_parts(size, size, 2 * size, size, size, size, channels * LANES, size, pixels * padded(channels));
    y = parts[0], normed = parts[1], hidden = parts[2], attended = gate = parts[3], dy = parts[4], gated = parts[5];
    dattention = parts[6], memory = (F*)parts[7], blocks = (F*)parts[8];
  }
};

inline void attend_panels(const float* gated, const float* attention, int64_t channels, int64_t pixels, float* attended) {
  for (int64_t first = 0; first < pixels; first += PANEL) {
    for (int64_t c = 0; c < channels; c++) {
      const int64_t at = place(c, channels, first);
      for (int s = 0; s < STEPS; s++) store(attended + at + s * WIDTH, load(gated + at + s * WIDTH) * attention[c]);
    }
  }
}

// Makes y, normed, hidden and gate again, or loads what was kept of them.
template <class F, class T>
inline void make_gate(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, const float* attention, int64_t start,
    int64_t pixels, const ResultPanels<F>& at, Statistics& of) {
  const Parameters<const float>& w = op.weights;
  const int64_t channels = op.x.channels, depth = channels / VALUES_OF<F>;
  float *const hidden = at.hidden, *const gate = at.gate;
  if (attention) load_panels(Images<const T>{op.gated, channels, op.x.pixels, false}, n, start, pixels, at.gated);
  if (op.kept.y) {
    load_panels(Images<const T>{op.kept.y, channels, op.x.pixels, false}, n, start, pixels, at.y);
  } else {
    load_panels(op.x, n, start, pixels, attention ? at.normed : at.y);
  }
  if (attention && !op.kept.y) {
    attend_panels(at.gated, attention, channels, pixels, at.attended);
    residual_convolution(
        products.matrices[CONV3_WEIGHT], w[CONV3_BIAS], w[BETA], channels,
        factors_of_channels(at.attended, channels, pixels, at.memory), at.normed, at.y, pixels);
  }
  normalise_panels(at.y, at.normed, channels, pixels, w[NORM2_WEIGHT], w[NORM2_BIAS], op.eps, of);
  if (op.kept.conv4) {
    load_panels(Images<const T>{op.kept.conv4, 2 * channels, op.x.pixels, false}, n, start, pixels, hidden);
  } else {
    const float* bias = w[CONV4_BIAS];
    multiply_panels(
        products.matrices[CONV4_WEIGHT], 2 * channels, depth, factors_of_channels(at.normed, channels, pixels, at.memory),
        pixels, [=](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
          store(hidden + place(row, 2 * channels, pixel), value + bias[row]);
        });
  }
  for (int64_t first = 0; first < pixels; first += PANEL) {
    const float *a = hidden + 2 * first * channels, *b = a + channels * PANEL;
    for (int64_t j = 0; j < channels * PANEL; j += WIDTH) store(gate + first * channels + j, load(a + j) * load(b + j));
  }
}

// conv5, gate, conv4 and norm taken back: dy, which holds dz, becomes the gradient of y.
template <class F, class T>
inline void feed_forward_backward(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t pixels, const ResultPanels<F>& at,
    const Statistics& of, const Parameters<float>& sums) {
  const int64_t channels = op.x.channels, depth = channels / VALUES_OF<F>;
  float* const hidden = at.hidden;
  add_products(at.dy, channels, at.gate, channels, pixels, at.memory, at.blocks, sums[CONV5_WEIGHT], sums[CONV5_BIAS]);
  multiply_panels(
      products.transposed[CONV5_WEIGHT], channels, depth, factors_of_channels(at.dy, channels, pixels, at.memory), pixels,
      [=](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
        float *a = hidden + place(row, 2 * channels, pixel), *b = a + channels * PANEL;
        const vec first = load(a);
        store(a, value * load(b));
        store(b, value * first);
      });
  add_products(
      hidden, 2 * channels, at.normed, channels, pixels, at.memory, at.blocks, sums[CONV4_WEIGHT], sums[CONV4_BIAS]);
  float* dnormed = at.normed;
  normed_convolution_backward(
      products.transposed[CONV4_WEIGHT], hidden, channels, pixels, op.weights[NORM2_WEIGHT], of, at.memory, at.y, dnormed,
      sums[NORM2_WEIGHT], sums[NORM2_BIAS]);
  add_panels(dnormed, at.dy, channels, pixels);
}

// conv3 and the attention taken back: op.gated becomes the gradient of `attended`.
template <class F, class T>
inline void attended_backward(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, const float* attention, int64_t start,
    int64_t pixels, const ResultPanels<F>& at, const Parameters<float>& sums) {
  const int64_t channels = op.x.channels;
  float *const lanes = at.dattention, *const gated = at.gated;
  T* const dattended = op.gated + n * channels * op.x.pixels;
  attend_panels(at.gated, attention, channels, pixels, at.attended);
  add_products(at.dy, channels, at.attended, channels, pixels, at.memory, at.blocks, sums[CONV3_WEIGHT], sums[CONV3_BIAS]);
  multiply_panels(
      products.transposed[CONV3_WEIGHT], channels, channels / VALUES_OF<F>,
      factors_of_channels(at.dy, channels, pixels, at.memory), pixels,
      [=, all = op.x.pixels](int64_t row, int64_t pixel, vec value) __attribute__((always_inline)) {
        const vec product = value * load(gated + place(row, channels, pixel));  // 0 behind the last pixel
        store(lanes + row * LANES, load(lanes + row * LANES) + product);
        store_upto(dattended + row * all + start + pixel, value, pixels - pixel);
      });
}

template <class F, class T>
void result_backward(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, const float* attention, int64_t begin,
    int64_t end, float* dattention, const Parameters<float>& sums) {
  const int64_t channels = op.x.channels;
  const ResultPanels<F> at(channels);
  for (int64_t c = 0; c < channels; c++) store(at.dattention + c * LANES, vec{});
  Statistics of;
  const Images<T> dy = attention ? Images<T>{op.dy, channels, op.x.pixels, false} : op.dx;
  for_panels(begin, end, channels, op.x.pixels, [&](int64_t start, int64_t pixels) {
    load_panels(op.dz, n, start, pixels, at.dy);
    make_gate(op, products, n, attention, start, pixels, at, of);
    feed_forward_backward(op, products, pixels, at, of, sums);
    store_panels(at.dy, dy, n, start, pixels);
    if (attention) attended_backward(op, products, n, attention, start, pixels, at, sums);
  });
  for (int64_t c = 0; attention && c < channels; c++) dattention[c] = sum(load(at.dattention + c * LANES));
}

template <class F, class T>
void hidden_backward(
    const NAFBlockBackward<T>& op, const NAFBlockProducts<F>& products, int64_t n, int64_t begin, int64_t end,
    const Parameters<float>& sums) {
  const Parameters<const float>& w = op.weights;
  const int64_t channels = op.x.channels, most = backward_panels(channels) * PANEL, size = most * channels;
  const Images<const T> dhidden{op.dhidden, 2 * channels, op.x.pixels, false};
  const Images<const T> dy{op.dy, channels, op.x.pixels, false};
  const auto parts = scratch_parts(size, size, 2 * size, size, most * padded(channels));
  float *const x = parts[0], *const normed = parts[1], *const hidden = parts[2];
  F *const memory = (F*)parts[3], *const blocks = (F*)parts[4];
  Statistics of;
  for_panels(begin, end, channels, op.x.pixels, [&](int64_t start, int64_t pixels) {
    load_panels(op.x, n, start, pixels, x);
    load_panels(dhidden, n, start, pixels, hidden);
    normalise_panels(x, normed, channels, pixels, w[NORM1_WEIGHT], w[NORM1_BIAS], op.eps, of);
    add_products(hidden, 2 * channels, normed, channels, pixels, memory, blocks, sums[CONV1_WEIGHT], sums[CONV1_BIAS]);
    float* dnormed = normed;
    normed_convolution_backward(
        products.transposed[CONV1_WEIGHT], hidden, channels, pixels, w[NORM1_WEIGHT], of, memory, x, dnormed,
        sums[NORM1_WEIGHT], sums[NORM1_BIAS]);
    float* dx = hidden;
    load_panels(dy, n, start, pixels, dx);
    add_panels(dnormed, dx, channels, pixels);
    store_panels(dx, op.dx, n, start, pixels);
  });
}

template <class T>
Parameters<const Pair> as_pairs(const Parameters<const T>& matrices) {
  Parameters<const Pair> pairs;
  for (int p = 0; p < PARAMETERS; p++) pairs.of[p] = (const Pair*)matrices.of[p];
  return pairs;
}

// body(products), in floats or in pairs.
template <class T, class Body>
inline void with_products(const NAFBlockBackward<T>& op, const Body& body) {
  if constexpr (MULTIPLIES_PAIRS<T>) {
    if (op.pairs) {
      return body(NAFBlockProducts<Pair>{as_pairs(op.in_pairs.matrices), as_pairs(op.in_pairs.transposed)});
    }
  }
  body(op.products);
}

template <class T>
void naf_block_hidden(const NAFBlockBackward<T>& op, int64_t n, int64_t begin, int64_t end) {
  with_products(op, [&](const auto& products) { make_hidden(op, products, n, begin, end); });
}

template <class T>
void naf_block_result_backward(
    const NAFBlockBackward<T>& op, int64_t n, const float* attention, int64_t begin, int64_t end, float* dattention,
    const Parameters<float>& sums) {
  with_products(
      op, [&](const auto& products) { result_backward(op, products, n, attention, begin, end, dattention, sums); });
}

template <class T>
void naf_block_hidden_backward(
    const NAFBlockBackward<T>& op, int64_t n, int64_t begin, int64_t end, const Parameters<float>& sums) {
  with_products(op, [&](const auto& products) { hidden_backward(op, products, n, begin, end, sums); });
}

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

template <class T>
constexpr NAFBlockBackwardKernels<T> naf_block_backward_kernels{
    .hidden = naf_block_hidden<T>,
    .result_backward = naf_block_result_backward<T>,
    .hidden_backward = naf_block_hidden_backward<T>,
    .transpose = transpose_matrix<T>,
};
R2R_DEFINE_KERNELS(NAFBlockBackwardKernels, naf_block_backward_kernels)

}  // namespace r2r::R2R_ISA
