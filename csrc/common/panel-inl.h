// Panels: loaded from images of either memory format, stored back, normalised, multiplied by matrices.
#pragma once

#include "vec-inl.h"

namespace r2r::R2R_ISA {

constexpr int STEPS = PANEL / WIDTH;

// A matrix product multiplies factors of type F: floats, or pairs of channels. A panel of pairs is [channels / 2][PANEL].
// The number of channels is then even. A row of a matrix, as PyTorch keeps it, already is pairs.
template <class F>
constexpr int VALUES_OF = std::is_same_v<F, Pair> ? 2 : 1;  // values in a factor

// Channel c + i of a panel at one step, c even.
inline vec channel(const float* panel, int64_t c, int i) {
  return load(panel + (c + i) * PANEL);
}
inline vec channel(const Pair* panel, int64_t c, int i) {
  const vec pairs = load(panel + ((c + i) >> 1) * PANEL);
  return i % 2 ? odd_of(pairs) : even_of(pairs);
}
// Channels [c, c + COUNT) of a panel at one step become value(0), value(1).
template <int COUNT, class Value>
inline void put(float* panel, int64_t c, const Value& value) {
  for (int i = 0; i < COUNT; i++) store(panel + (c + i) * PANEL, value(i));
}
#if defined(__AVX512BF16__)
template <int COUNT, class Value>
inline void put(Pair* panel, int64_t c, const Value& value) {
  store(panel + (c >> 1) * PANEL, value(0), value(1));
}
#endif

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
inline void load_panel(const Images<const T>& x, int64_t n, int64_t first, int64_t count, float* panel) {
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

#if defined(__AVX512BF16__)
inline void load_panel(const Images<const bfloat16>& x, int64_t n, int64_t first, int64_t count, Pair* panel) {
  if (x.channels_last) {  // a row of pairs is moved as a row of floats
    load_panel(Images<const float>{(const float*)x.data, x.channels / 2, x.pixels, true}, n, first, count, (float*)panel);
    return;
  }
  for (int64_t c = 0; c < x.channels; c += 2) {
    const bfloat16* even = x.image(n) + c * x.pixels + first;
    for (int s = 0; s < STEPS; s++) {
      const int64_t at = s * WIDTH, left = count - at;
      put<2>(panel + at, c, [&](int i) { return left > 0 ? load_upto(even + i * x.pixels + at, left) : vec{}; });
    }
  }
}
#endif

template <class T>
inline void store_panel(const float* panel, const Images<T>& y, int64_t n, int64_t first, int64_t count) {
  T* image = y.image(n);
  if (y.channels_last) {
    for (int64_t p = 0; p < count; p += WIDTH) {
      const int64_t valid = least(WIDTH, count - p);
      for (int64_t c = 0; c < y.channels; c += WIDTH) {
        const int64_t channels = least(WIDTH, y.channels - c);
        transpose_rows(
            panel + c * PANEL + p, PANEL, image + (first + p) * y.channels + c, y.channels, channels, valid, channels);
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

#if defined(__AVX512BF16__)
inline void store_panel(const Pair* panel, const Images<bfloat16>& y, int64_t n, int64_t first, int64_t count) {
  if (y.channels_last) {
    store_panel((const float*)panel, Images<float>{(float*)y.data, y.channels / 2, y.pixels, true}, n, first, count);
    return;
  }
  for (int64_t c = 0; c < y.channels; c += 2) {
    for (int64_t p = 0; p < count; p += WIDTH) {
      bfloat16* even = y.image(n) + c * y.pixels + first + p;
      store_upto(even, channel(panel + p, c, 0), count - p);
      store_upto(even + y.pixels, channel(panel + p, c, 1), count - p);
    }
  }
}
#endif

// Two passes; four partial sums, so that the error grows with a quarter of the channels.
template <class F>
inline void statistics(const F* panel, int64_t channels, float eps, vec (&mean)[STEPS], vec (&rstd)[STEPS]) {
  for (int s = 0; s < STEPS; s++) {
    const F* p = panel + s * WIDTH;
    vec part[4] = {};
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) part[i] += channel(p, c, i);
    }
    for (; c < channels; c++) part[0] += channel(p, c & ~1, c & 1);
    mean[s] = ((part[0] + part[1]) + (part[2] + part[3])) / (float)channels;
    for (int i = 0; i < 4; i++) part[i] = vec{};
    for (c = 0; c + 4 <= channels; c += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        vec centred = channel(p, c, i) - mean[s];
        part[i] += centred * centred;
      }
    }
    for (; c < channels; c++) {
      vec centred = channel(p, c & ~1, c & 1) - mean[s];
      part[0] += centred * centred;
    }
    rstd[s] = 1.0f / square_root(((part[0] + part[1]) + (part[2] + part[3])) / (float)channels + eps);
  }
}

template <class From, class To>
inline void normalise(
    const From* from, To* to, int64_t channels, const float* weight, const float* bias, const vec (&mean)[STEPS],
    const vec (&rstd)[STEPS]) {
  for (int64_t c = 0; c < channels; c += VALUES_OF<To>) {
    for (int s = 0; s < STEPS; s++) {
      put<VALUES_OF<To>>(to + s * WIDTH, c, [&](int i) __attribute__((always_inline)) {
        return (channel(from + s * WIDTH, c, i) - mean[s]) * rstd[s] * weight[c + i] + bias[c + i];
      });
    }
  }
}
template <class From, class To>
inline void normalise(const From* from, To* to, int64_t channels, const float* weight, const float* bias, float eps) {
  vec mean[STEPS], rstd[STEPS];
  statistics(from, channels, eps, mean, rstd);
  normalise(from, to, channels, weight, bias, mean, rstd);
}

// The gradient of `normalise` for the first `count` pixels of a panel. dy becomes dx; x becomes the normalised x, z: dx =
// rstd * (g - mean(g) - z * mean(g * z)) with g = dy * weight. dweight += dy * z and dbias += dy, both [channels, LANES].
// Narrow vectors take the lanes in turn: then their chains of additions are no longer than those of wide vectors.
inline void normalise_backward(
    float* dy, float* x, int64_t channels, int64_t count, const float* weight, const vec (&mean)[STEPS],
    const vec (&rstd)[STEPS], float* dweight, float* dbias) {
  for (int s = 0; s * WIDTH < count; s++) {
    vec mean_g{}, mean_gz{};
    for (int64_t c = 0; c < channels; c++) {
      float *d = dy + c * PANEL + s * WIDTH, *z = x + c * PANEL + s * WIDTH;
      const vec normed = (load(z) - mean[s]) * rstd[s];
      store(z, normed);
      const int64_t lane = c * LANES + s * WIDTH % LANES;
      store(dweight + lane, load(dweight + lane) + load(d) * normed);
      store(dbias + lane, load(dbias + lane) + load(d));
      const vec g = load(d) * weight[c];
      store(d, g);
      mean_g += g;
      mean_gz += g * normed;
    }
    mean_g /= (float)channels;
    mean_gz /= (float)channels;
    for (int64_t c = 0; c < channels; c++) {
      float *d = dy + c * PANEL + s * WIDTH, *z = x + c * PANEL + s * WIDTH;
      store(d, rstd[s] * (load(d) - mean_g - load(z) * mean_gz));
    }
  }
}

// The micro-kernel: M rows of weights (the first M / 2 at `first`, the others at `second`) times the vectors of some pixels.
// It keeps a copy of the epilogue: what only the copy refers to is not loaded again after each store.
template <int M, class F, class Epilogue>
inline void multiply_rows(
    const F* first, const F* second, int64_t depth, const F* panels, int64_t pixels, const Epilogue epilogue) {
  const auto some_vectors = [=]<int V>(int64_t pixel) __attribute__((always_inline)) {
    const F* panel = panels + pixel / PANEL * PANEL * depth + pixel % PANEL;
    vec sums[M][V];
    unrolled<M * V>([&](auto i) __attribute__((always_inline)) { sums[i / V][i % V] = vec{}; });
    for (int64_t k = 0; k < depth; k++) {
      vec x[V];
      unrolled<V>([&](auto v) __attribute__((always_inline)) { x[v] = load(panel + k * PANEL + v * WIDTH); });
      unrolled<M>([&](auto i) __attribute__((always_inline)) {
        const F weight = i < M / 2 ? first[i * depth + k] : second[(i - M / 2) * depth + k];
        unrolled<V>([&](auto v) __attribute__((always_inline)) { sums[i][v] = multiply_add(weight, x[v], sums[i][v]); });
      });
    }
    epilogue(sums, pixel);
  };
  int64_t pixel = 0;
  for (; pixel + WIDTH < pixels; pixel += 2 * WIDTH) some_vectors.template operator()<2>(pixel);
  if (pixel < pixels) some_vectors.template operator()<1>(pixel);
}

template <int PAIRS, class F, class Epilogue>
inline void multiply_pairs(
    int64_t pairs, const F* first, const F* second, int64_t depth, const F* panels, int64_t pixels,
    const Epilogue& epilogue) {
  if (pairs == PAIRS) {
    multiply_rows<2 * PAIRS>(first, second, depth, panels, pixels, epilogue);
  } else if constexpr (PAIRS > 1) {
    multiply_pairs<PAIRS - 1>(pairs, first, second, depth, panels, pixels, epilogue);
  }
}

// epilogue(sums [2 * pairs][V], pixel) for the panels of `pixels` pixels. The sums are of `pairs` rows at `first` and as many
// at `second`, for the V vectors that begin at `pixel`. pairs <= ROWS / 2; depth in factors. An epilogue should copy what it
// uses.
template <class F, class Epilogue>
inline void multiply(
    int64_t pairs, const F* first, const F* second, int64_t depth, const F* panels, int64_t pixels,
    const Epilogue& epilogue) {
  multiply_pairs<ROWS / 2>(pairs, first, second, depth, panels, pixels, epilogue);
}

// Calls body(begin, end) for blocks of [0, count): about equal, at most `most` long, cut at multiples of `unit`.
template <class Body>
inline void for_blocks(int64_t count, int64_t most, int64_t unit, const Body& body) {
  const int64_t units = (count + unit - 1) / unit, each = most / unit, number = (units + each - 1) / each;
  for (int64_t i = 0; i < number; i++) {
    body(units * i / number * unit, least(count, units * (i + 1) / number * unit));
  }
}

// to = from + (weight @ x + bias) * scale, for the panels of `pixels` pixels, the weights of ROWS channels at a time.
template <class F, class From, class To>
inline void residual_convolution(
    const F* weight, const float* bias, const float* scale, int64_t channels, const F* x, const From* from, To* to,
    int64_t pixels) {
  constexpr int UNIT = VALUES_OF<F>;
  const int64_t depth = channels / UNIT;
  for_blocks(channels, ROWS, 2, [&](int64_t c, int64_t end) {
    const int64_t pairs = (end - c + 1) / 2, second = end - pairs;  // of an odd number, the middle one is computed twice
    multiply(
        pairs, weight + c * depth, weight + second * depth, depth, x, pixels,
        [=](auto& sums, int64_t pixel) __attribute__((always_inline)) {
          constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
          const int64_t panel = pixel / PANEL * PANEL * channels, at = pixel % PANEL;
          const From* before = from + panel / VALUES_OF<From> + at;
          To* after = to + panel / VALUES_OF<To> + at;
          unrolled<M / UNIT>([&](auto unit) __attribute__((always_inline)) {
            constexpr int i = unit * UNIT;
            const int64_t o = i < M / 2 ? c + i : second + i - M / 2;
            unrolled<V>([&](auto v) __attribute__((always_inline)) {
              put<UNIT>(after + v * WIDTH, o, [&](int j) __attribute__((always_inline)) {
                return channel(before + v * WIDTH, o, j) + (sums[i + j][v] + bias[o + j]) * scale[o + j];
              });
            });
          });
        });
  });
}

}  // namespace r2r::R2R_ISA
