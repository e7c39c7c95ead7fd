// Gated convolution on a CPU: how it walks over planes (NCHW) and rows (channels_last). What one element means is in gate.h.
#pragma once

#include "gate.h"

#define R2R_ALWAYS __attribute__((always_inline))

namespace r2r::R2R_ISA {

// body(i, valid) for each vector of the values [begin, end), valid of which exist: a constant but for the last.
template <class Body>
R2R_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + WIDTH <= end; i += WIDTH) body(i, WIDTH);
  if (i < end) body(i, end - i);
}

// body<V>(i, valid) for the values [0, count): for lines, of V vectors, the first of which begins after `head` values; for
// those before and behind them, one vector at a time, valid of whose values exist, in their usual order.
template <class T, class Body>
R2R_INLINE void for_lines(int64_t head, int64_t count, const Body& body) {
  const auto single = [&](int64_t i, int64_t valid) R2R_ALWAYS { body.template operator()<1>(i, valid); };
  for_vectors(0, head, single);
  int64_t i = head;
  for (; i + LINE<T> <= count; i += LINE<T>) body.template operator()<LINE<T> / WIDTH>(i, LINE<T>);
  for_vectors(i, count, single);
}

// A 3x3 convolution slides over values that are kept as floats, x in one vector and the prior in another, or in one vector
// as pairs of both where the processor has dot products of them.
template <class T>
constexpr int PARTS = MULTIPLIES_PAIRS<T> ? 1 : 2;

template <class T>
R2R_INLINE vec load_part(const T* p, int64_t valid) {
  return load_upto(p, valid);
}
R2R_INLINE void join(vec x, vec prior, vec (&parts)[2]) {
  parts[0] = x;
  parts[1] = prior;
}
R2R_INLINE void split(const vec (&parts)[2], vec& x, vec& prior) {
  x = parts[0];
  prior = parts[1];
}
template <int V, class T>
R2R_INLINE void join_lines(const T* x, const T* prior, vec (&parts)[V][2]) {
  for (int v = 0; v < V; v++) join(load_line(x, v), load_line(prior, v), parts[v]);
}
#if defined(__AVX512BF16__)
R2R_INLINE half_vec load_part(const bfloat16* p, int64_t valid) {
  return valid >= WIDTH ? load_bits(p) : load_first_bits(p, valid);
}
R2R_INLINE void join(half_vec x, half_vec prior, vec (&parts)[1]) {
  parts[0] = pairs(x, prior);
}
R2R_INLINE void join(vec x, vec prior, vec (&parts)[1]) {
  join(narrow(x), narrow(prior), parts);
}
R2R_INLINE void split(const vec (&parts)[1], vec& x, vec& prior) {
  x = even_of(parts[0]);
  prior = odd_of(parts[0]);
}
R2R_INLINE void join_lines(const bfloat16* x, const bfloat16* prior, vec (&parts)[2][1]) {
  const vec even = load((const float*)x), odd = load((const float*)prior);
  parts[0][0] = interleave_halves<0>(even, odd);
  parts[1][0] = interleave_halves<1>(even, odd);
}
#endif

// A vector of the result, or a line of it.
template <class T, int V>
R2R_INLINE void put_result(const GatedConv<T>& op, T* p, const vec (&values)[V], int64_t valid) {
  if constexpr (V * WIDTH == LINE<T>) {
    if (valid == LINE<T>) return op.streams ? stream_line(p, values) : store_line(p, values);
  }
  store_upto(p, values[0], valid);
}

// Neighbouring values of the result, in their usual order.
template <class T, int V>
R2R_INLINE void put_pixels(const GatedConv<T>& op, T* p, const vec (&values)[V], int64_t valid) {
  constexpr int EACH = LINE<T> / WIDTH;
  if constexpr (V % EACH == 0) {
    if (valid >= V * WIDTH) {
      for (int v = 0; v < V; v += EACH) {
        const auto& line = *(const vec(*)[EACH])(values + v);
        op.streams ? stream_in_order(p + v * WIDTH, line) : store_in_order(p + v * WIDTH, line);
      }
      return;
    }
  }
  store_upto(p, values[0], valid);
}

// A 1x1 convolution of a vector or a line. tap(0, v) is x's of vector v, tap(1, v) the prior's, tap(2, v) the bias.
template <int V, class T, class Tap>
R2R_INLINE void gate_values(const GatedConv<T>& op, const T* x, const T* prior, T* y, int64_t valid, const Tap& tap) {
  vec values[V];
  for (int v = 0; v < V; v++) {
    const vec a = V == 1 ? load_upto(x, valid) : load_line(x, v);
    const vec b = V == 1 ? load_upto(prior, valid) : load_line(prior, v);
    values[v] = blend(a, b, gate_of<T>(tap(2, v) + tap(0, v) * a + tap(1, v) * b));
  }
  put_result(op, y, values, valid);
}

// -- planes (NCHW): vectors of neighbouring pixels ---------------------------------------------------------------------
// Rows are staged with zeros on both sides, so that no tap needs a mask.

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

// Both rows, part p of them at to + p * stride.
template <int P, class T>
inline void stage_rows(const T* x, const T* prior, int64_t width, float* to) {
  const int64_t stride = staged_stride(width);
  for (int p = 0; p < P; p++) store(to + p * stride - WIDTH, vec{}), store(to + (p + 1) * stride - 2 * WIDTH, vec{});
  for_vectors(0, width, [&](int64_t i, int64_t valid) R2R_ALWAYS {
    vec parts[P];
    join(load_part(x + i, valid), load_part(prior + i, valid), parts);
    for (int p = 0; p < P; p++) store(to + p * stride + i, parts[p]);
  });
}

// The mean of these rows of a plane of the prior, at the output's width. line [prior_width]: memory to work in.
template <class T>
inline void resize_row(const GatedConv<T>& op, const T* plane, Window rows, float* line, T* to) {
  const float scale = 1.0f / (float)(rows.end - rows.begin);
  const auto mean = [&](int64_t i, int64_t valid) R2R_ALWAYS {
    vec total{};
    for (int64_t r = rows.begin; r < rows.end; r++) total += load_upto(plane + r * op.prior_width + i, valid);
    return total * scale;
  };
  if (op.prior_width <= WIDTH && op.prior_width <= op.width) {  // windows are one place or two, all in a register
    const vec places = mean(0, op.prior_width);
    for (int64_t c = 0; c < op.width; c += WIDTH) {
      const vec first = __builtin_shuffle(places, load(op.first_columns + c));
      store(to + c, 0.5f * (first + __builtin_shuffle(places, load(op.last_columns + c))));
    }
    return;
  }
  for_vectors(0, op.prior_width, [&](int64_t i, int64_t valid) R2R_ALWAYS { store(line + i, mean(i, valid)); });
  for (int64_t c = 0; c < op.width; c++) {
    const int64_t first = op.first_columns[c], last = op.last_columns[c];
    float total = line[first];
    for (int64_t i = first + 1; i <= last; i++) total += line[i];
    store_first(to + c, splat(first == last ? total : total / (float)(last - first + 1)), 1);
  }
}

// Two vectors of pixels slide down a strip of rows, as one alone waits for its sums: each row is read once, for the three
// results that it is near to, of which the one above it is then complete; sums that are not are kept for the next strip. The
// gates of a strip follow together, as each is a long chain of instructions. Staged rows are a ring, where the strip above
// leaves its last one. What comes next, or the next plane, is fetched meanwhile in the order of memory.
template <class T>
void gated_conv_plane_3x3(const GatedConv<T>& op, int64_t plane, float* scratch) {
  constexpr int P = PARTS<T>, BOTH = 2;
  constexpr int64_t ROWS = 2 * STRIP / P, RING = ROWS + 1;
  const int64_t stride = staged_stride(op.width), height = op.height, width = op.width;
  float *staged = scratch + WIDTH, *bottom = staged + RING * P * stride, *line = bottom + stride;
  float* sums = line + op.prior_width + WIDTH;  // [vectors][2]
  T* resized = (T*)bottom;
  const float* weight = op.weight + plane % op.channels * 18;
  vec taps[9][P];
  for (int t = 0; t < 9; t++) join(splat(weight[t]), splat(weight[9 + t]), taps[t]);
  const vec bias = splat(op.bias[plane % op.channels]);
  const T *in = op.x + plane * height * width, *prior = op.prior + plane * op.prior_height * op.prior_width;
  T* out = op.y + plane * height * width;
  // What is not to be fetched: to ask twice for x costs less than a branch.
  const T *next_prior = op.rows ? in : prior, *next_out = op.streams ? in : out;
  const auto row = [&](int64_t r) R2R_ALWAYS { return staged + r % RING * P * stride; };
  vec z[RING][BOTH];  // of result r at r + 1 - begin
  Window held{-1, -1};
  for (int64_t begin = 0; begin < height; begin += ROWS) {
    const int64_t end = least(height, begin + ROWS), top = begin ? begin - 1 : 0, done_to = end == height ? end : end - 1;
    for (int64_t r = begin; r < end; r++) {
      const T* of_prior = prior + r * width;
      if (op.rows) {
        const Window rows = op.rows[r];
        if (rows.begin != held.begin || rows.end != held.end) resize_row(op, prior, rows, line, resized);
        held = rows;
        of_prior = resized;
      }
      stage_rows<P>(in + r * width, of_prior, width, row(r));
    }
    const float *first = row(begin), *above = row(top);
    const auto slide = [&]<int V>(int64_t i, int64_t valid) R2R_ALWAYS {
      const auto below = [&](const float* at)
                             R2R_ALWAYS { return at + P * stride == bottom + i ? staged + i : at + P * stride; };
      vec here[V], next[V];
      for (int v = 0; v < V; v++) {
        const float* of = sums + 2 * (i + v * WIDTH);
        here[v] = begin ? load(of) : bias;
        next[v] = begin ? load(of + WIDTH) : bias;
      }
      const float* at = first + i;
      for (int64_t r = begin; r < end; r++, at = below(at)) {
        const int64_t ahead = end * width + i * (end - begin) + (r - begin) * V * WIDTH;
        for (int64_t values = 0; values < V * WIDTH; values += 64 / sizeof(T)) {
          __builtin_prefetch(in + ahead + values);
          __builtin_prefetch(next_prior + ahead + values);
          __builtin_prefetch(next_out + ahead - width + values);
        }
        vec done[V];
        for (int v = 0; v < V; v++) done[v] = here[v], here[v] = next[v], next[v] = bias;
        R2R_UNROLL
        for (int p = 0; p < P; p++) {
          R2R_UNROLL
          for (int across = 0; across < 3; across++) {
            vec part[V];
            for (int v = 0; v < V; v++) part[v] = load_once(at + p * stride + v * WIDTH + across - 1);
            for (int v = 0; v < V; v++) {
              done[v] = multiply_add_factors<T>(taps[6 + across][p], part[v], done[v]);
              here[v] = multiply_add_factors<T>(taps[3 + across][p], part[v], here[v]);
              next[v] = multiply_add_factors<T>(taps[across][p], part[v], next[v]);
            }
          }
        }
        for (int v = 0; v < V; v++) z[r - begin][v] = done[v];
      }
      for (int v = 0; v < V; v++) {
        float* of = sums + 2 * (i + v * WIDTH);
        z[end - begin][v] = here[v];  // of the plane's last row, below which there is nothing
        store(of, here[v]);
        store(of + WIDTH, next[v]);
      }
      at = above + i;
      for (int64_t r = top; r < done_to; r++, at = below(at)) {
        vec values[V];
        for (int v = 0; v < V; v++) {
          vec parts[P], x, b;
          for (int p = 0; p < P; p++) parts[p] = load(at + p * stride + v * WIDTH);
          split(parts, x, b);
          values[v] = blend(x, b, gate_of<T>(z[r + 1 - begin][v]));
        }
        put_pixels(op, out + r * width + i, values, valid);
      }
    };
    int64_t i = 0;
    for (; i + BOTH * WIDTH <= width; i += BOTH * WIDTH) slide.template operator()<BOTH>(i, BOTH * WIDTH);
    for (; i < width; i += WIDTH) slide.template operator()<1>(i, width - i);
  }
}

template <class T>
void gated_conv_plane_1x1(const GatedConv<T>& op, int64_t plane, float* scratch) {
  const float* weight = op.weight + plane % op.channels * 2;
  const vec taps[] = {splat(weight[0]), splat(weight[1]), splat(op.bias[plane % op.channels])};
  const auto gate = [&](const T* x, const T* prior, T* y, int64_t count) {
    const int64_t head = op.streams ? least(count, -(uintptr_t)y % 64 / sizeof(T)) : 0;
    for_lines<T>(head, count, [&]<int V>(int64_t i, int64_t valid) R2R_ALWAYS {
      gate_values<V>(op, x + i, prior + i, y + i, valid, [&](int t, int) R2R_ALWAYS { return taps[t]; });
    });
  };
  const int64_t base = plane * op.height * op.width;
  if (!op.rows) return gate(op.x + base, op.prior + base, op.y + base, op.height * op.width);
  const T* from = op.prior + plane * op.prior_height * op.prior_width;
  T* resized = (T*)scratch;
  float* line = scratch + staged_stride(op.width);
  Window held{-1, -1};
  for (int64_t r = 0; r < op.height; r++) {
    const Window rows = op.rows[r];
    if (rows.begin != held.begin || rows.end != held.end) resize_row(op, from, rows, line, resized);
    held = rows;
    gate(op.x + base + r * op.width, resized, op.y + base + r * op.width, op.width);
  }
}

template <class T>
void gated_conv_plane(const GatedConv<T>& op, int64_t plane, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_plane_1x1(op, plane, scratch);
  } else {
    gated_conv_plane_3x3(op, plane, scratch);
  }
  if (op.streams) fence();
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

// Means of a smaller or larger prior over the windows of one row and of columns [left, right). Neighbouring columns often
// share their window: means[which[column - left]] [channels] is a column's.
template <class T>
inline void resize_channels(
    const GatedConv<T>& op, int64_t left, int64_t right, const T* image, Window rows, int32_t* which, T* means) {
  int32_t number = -1;
  for (int64_t column = left; column < right; column++) {
    const int64_t first = op.first_columns[column], last = op.last_columns[column];
    const bool shared = column > left && first == op.first_columns[column - 1] && last == op.last_columns[column - 1];
    which[column - left] = shared ? number : ++number;
    if (shared) continue;
    const float scale = 1.0f / (float)((rows.end - rows.begin) * (last - first + 1));
    for_vectors(0, op.channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
      vec total{};
      for (int64_t r = rows.begin; r < rows.end; r++) {
        for (int64_t i = first; i <= last; i++) {
          total += load_upto(image + (r * op.prior_width + i) * op.channels + c, valid);
        }
      }
      store_upto(means + number * op.channels + c, total * scale, valid);
    });
  }
}

// A smaller prior's means are made once for all rows and columns that share them.
template <class T>
void gated_conv_rows_1x1(const GatedConv<T>& op, int64_t n, const Tile& tile, float* scratch) {
  const int64_t channels = op.channels;
  const T* image = op.prior + n * op.prior_height * op.prior_width * channels;
  float* taps = scratch;
  T* means = (T*)(taps + 3 * channels);
  int32_t* which = (int32_t*)(taps + (3 + tile.right - tile.left) * channels);
  const float* const given[] = {op.weight, op.weight + channels, op.bias};
  for_lines<T>(0, channels, [&]<int V>(int64_t c, int64_t valid) R2R_ALWAYS {
    for (int t = 0; t < 3; t++) {
      vec values[V];
      for (int v = 0; v < V; v++) values[v] = load_upto(given[t] + c + v * WIDTH, valid - v * WIDTH);
      to_line_order(values);
      for (int v = 0; v < V; v++) store_upto(taps + t * channels + c + v * WIDTH, values[v], valid - v * WIDTH);
    }
  });
  Window held{-1, -1};
  for (int64_t r = tile.top; r < tile.bottom; r++) {
    if (op.rows && (op.rows[r].begin != held.begin || op.rows[r].end != held.end)) {
      held = op.rows[r];
      resize_channels(op, tile.left, tile.right, image, held, which, means);
    }
    for (int64_t column = tile.left; column < tile.right; column++) {
      const int64_t at = ((n * op.height + r) * op.width + column) * channels;
      const T *x = op.x + at, *prior = op.rows ? means + which[column - tile.left] * channels : op.prior + at;
      for_lines<T>(0, channels, [&]<int V>(int64_t c, int64_t valid) R2R_ALWAYS {
        // A tile is narrow where the prior is small: the processor would wait where each of its rows begins.
        if (op.rows) __builtin_prefetch(x + op.width * channels + c, 0, 2);
        gate_values<V>(op, x + c, prior + c, op.y + at + c, valid, [&](int t, int v) R2R_ALWAYS {
          return load_upto(taps + t * channels + c + v * WIDTH, valid - v * WIDTH);
        });
      });
    }
  }
}

// Both parts of a vector or a line of a pixel.
template <int V, class T>
R2R_INLINE void load_parts(const T* x, const T* prior, int64_t valid, vec (&parts)[V][PARTS<T>]) {
  if constexpr (V == 1) {
    join(load_part(x, valid), load_part(prior, valid), parts[0]);
  } else {
    join_lines(x, prior, parts);
  }
}

// Where rows that a 3x3 convolution makes are read in one column, those above and below them included.
template <class T>
struct Column {
  const T* x[GATED_CONV_ROWS + 2];
  const T* prior[GATED_CONV_ROWS + 2];
};

// Slides along columns [begin, end) of a strip of rows, one line of channels after the other. A column is read once, for the
// three results of each row that it is near to, of which the one before it is then complete: result column - 2, as columns
// begin one before the first that is made. state [channels][2 * R] holds what is not complete at the end. taps [9 * P + 1] of
// each vector of channels, the bias last. What the next strip needs, from next_x and next_prior on, is asked for meanwhile in
// the order of memory, and a line of each pixel of its result, so that its pages are known.
template <class T>
void gate_columns_3x3(
    const GatedConv<T>& op, const float* taps, const Column<T>* columns, int64_t begin, int64_t end, int64_t rows, T* y,
    const T* next_x, const T* next_prior, float* state) {
  constexpr int P = PARTS<T>, R = GATED_CONV_ROWS;
  const int64_t channels = op.channels, line = op.width * channels;
  for_lines<T>(0, channels, [&]<int V>(int64_t c, int64_t valid) R2R_ALWAYS {
    vec own[V][9][P], bias[V], here[V][R], next[V][R];
    for (int v = 0; v < V; v++) {
      const float *from = taps + (c / WIDTH + v) * (9 * P + 1) * WIDTH, *held = state + (c + v * WIDTH) * 2 * R;
      for (int t = 0; t < 9 * P; t++) own[v][t / P][t % P] = load(from + t * WIDTH);
      bias[v] = load(from + 9 * P * WIDTH);
      for (int r = 0; r < R; r++) {
        here[v][r] = begin ? load(held + r * WIDTH) : bias[v];
        next[v][r] = begin ? load(held + (R + r) * WIDTH) : bias[v];
      }
    }
    for (int64_t column = begin; column < end; column++) {
      const Column<T>& around = columns[column];
      const int64_t ahead = c * (end - begin) + (column - begin) * LINE<T>;
      vec done[V][R];
      for (int r = 0; r < R; r++) {
        __builtin_prefetch(next_x + r * line + ahead, 0, 2);
        if (!op.rows) __builtin_prefetch(next_prior + r * line + ahead, 0, 2);
        if (c == 0) __builtin_prefetch(y + (R + r) * line + column * channels, 1, 2);
        for (int v = 0; v < V; v++) {
          done[v][r] = here[v][r];
          here[v][r] = next[v][r];
          next[v][r] = bias[v];
        }
      }
      R2R_UNROLL
      for (int row = 0; row < R + 2; row++) {
        vec parts[V][P];
        load_parts(around.x[row] + c, around.prior[row] + c, valid, parts);
        R2R_UNROLL
        for (int down = 0; down < 3; down++) {
          const int r = row - down;
          if (r < 0 || r >= R) continue;
          for (int i = 0; i < V * P; i++) {
            const int v = i / P, p = i % P;
            done[v][r] = multiply_add_factors<T>(own[v][down * 3 + 2][p], parts[v][p], done[v][r]);
            here[v][r] = multiply_add_factors<T>(own[v][down * 3 + 1][p], parts[v][p], here[v][r]);
            next[v][r] = multiply_add_factors<T>(own[v][down * 3][p], parts[v][p], next[v][r]);
          }
        }
      }
      if (column < 2) continue;
      const Column<T>& centre = columns[column - 1];
      R2R_UNROLL
      for (int r = 0; r < R; r++) {
        if (r == rows) break;
        vec values[V];
        for (int v = 0; v < V; v++) {
          const vec a = V == 1 ? load_upto(centre.x[r + 1] + c, valid) : load_line(centre.x[r + 1] + c, v);
          const vec b = V == 1 ? load_upto(centre.prior[r + 1] + c, valid) : load_line(centre.prior[r + 1] + c, v);
          values[v] = blend(a, b, gate_of<T>(done[v][r]));
        }
        put_result(op, y + r * line + (column - 2) * channels + c, values, valid);
      }
    }
    for (int v = 0; v < V; v++) {
      float* held = state + (c + v * WIDTH) * 2 * R;
      for (int r = 0; r < R; r++) store(held + r * WIDTH, here[v][r]), store(held + (R + r) * WIDTH, next[v][r]);
    }
  });
}

// A tile is walked down, narrow enough for the rows that are read and those that are asked for to fit the second-level cache.
template <class T>
void gated_conv_rows_3x3(const GatedConv<T>& op, int64_t n, const Tile& tile, float* scratch) {
  constexpr int P = PARTS<T>, R = GATED_CONV_ROWS;
  const int64_t channels = op.channels, width = op.width, height = op.height, vectors = (channels + WIDTH - 1) / WIDTH;
  const int64_t left = tile.left ? tile.left - 1 : 0, right = least(width, tile.right + 1), number = right - left;
  const T *in = op.x + n * height * width * channels, *from = op.prior + n * op.prior_height * op.prior_width * channels;
  float *taps = scratch, *state = taps + (9 * P + 1) * vectors * WIDTH, *rest = state + 2 * R * vectors * WIDTH;
  Column<T>* columns = (Column<T>*)rest;
  T *zeros = (T*)(columns + number + 2), *means = zeros + vectors * WIDTH;
  int32_t* which = (int32_t*)(means + (R + 2) * number * channels);
  for_vectors(0, channels, [&](int64_t c, int64_t valid) R2R_ALWAYS { store_upto(zeros + c, vec{}, valid); });
  for (int t = 0; t < 10; t++) {
    const float *of_x = t < 9 ? op.weight + t * channels : op.bias, *of_prior = op.weight + (9 + t) * channels;
    for_lines<T>(0, channels, [&]<int V>(int64_t c, int64_t valid) R2R_ALWAYS {
      vec parts[P][V];
      for (int v = 0; v < V; v++) {
        const int64_t left = valid - v * WIDTH;
        vec both[P] = {load_upto(of_x + c + v * WIDTH, left)};
        if (t < 9) join(both[0], load_upto(of_prior + c + v * WIDTH, left), both);
        for (int p = 0; p < P; p++) parts[p][v] = both[p];
      }
      for (int p = 0; p < (t < 9 ? P : 1); p++) {
        to_line_order(parts[p]);
        for (int v = 0; v < V; v++) store(taps + ((c / WIDTH + v) * (9 * P + 1) + t * P + p) * WIDTH, parts[p][v]);
      }
    });
  }

  // Neighbouring rows need the means of as many windows at most, which follow one another: rows_of_means of the last R + 2.
  int64_t made = 0;
  const T* rows_of_means[R + 2] = {};
  const auto resize = [&](int64_t r) {
    for (int i = 0; i <= R; i++) rows_of_means[i] = rows_of_means[i + 1];
    if (r < 0 || r >= height) return;
    const Window rows = op.rows[r];
    if (made && rows.begin == op.rows[r - 1].begin && rows.end == op.rows[r - 1].end) return;
    T* to = means + made++ % (R + 2) * number * channels;
    resize_channels(op, left, right, from, rows, which, to);
    rows_of_means[R + 1] = to;
  };
  if (op.rows) resize(tile.top - 1), resize(tile.top);
  for (int64_t top = tile.top; top < tile.bottom; top += R) {
    for (int i = 1; op.rows && i <= R; i++) resize(top + i);
    for (int64_t column = tile.left - 1; column <= tile.right; column++) {
      Column<T>& around = columns[column - tile.left + 1];
      for (int row = 0; row < R + 2; row++) {
        const int64_t down = top + row - 1, at = (down * width + column) * channels;
        const bool inside = down >= 0 && down < height && column >= 0 && column < width;
        around.x[row] = inside ? in + at : zeros;
        around.prior[row] = !inside ? zeros : op.rows ? rows_of_means[row] + which[column - left] * channels : from + at;
      }
    }
    const int64_t end = tile.right - tile.left + 2, at = (top * width + tile.left) * channels;
    for (int64_t begin = 0; begin < end; begin += GATED_CONV_GROUP) {
      const int64_t next = at + ((R + 1) * width + begin - 1) * channels;
      gate_columns_3x3(
          op, taps, columns, begin, least(begin + GATED_CONV_GROUP, end), least(R, tile.bottom - top),
          op.y + n * height * width * channels + at, in + next, from + next, state);
    }
  }
}

template <class T>
void gated_conv_rows(const GatedConv<T>& op, int64_t n, const Tile& tile, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_rows_1x1(op, n, tile, scratch);
  } else {
    gated_conv_rows_3x3(op, n, tile, scratch);
  }
  if (op.streams) fence();
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
  const auto rows_at = [&](const T* from, int64_t r, const T*(&rows)[K]) {
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
      for_vectors(0, channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
        const int64_t at = column * channels + c;
        const vec g = sigmoid(logit_at<K>(op.weight, op.bias, channels, c, valid, x, prior));
        const vec dy = load_upto(op.dy + base + r * line + at, valid);
        store_upto(gate + at, g, valid);
        store_upto(dz + at, gate_gradient(dy, load_upto(x[HERE] + c, valid), load_upto(prior[HERE] + c, valid), g), valid);
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
      for_vectors(0, channels, [&](int64_t c, int64_t valid) R2R_ALWAYS {
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
void gated_conv_rows_backward(
    const GatedConvBackward<T>& op, int64_t n, int64_t top, int64_t bottom, float* sums, float* scratch) {
  if (op.kernel == 1) {
    gated_conv_rows_backward_of<1>(op, n, top, bottom, sums, scratch);
  } else {
    gated_conv_rows_backward_of<3>(op, n, top, bottom, sums, scratch);
  }
}

}  // namespace r2r::R2R_ISA
