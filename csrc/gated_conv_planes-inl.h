// gated_conv over planes (NCHW): a vector holds neighbouring pixels. Rows are staged with zeros on both sides, so that no
// tap needs a mask.
#pragma once

#include "gated_conv_lines-inl.h"

namespace r2r::R2R_ISA {

inline int64_t staged_stride(int64_t width) {
  return (width + WIDTH - 1) / WIDTH * WIDTH + 2 * WIDTH;
}

// Writes neighbouring values of the result that are in their usual order.
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

// Stages a row of x and of the prior: part p at to + p * stride.
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

// The mean of these rows of a plane of the prior, at the output's width. means [prior_width] is memory to work in.
template <class T>
inline void resize_row(const GatedConv<T>& op, const T* plane, Window rows, float* means, T* to) {
  const float scale = 1.0f / (float)(rows.end - rows.begin);
  const auto mean = [&](int64_t i, int64_t valid) R2R_ALWAYS {
    vec total{};
    for (int64_t r = rows.begin; r < rows.end; r++) total += load_upto(plane + r * op.prior_width + i, valid);
    return total * scale;
  };
  if (op.prior_width <= WIDTH && op.prior_width <= op.width) {  // a window is one place or two, and a register holds the row
    const vec places = mean(0, op.prior_width);
    for (int64_t c = 0; c < op.width; c += WIDTH) {
      const vec first = __builtin_shuffle(places, load(op.first_columns + c));
      store(to + c, 0.5f * (first + __builtin_shuffle(places, load(op.last_columns + c))));
    }
    return;
  }
  for_vectors(0, op.prior_width, [&](int64_t i, int64_t valid) R2R_ALWAYS { store(means + i, mean(i, valid)); });
  for (int64_t c = 0; c < op.width; c++) {
    const int64_t first = op.first_columns[c], last = op.last_columns[c];
    float total = means[first];
    for (int64_t i = first + 1; i <= last; i++) total += means[i];
    store_first(to + c, splat(first == last ? total : total / (float)(last - first + 1)), 1);
  }
}

// Two vectors of pixels slide down a strip of rows; one alone would wait for its sums. A row is read once, for the three
// results that it is near to. The result above it is then complete. Incomplete sums are kept for the next strip. The gates
// of a strip are computed together, because each is a long chain of instructions. Staged rows are a ring, in which the strip
// above leaves its last row. The next strip, or the next plane, is prefetched meanwhile in the order of memory.
template <class T>
void gated_conv_plane_3x3(const GatedConv<T>& op, int64_t plane) {
  constexpr int P = PARTS<T>, BOTH = 2;
  constexpr int64_t ROWS = 2 * STRIP / P, RING = ROWS + 1;
  const int64_t stride = staged_stride(op.width), height = op.height, width = op.width;
  const auto parts_of = scratch_parts(WIDTH + RING * P * stride, stride, op.prior_width + WIDTH, 2 * stride);
  float *const staged = parts_of[0] + WIDTH, *const bottom = parts_of[1], *const means = parts_of[2];
  float* const sums = parts_of[3];  // [vectors][2]
  T* resized = (T*)bottom;
  const float* weight = op.weight + plane % op.channels * 18;
  vec taps[9][P];
  for (int t = 0; t < 9; t++) join(splat(weight[t]), splat(weight[9 + t]), taps[t]);
  const vec bias = splat(op.bias[plane % op.channels]);
  const T *in = op.x + plane * height * width, *prior = op.prior + plane * op.prior_height * op.prior_width;
  T* out = op.y + plane * height * width;
  // Where the prior or y is not to be prefetched, x is prefetched twice: that costs less than a branch.
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
        if (rows.begin != held.begin || rows.end != held.end) resize_row(op, prior, rows, means, resized);
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
        z[end - begin][v] = here[v];  // complete for the plane's last row: there is none below it
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
void gated_conv_plane_1x1(const GatedConv<T>& op, int64_t plane) {
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
  const auto [row, means] = scratch_parts(staged_stride(op.width), op.prior_width + WIDTH);
  T* resized = (T*)row;
  Window held{-1, -1};
  for (int64_t r = 0; r < op.height; r++) {
    const Window rows = op.rows[r];
    if (rows.begin != held.begin || rows.end != held.end) resize_row(op, from, rows, means, resized);
    held = rows;
    gate(op.x + base + r * op.width, resized, op.y + base + r * op.width, op.width);
  }
}

template <class T>
void gated_conv_plane(const GatedConv<T>& op, int64_t plane) {
  if (op.kernel == 1) {
    gated_conv_plane_1x1(op, plane);
  } else {
    gated_conv_plane_3x3(op, plane);
  }
  if (op.streams) fence();
}

}  // namespace r2r::R2R_ISA
