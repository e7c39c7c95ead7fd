// Gated convolution (R2R, section 3.4): z = grouped convolution of (x, prior) + bias, gate = sigmoid(z),
// y = x + gate * (prior - x), and its gradients. What one element means is in templates on the value's type: vectors of
// floats on a CPU, a float on a GPU (gated_conv_cuda.cu), where only the exponential differs. Below are the CPU's walks.
//
// A convolution of K x K has 2 K K taps a channel: those of x, then those of the prior.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define R2R_INLINE __device__ __forceinline__
#define R2R_UNROLL _Pragma("unroll")
#else
#define R2R_INLINE inline __attribute__((always_inline))
#define R2R_ALWAYS __attribute__((always_inline))
#define R2R_UNROLL _Pragma("GCC unroll 9")
#include "vec.h"
#endif

namespace r2r::R2R_ISA {

#if defined(__CUDACC__)
R2R_INLINE float exponential(float x) {
  return __expf(x);
}
#else
// To 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2. Held within what a float can hold; NaN stays.
R2R_INLINE vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  const vec shifted = x * 1.44269504f + magic, n = shifted - magic;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vec)((ivec)p + ((ivec)shifted << 23));
}
#endif

template <class V>
R2R_INLINE V sigmoid(V z) {
  return 1.0f / (1.0f + exponential(-z));
}

template <class V>
R2R_INLINE V blend(V x, V prior, V gate) {
  return x + gate * (prior - x);
}

// Gradient of z, given that of y.
template <class V>
R2R_INLINE V gate_gradient(V dy, V x, V prior, V gate) {
  return dy * (prior - x) * gate * (1.0f - gate);
}

// start + the K x K taps on what read(row, column) gives at these offsets; sign -1 is the convolution's adjoint.
template <int K, class V, class Tap, class Read>
R2R_INLINE V convolve(V start, int sign, const Tap& tap, const Read& read) {
  R2R_UNROLL
  for (int t = 0; t < K * K; t++) start += tap(t) * read(sign * (t / K - K / 2), sign * (t % K - K / 2));
  return start;
}

// What the i-th of `out` places averages of `in` places: [begin, end), as adaptive_avg_pool2d.
struct Window {
  int64_t begin;
  int64_t end;
};
R2R_INLINE Window window(int64_t i, int64_t in, int64_t out) {
  return {i * in / out, ((i + 1) * in + out - 1) / out};
}

#if !defined(__CUDACC__)

// body(i, valid) for each vector of `count` values, valid of which exist: a constant but for the last.
template <class Body>
R2R_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) body(i, WIDTH);
  if (i < count) body(i, count - i);
}

// -- planes (NCHW): vectors of neighbouring pixels ---------------------------------------------------------------------
// Rows are staged as floats with zeros on both sides, so that no tap needs a mask.

inline int64_t staged_stride(int64_t width) {
  return (width + WIDTH - 1) / WIDTH * WIDTH + 2 * WIDTH;
}

template <class T>
inline void stage_row(const T* row, int64_t width, float* to) {  // row = nullptr: zeros
  store(to - WIDTH, vec{});
  int64_t i = 0;
  for (; i < width; i += WIDTH) store(to + i, row ? load_upto(row + i, width - i) : vec{});
  store(to + i, vec{});
}

template <class T>
inline void stage_resized_row(const GatedConv<T>& op, const T* plane, Window rows, float* line, float* to) {
  const int64_t width = op.prior_width;
  for (int64_t i = 0; i < width; i += WIDTH) {
    vec total{};
    for (int64_t r = rows.begin; r < rows.end; r++) total += load_upto(plane + r * width + i, width - i);
    store(line + i, total);
  }
  const float scale = 1.0f / (float)(rows.end - rows.begin);
  stage_row<float>(nullptr, op.width, to);
  for (int64_t c = 0; c < op.width; c++) {
    const int64_t begin = op.columns[2 * c], end = op.columns[2 * c + 1];
    float total = line[begin];
    for (int64_t i = begin + 1; i < end; i++) total += line[i];
    to[c] = total * (scale / (float)(end - begin));
  }
}

// Rows [top, bottom) of one plane of the prior at the output's size; `stride` apart.
template <class T>
inline void stage_prior(const GatedConv<T>& op, int64_t plane, int64_t top, int64_t bottom, float* line, float* to) {
  const int64_t stride = staged_stride(op.width);
  const T* from = op.prior + plane * op.prior_height * op.prior_width;
  Window last{-1, -1};
  for (int64_t r = top; r < bottom; r++, to += stride) {
    const bool inside = r >= 0 && r < op.height;
    if (!inside || !op.columns) {
      stage_row(inside ? from + r * op.width : nullptr, op.width, to);
      continue;
    }
    const Window rows = window(r, op.prior_height, op.height);
    if (rows.begin == last.begin && rows.end == last.end) {
      stage_row(to - stride, op.width, to);
    } else {
      stage_resized_row(op, from, rows, line, to);
    }
    last = rows;
  }
}

template <class T>
void gated_conv_plane_3x3(const GatedConv<T>& op, int64_t plane, float* scratch) {
  constexpr int K = 3, HALO = 1;
  const int64_t stride = staged_stride(op.width), rows = least(STRIP, op.height) + 2 * HALO;
  float *x = scratch + WIDTH, *prior = x + rows * stride, *line = prior + rows * stride;
  const float *weight = op.weight + plane % op.channels * 2 * K * K, bias = op.bias[plane % op.channels];
  vec taps[2 * K * K];
  for (int t = 0; t < 2 * K * K; t++) taps[t] = splat(weight[t]);
  for (int64_t top = 0; top < op.height; top += STRIP) {
    const int64_t bottom = least(op.height, top + STRIP);
    const T* in = op.x + plane * op.height * op.width;
    for (int64_t r = top - HALO; r < bottom + HALO; r++) {
      stage_row(r >= 0 && r < op.height ? in + r * op.width : nullptr, op.width, x + (r - top + HALO) * stride);
    }
    stage_prior(op, plane, top - HALO, bottom + HALO, line, prior);
    for (int64_t r = top; r < bottom; r++) {
      T* out = op.y + (plane * op.height + r) * op.width;
      for_vectors(op.width, [&](int64_t i, int64_t valid) R2R_ALWAYS {
        const float *at_x = x + (r - top + HALO) * stride + i, *at_prior = prior + (r - top + HALO) * stride + i;
        vec z = splat(bias);
        z = convolve<K>(
            z, 1, [&](int t) R2R_ALWAYS { return taps[t]; },
            [&](int64_t v, int h) R2R_ALWAYS { return load(at_x + v * stride + h); });
        z = convolve<K>(
            z, 1, [&](int t) R2R_ALWAYS { return taps[K * K + t]; },
            [&](int64_t v, int h) R2R_ALWAYS { return load(at_prior + v * stride + h); });
        store_upto(out + i, blend(load(at_x), load(at_prior), sigmoid(z)), valid);
      });
    }
  }
}

// A 1x1 convolution of `count` neighbouring pixels.
template <class T, class P>
inline void gate_pixels(const T* x, const P* prior, T* y, int64_t count, const float* weight, float bias) {
  const float of_x = weight[0], of_prior = weight[1];
  for_vectors(count, [&](int64_t i, int64_t valid) R2R_ALWAYS {
    const vec a = load_upto(x + i, valid), b = load_upto(prior + i, valid);
    store_upto(y + i, blend(a, b, sigmoid(bias + of_x * a + of_prior * b)), valid);
  });
}

template <class T>
void gated_conv_pixels(const GatedConv<T>& op, int64_t plane, float* scratch) {
  const float *weight = op.weight + plane % op.channels * 2, bias = op.bias[plane % op.channels];
  const int64_t base = plane * op.height * op.width;
  if (!op.columns) {
    gate_pixels(op.x + base, op.prior + base, op.y + base, op.height * op.width, weight, bias);
    return;
  }
  const T* from = op.prior + plane * op.prior_height * op.prior_width;
  float *row = scratch + WIDTH, *line = row + staged_stride(op.width);
  Window last{-1, -1};
  for (int64_t r = 0; r < op.height; r++) {
    const Window rows = window(r, op.prior_height, op.height);
    if (rows.begin != last.begin || rows.end != last.end) stage_resized_row(op, from, rows, line, row);
    last = rows;
    gate_pixels(op.x + base + r * op.width, row, op.y + base + r * op.width, op.width, weight, bias);
  }
}

template <class T>
void gated_conv_plane(const GatedConv<T>& op, int64_t plane, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_pixels(op, plane, scratch);
  } else {
    gated_conv_plane_3x3(op, plane, scratch);
  }
}

template <int K, class T>
void gated_conv_plane_backward_of(const GatedConvBackward<T>& op, int64_t plane, float* sums, float* scratch) {
  constexpr int HALO = K / 2, TAPS = K * K;
  const int64_t stride = staged_stride(op.width), rows = least(STRIP, op.height);
  float* x = scratch + WIDTH;
  float* prior = x + (rows + 4 * HALO) * stride;
  float* dy = prior + (rows + 4 * HALO) * stride;
  float* gate = dy + (rows + 2 * HALO) * stride;
  float* dz = gate + (rows + 2 * HALO) * stride;
  const float *weight = op.weight + plane % op.channels * 2 * TAPS, bias = op.bias[plane % op.channels];
  const int64_t base = plane * op.height * op.width;
  double totals[2 * TAPS + 1] = {};
  for (int64_t top = 0; top < op.height; top += STRIP) {
    const int64_t bottom = least(op.height, top + STRIP);
    const auto stage = [&](const T* from, int64_t halo, float* to) {
      for (int64_t r = top - halo; r < bottom + halo; r++, to += stride) {
        stage_row(r >= 0 && r < op.height ? from + base + r * op.width : nullptr, op.width, to);
      }
    };
    stage(op.x, 2 * HALO, x);
    stage(op.prior, 2 * HALO, prior);
    stage(op.dy, HALO, dy);
    for (int64_t r = top - HALO; r < bottom + HALO; r++) {
      float *to_gate = gate + (r - top + HALO) * stride, *to_dz = dz + (r - top + HALO) * stride;
      stage_row<float>(nullptr, op.width, to_dz);
      if (r < 0 || r >= op.height) continue;
      for (int64_t i = 0; i < op.width; i += WIDTH) {
        const float *at_x = x + (r - top + 2 * HALO) * stride + i, *at_prior = prior + (r - top + 2 * HALO) * stride + i;
        vec z = splat(bias);
        z = convolve<K>(
            z, 1, [&](int t) R2R_ALWAYS { return weight[t]; },
            [&](int64_t v, int h) R2R_ALWAYS { return load(at_x + v * stride + h); });
        z = convolve<K>(
            z, 1, [&](int t) R2R_ALWAYS { return weight[TAPS + t]; },
            [&](int64_t v, int h) R2R_ALWAYS { return load(at_prior + v * stride + h); });
        const vec g = sigmoid(z);
        const vec d = gate_gradient(load(dy + (r - top + HALO) * stride + i), load(at_x), load(at_prior), g);
        store(to_gate + i, g);
        store_upto(to_dz + i, d, op.width - i);
      }
    }
    vec partial[2 * TAPS + 1] = {};
    for (int64_t r = top; r < bottom; r++) {
      const int64_t at = (r - top + HALO) * stride, out = base + r * op.width;
      for (int64_t i = 0; i < op.width; i += WIDTH) {
        const float* d = dz + at + i;
        const vec direct = load(dy + at + i), to_prior = direct * load(gate + at + i);
        const auto read = [&](int64_t v, int h) R2R_ALWAYS { return load(d + v * stride + h); };
        const vec dx = convolve<K>(direct - to_prior, -1, [&](int t) R2R_ALWAYS { return weight[t]; }, read);
        const vec dprior = convolve<K>(to_prior, -1, [&](int t) R2R_ALWAYS { return weight[TAPS + t]; }, read);
        store_upto(op.dx + out + i, dx, op.width - i);
        store_upto(op.dprior + out + i, dprior, op.width - i);
      }
      for (int64_t i = 0; i < op.width; i += WIDTH) {
        const vec d = load(dz + at + i);
        const float *at_x = x + at + HALO * stride + i, *at_prior = prior + at + HALO * stride + i;
        R2R_UNROLL
        for (int t = 0; t < TAPS; t++) {
          const int64_t offset = (t / K - HALO) * stride + t % K - HALO;
          partial[t] += d * load(at_x + offset);
          partial[TAPS + t] += d * load(at_prior + offset);
        }
        partial[2 * TAPS] += d;
      }
    }
    for (int t = 0; t <= 2 * TAPS; t++) totals[t] += sum(partial[t]);
  }
  for (int t = 0; t <= 2 * TAPS; t++) sums[t] = (float)totals[t];
}

template <class T>
void gated_conv_plane_backward(const GatedConvBackward<T>& op, int64_t plane, float* sums, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_plane_backward_of<1>(op, plane, sums, scratch);
  } else {
    gated_conv_plane_backward_of<3>(op, plane, sums, scratch);
  }
}

// -- rows (channels_last): vectors of neighbouring channels ------------------------------------------------------------
// Taps are [2 K K, channels]. A pixel's neighbours are pointers; those outside of the image point at zeros.

template <int K, class T>
inline void neighbours(
    const T* const (&rows)[K], int64_t column, int64_t width, int64_t channels, const T* zeros, const T* (&at)[K * K]) {
  for (int t = 0; t < K * K; t++) {
    const int64_t c = column + t % K - K / 2;
    at[t] = rows[t / K] && c >= 0 && c < width ? rows[t / K] + c * channels : zeros;
  }
}

template <int K, class T, class P>
inline __attribute__((always_inline)) vec logit_at(
    const float* taps, const float* bias, int64_t channels, int64_t c, int64_t valid, const T* const (&x)[K * K],
    const P* const (&prior)[K * K]) {
  vec z = load_upto(bias + c, valid);
  R2R_UNROLL
  for (int t = 0; t < K * K; t++) {
    z += load_upto(taps + t * channels + c, valid) * load_upto(x[t] + c, valid);
    z += load_upto(taps + (K * K + t) * channels + c, valid) * load_upto(prior[t] + c, valid);
  }
  return z;
}

template <int K, class T, class P>
inline void gate_row(
    const GatedConv<T>& op, const T* const (&x_rows)[K], const P* const (&prior_rows)[K], const float* zeros, T* y) {
  constexpr int HERE = K * K / 2;
  for (int64_t column = 0; column < op.width; column++) {
    const T* x[K * K];
    const P* prior[K * K];
    neighbours<K>(x_rows, column, op.width, op.channels, (const T*)zeros, x);
    neighbours<K>(prior_rows, column, op.width, op.channels, (const P*)zeros, prior);
    T* out = y + column * op.channels;
    for_vectors(op.channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
      const vec gate = sigmoid(logit_at<K>(op.weight, op.bias, op.channels, c, valid, x, prior));
      store_upto(out + c, blend(load_upto(x[HERE] + c, valid), load_upto(prior[HERE] + c, valid), gate), valid);
    });
  }
}

// One row of the prior at the output's width.
template <class T>
inline void resize_channels_row(const GatedConv<T>& op, const T* image, Window rows, float* to) {
  const int64_t channels = op.channels;
  for (int64_t column = 0; column < op.width; column++) {
    const int64_t begin = op.columns[2 * column], end = op.columns[2 * column + 1];
    const float scale = 1.0f / (float)((rows.end - rows.begin) * (end - begin));
    for (int64_t c = 0; c < channels; c += WIDTH) {
      vec total{};
      for (int64_t r = rows.begin; r < rows.end; r++) {
        for (int64_t i = begin; i < end; i++) {
          total += load_upto(image + (r * op.prior_width + i) * channels + c, channels - c);
        }
      }
      store_upto(to + column * channels + c, total * scale, channels - c);
    }
  }
}

template <int K, class T>
void gated_conv_rows_of(const GatedConv<T>& op, int64_t n, int64_t top, int64_t bottom, float* scratch) {
  constexpr int HALO = K / 2;
  const int64_t line = op.width * op.channels;
  const T *image = op.x + n * op.height * line, *prior = op.prior + n * op.prior_height * op.prior_width * op.channels;
  T* out = op.y + n * op.height * line;
  float *zeros = scratch, *resized = zeros + op.channels;
  for (int64_t c = 0; c < op.channels; c++) zeros[c] = 0;
  // Rows of the prior that were resized last: neighbouring rows often average the same rows of it.
  Window held[K];
  for (Window& w : held) w = {-1, -1};
  int newest = 0;
  const auto resized_row = [&](int64_t r) -> const float* {
    const Window rows = window(r, op.prior_height, op.height);
    for (int i = 0; i < K; i++) {
      if (held[i].begin == rows.begin && held[i].end == rows.end) return resized + i * line;
    }
    newest = (newest + 1) % K;
    held[newest] = rows;
    resize_channels_row(op, prior, rows, resized + newest * line);
    return resized + newest * line;
  };
  for (int64_t r = top; r < bottom; r++) {
    const T *x_rows[K], *prior_rows[K];
    const float* resized_rows[K];
    for (int k = 0; k < K; k++) {
      const int64_t at = r + k - HALO;
      const bool inside = at >= 0 && at < op.height;
      x_rows[k] = inside ? image + at * line : nullptr;
      prior_rows[k] = inside && !op.columns ? prior + at * line : nullptr;
      resized_rows[k] = inside && op.columns ? resized_row(at) : nullptr;
    }
    if (op.columns) {
      gate_row<K>(op, x_rows, resized_rows, zeros, out + r * line);
    } else {
      gate_row<K>(op, x_rows, prior_rows, zeros, out + r * line);
    }
  }
}

template <class T>
void gated_conv_rows(const GatedConv<T>& op, int64_t n, int64_t top, int64_t bottom, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_rows_of<1>(op, n, top, bottom, scratch);
  } else {
    gated_conv_rows_of<3>(op, n, top, bottom, scratch);
  }
}

// Rows of dz and of the gate slide through scratch: row r of them is made when row r - HALO of dx and dprior is due.
template <int K, class T>
void gated_conv_rows_backward_of(
    const GatedConvBackward<T>& op, int64_t n, int64_t top, int64_t bottom, float* sums, float* scratch) {
  constexpr int HALO = K / 2, TAPS = K * K, HERE = TAPS / 2;
  const int64_t channels = op.channels, line = op.width * channels, base = n * op.height * line;
  float *zeros = scratch, *gates = zeros + channels, *dzs = gates + K * line;
  for (int64_t c = 0; c < channels; c++) zeros[c] = 0;
  for (int64_t i = 0; i < (2 * TAPS + 1) * channels; i++) sums[i] = 0;
  const auto rows_at = [&](const T* from, int64_t r, const T* (&rows)[K]) {
    for (int k = 0; k < K; k++) {
      const int64_t at = r + k - HALO;
      rows[k] = at >= 0 && at < op.height ? from + base + at * line : nullptr;
    }
  };
  const auto make = [&](int64_t r) {
    const T *x_rows[K], *prior_rows[K], *x[TAPS], *prior[TAPS];
    rows_at(op.x, r, x_rows);
    rows_at(op.prior, r, prior_rows);
    float *gate = gates + (r + K) % K * line, *dz = dzs + (r + K) % K * line;
    for (int64_t column = 0; column < op.width; column++) {
      neighbours<K>(x_rows, column, op.width, channels, (const T*)zeros, x);
      neighbours<K>(prior_rows, column, op.width, channels, (const T*)zeros, prior);
      for_vectors(channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
        const int64_t at = column * channels + c;
        const vec g = sigmoid(logit_at<K>(op.weight, op.bias, channels, c, valid, x, prior));
        const vec dy = load_upto(op.dy + base + r * line + at, valid);
        store_upto(gate + at, g, valid);
        store_upto(
            dz + at, gate_gradient(dy, load_upto(x[HERE] + c, valid), load_upto(prior[HERE] + c, valid), g), valid);
      });
    }
  };
  const auto emit = [&](int64_t r) {
    const float *rows[K], *at_dz[TAPS], *gate = gates + (r + K) % K * line;
    for (int k = 0; k < K; k++) {
      const int64_t at = r + k - HALO;
      rows[k] = at >= 0 && at < op.height ? dzs + (at + K) % K * line : nullptr;
    }
    const T *x_rows[K], *prior_rows[K], *x[TAPS], *prior[TAPS];
    rows_at(op.x, r, x_rows);
    rows_at(op.prior, r, prior_rows);
    for (int64_t column = 0; column < op.width; column++) {
      neighbours<K>(rows, column, op.width, channels, (const float*)zeros, at_dz);
      for_vectors(channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
        const int64_t at = column * channels + c, out = base + r * line + at;
        const vec dy = load_upto(op.dy + out, valid);
        vec dprior = dy * load_upto(gate + at, valid), dx = dy - dprior;
        R2R_UNROLL
        for (int t = 0; t < TAPS; t++) {
          const vec dz = load_upto(at_dz[TAPS - 1 - t] + c, valid);
          dx += load_upto(op.weight + t * channels + c, valid) * dz;
          dprior += load_upto(op.weight + (TAPS + t) * channels + c, valid) * dz;
        }
        store_upto(op.dx + out, dx, valid);
        store_upto(op.dprior + out, dprior, valid);
      });
    }
    const float* own = dzs + (r + K) % K * line;
    for_vectors(channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
      vec partial[2 * TAPS + 1] = {};
      for (int64_t column = 0; column < op.width; column++) {
        neighbours<K>(x_rows, column, op.width, channels, (const T*)zeros, x);
        neighbours<K>(prior_rows, column, op.width, channels, (const T*)zeros, prior);
        const vec dz = load_upto(own + column * channels + c, valid);
        R2R_UNROLL
        for (int t = 0; t < TAPS; t++) {
          partial[t] += dz * load_upto(x[t] + c, valid);
          partial[TAPS + t] += dz * load_upto(prior[t] + c, valid);
        }
        partial[2 * TAPS] += dz;
      }
      for (int t = 0; t <= 2 * TAPS; t++) {
        float* total = sums + t * channels + c;
        store_upto(total, load_upto(total, valid) + partial[t], valid);
      }
    });
  };
  for (int64_t r = top - HALO; r < bottom + HALO; r++) {
    if (r >= 0 && r < op.height) make(r);
    if (r - HALO >= top) emit(r - HALO);
  }
}

template <class T>
void gated_conv_rows_backward(
    const GatedConvBackward<T>& op, int64_t n, int64_t top, int64_t bottom, float* sums, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_rows_backward_of<1>(op, n, top, bottom, sums, scratch);
  } else {
    gated_conv_rows_backward_of<3>(op, n, top, bottom, sums, scratch);
  }
}

#endif

}  // namespace r2r::R2R_ISA
