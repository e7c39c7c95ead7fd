// The gradients of gated_conv, over planes and over rows.
#pragma once

#include "gated_conv_planes-inl.h"

namespace r2r::R2R_ISA {

// Stages a row, or zeros for nullptr.
template <class T>
inline void stage_row(const T* row, int64_t width, float* to) {
  store(to - WIDTH, vec{});
  int64_t i = 0;
  for (; i < width; i += WIDTH) store(to + i, row ? load_upto(row + i, width - i) : vec{});
  store(to + i, vec{});
}

template <int K, class T>
void gated_conv_plane_backward_of(const GatedConvBackward<T>& op, int64_t plane, float* sums) {
  constexpr int HALO = K / 2, TAPS = K * K;
  const int64_t stride = staged_stride(op.width), rows = least(STRIP, op.height);
  const int64_t two_around = (rows + 4 * HALO) * stride, one_around = (rows + 2 * HALO) * stride;
  const auto memory = scratch_parts(WIDTH + two_around, two_around, one_around, one_around, one_around + WIDTH);
  float *const x = memory[0] + WIDTH, *const prior = memory[1], *const dy = memory[2], *const gate = memory[3];
  float* const dz = memory[4];
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
void gated_conv_plane_backward(const GatedConvBackward<T>& op, int64_t plane, float* sums) {
  if (op.kernel == 1) {
    gated_conv_plane_backward_of<1>(op, plane, sums);
  } else {
    gated_conv_plane_backward_of<3>(op, plane, sums);
  }
}

// The K x K neighbours of a pixel, as pointers into the rows around it.
template <int K, class T>
inline void neighbours(
    const T* const (&rows)[K], int64_t column, int64_t width, int64_t channels, const T* zeros, const T* (&at)[K * K]) {
  for (int t = 0; t < K * K; t++) {
    const int64_t c = column + t % K - K / 2;
    at[t] = rows[t / K] && c >= 0 && c < width ? rows[t / K] + c * channels : zeros;
  }
}

// z of a vector of channels. taps [2 K K, channels].
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

// Rows of dz and of the gate slide through scratch. Row r of them is made before row r - HALO of dx and dprior.
template <int K, class T>
void gated_conv_rows_backward_of(const GatedConvBackward<T>& op, int64_t n, int64_t top, int64_t bottom, float* sums) {
  constexpr int HALO = K / 2, TAPS = K * K, HERE = TAPS / 2;
  const int64_t channels = op.channels, row_size = op.width * channels, base = n * op.height * row_size;
  const auto memory = scratch_parts(channels, K * row_size, K * row_size);
  float *const zeros = memory[0], *const gates = memory[1], *const dzs = memory[2];
  for (int64_t c = 0; c < channels; c++) zeros[c] = 0;
  for (int64_t i = 0; i < (2 * TAPS + 1) * channels; i++) sums[i] = 0;
  const auto rows_at = [&](const T* from, int64_t r, const T*(&rows)[K]) {
    for (int k = 0; k < K; k++) {
      const int64_t at = r + k - HALO;
      rows[k] = at >= 0 && at < op.height ? from + base + at * row_size : nullptr;
    }
  };
  const auto make = [&](int64_t r) {
    const T *x_rows[K], *prior_rows[K], *x[TAPS], *prior[TAPS];
    rows_at(op.x, r, x_rows);
    rows_at(op.prior, r, prior_rows);
    float *gate = gates + (r + K) % K * row_size, *dz = dzs + (r + K) % K * row_size;
    for (int64_t column = 0; column < op.width; column++) {
      neighbours<K>(x_rows, column, op.width, channels, (const T*)zeros, x);
      neighbours<K>(prior_rows, column, op.width, channels, (const T*)zeros, prior);
      for_vectors(0, channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
        const int64_t at = column * channels + c;
        const vec g = sigmoid(logit_at<K>(op.weight, op.bias, channels, c, valid, x, prior));
        const vec dy = load_upto(op.dy + base + r * row_size + at, valid);
        store_upto(gate + at, g, valid);
        store_upto(dz + at, gate_gradient(dy, load_upto(x[HERE] + c, valid), load_upto(prior[HERE] + c, valid), g), valid);
      });
    }
  };
  const auto emit = [&](int64_t r) {
    const float *rows[K], *at_dz[TAPS], *gate = gates + (r + K) % K * row_size;
    for (int k = 0; k < K; k++) {
      const int64_t at = r + k - HALO;
      rows[k] = at >= 0 && at < op.height ? dzs + (at + K) % K * row_size : nullptr;
    }
    const T *x_rows[K], *prior_rows[K], *x[TAPS], *prior[TAPS];
    rows_at(op.x, r, x_rows);
    rows_at(op.prior, r, prior_rows);
    for (int64_t column = 0; column < op.width; column++) {
      neighbours<K>(rows, column, op.width, channels, (const float*)zeros, at_dz);
      for_vectors(0, channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
        const int64_t at = column * channels + c, out = base + r * row_size + at;
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
    const float* own = dzs + (r + K) % K * row_size;
    for_vectors(0, channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
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
void gated_conv_rows_backward(const GatedConvBackward<T>& op, int64_t n, int64_t top, int64_t bottom, float* sums) {
  if (op.kernel == 1) {
    gated_conv_rows_backward_of<1>(op, n, top, bottom, sums);
  } else {
    gated_conv_rows_backward_of<3>(op, n, top, bottom, sums);
  }
}

}  // namespace r2r::R2R_ISA
