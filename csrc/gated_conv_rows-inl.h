// gated_conv over rows (channels_last): a vector holds neighbouring channels of a pixel. A pixel's neighbours are pointers;
// those outside of the image point at zeros.
#pragma once

#include "gated_conv_lines-inl.h"

namespace r2r::R2R_ISA {

// The means of the prior over the windows of one row and of columns [left, right). Neighbouring columns often share their
// window. The mean of a column is means[which[column - left]] [channels].
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

// The means of the prior are made once for all rows and columns that share them.
template <class T>
void gated_conv_rows_1x1(const GatedConv<T>& op, int64_t n, const Tile& tile) {
  const int64_t channels = op.channels, columns = op.rows ? tile.right - tile.left : 0;
  const T* image = op.prior + n * op.prior_height * op.prior_width * channels;
  const auto parts = scratch_parts(3 * channels, columns * channels, columns);
  float* const taps = parts[0];
  T* const means = (T*)parts[1];
  int32_t* const which = (int32_t*)parts[2];
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
        // With resizing a tile is narrow. Without a prefetch the processor would wait at the begin of each row.
        if (op.rows) __builtin_prefetch(x + op.width * channels + c, 0, 2);
        gate_values<V>(op, x + c, prior + c, op.y + at + c, valid, [&](int t, int v) R2R_ALWAYS {
          return load_upto(taps + t * channels + c + v * WIDTH, valid - v * WIDTH);
        });
      });
    }
  }
}

// The parts of a vector or a line of a pixel.
template <int V, class T>
R2R_INLINE void load_parts(const T* x, const T* prior, int64_t valid, vec (&parts)[V][PARTS<T>]) {
  if constexpr (V == 1) {
    join(load_part(x, valid), load_part(prior, valid), parts[0]);
  } else {
    join_lines(x, prior, parts);
  }
}

constexpr int GATED_CONV_ROWS = 2;  // rows that 3x3 makes at a time

// Where a column of these rows is read, with the row above and the row below them.
template <class T>
struct Column {
  const T* x[GATED_CONV_ROWS + 2];
  const T* prior[GATED_CONV_ROWS + 2];
};

// Slides along columns [begin, end) of a strip of rows, one line of channels after the other. A column is read once, for the
// three results of each row that it is near to. The result before it is then complete: column - 2 of the results, because
// columns begin one before the first result. state [channels][2 * R] keeps the incomplete sums of the last columns. taps
// [channels / WIDTH][9 * P + 1][WIDTH] end with the bias. Meanwhile the next strip is prefetched from next_x and next_prior
// on, in the order of memory. One cache line of each pixel of its result is prefetched too, so that its pages are in the
// TLB.
template <class T>
void gate_columns_3x3(
    const GatedConv<T>& op, const float* taps, const Column<T>* columns, int64_t begin, int64_t end, int64_t rows, T* y,
    const T* next_x, const T* next_prior, float* state) {
  constexpr int P = PARTS<T>, R = GATED_CONV_ROWS;
  const int64_t channels = op.channels, row_size = op.width * channels;
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
        __builtin_prefetch(next_x + r * row_size + ahead, 0, 2);
        if (!op.rows) __builtin_prefetch(next_prior + r * row_size + ahead, 0, 2);
        if (c == 0) __builtin_prefetch(y + (R + r) * row_size + column * channels, 1, 2);
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
        put_result(op, y + r * row_size + (column - 2) * channels + c, values, valid);
      }
    }
    for (int v = 0; v < V; v++) {
      float* held = state + (c + v * WIDTH) * 2 * R;
      for (int r = 0; r < R; r++) store(held + r * WIDTH, here[v][r]), store(held + (R + r) * WIDTH, next[v][r]);
    }
  });
}

// Walks down a tile. It is narrow enough that the rows that are read and those that are prefetched fit the second-level
// cache.
template <class T>
void gated_conv_rows_3x3(const GatedConv<T>& op, int64_t n, const Tile& tile) {
  constexpr int P = PARTS<T>, R = GATED_CONV_ROWS;
  const int64_t channels = op.channels, width = op.width, height = op.height, vectors = (channels + WIDTH - 1) / WIDTH;
  const int64_t left = tile.left ? tile.left - 1 : 0, right = least(width, tile.right + 1), number = right - left;
  const T *in = op.x + n * height * width * channels, *from = op.prior + n * op.prior_height * op.prior_width * channels;
  const int64_t padded = vectors * WIDTH, floats_of_columns = (number + 2) * sizeof(Column<T>) / sizeof(float);
  const auto memory = scratch_parts(
      (9 * P + 1) * padded, 2 * R * padded, floats_of_columns, padded, op.rows ? (R + 2) * number * channels : 0, number);
  float *const taps = memory[0], *const state = memory[1];
  Column<T>* const columns = (Column<T>*)memory[2];
  T *const zeros = (T*)memory[3], *const means = (T*)memory[4];
  int32_t* const which = (int32_t*)memory[5];
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

  // R + 2 neighbouring rows have at most R + 2 windows, in their order. rows_of_means are the means of the last R + 2 rows.
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
void gated_conv_rows(const GatedConv<T>& op, int64_t n, const Tile& tile) {
  if (op.kernel == 1) {
    gated_conv_rows_1x1(op, n, tile);
  } else {
    gated_conv_rows_3x3(op, n, tile);
  }
  if (op.streams) fence();
}

}  // namespace r2r::R2R_ISA
