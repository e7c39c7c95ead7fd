// local_mean_2d by running sums, down the columns and then along the rows. What enters a window is added, what leaves it is
// subtracted, so the cost does not grow with the window. The sums are float64: a float32 value that was added and subtracted
// leaves no trace that float32 could show.
#include "common/panel-inl.h"
#include "local_mean_2d.h"

namespace r2r::R2R_ISA {

constexpr int HALF = WIDTH / 2;
typedef double wide_vec __attribute__((vector_size(4 * WIDTH)));  // HALF values
typedef float half_floats __attribute__((vector_size(2 * WIDTH)));
typedef float loose_half_floats __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef uint16_t quarter_vec __attribute__((vector_size(WIDTH)));
typedef uint16_t loose_quarter_vec __attribute__((vector_size(WIDTH), aligned(2), may_alias));
typedef uint32_t half_uvec __attribute__((vector_size(2 * WIDTH)));

inline wide_vec load_wide(const float* p) {
  return __builtin_convertvector(*(const loose_half_floats*)p, wide_vec);
}
inline wide_vec load_wide(const bfloat16* p) {
  const half_uvec bits = __builtin_convertvector(*(const loose_quarter_vec*)p, half_uvec) << 16;
  return __builtin_convertvector((half_floats)bits, wide_vec);
}
template <class T>
inline wide_vec load_wide_upto(const T* p, int64_t n) {
  if (n >= HALF) return load_wide(p);
  float few[WIDTH];
  store(few, n > 0 ? load_first(p, n) : vec{});
  return load_wide(few);
}
inline void store_narrow(float* p, wide_vec value) {
  *(loose_half_floats*)p = __builtin_convertvector(value, half_floats);
}

// The range that is summed for output i of an axis: forward the pixels of its window, backward the windows that hold pixel
// i.
struct SlidingWindow {
  int64_t length;
  int64_t size;
  bool backward;

  int64_t begin(int64_t i) const {
    const int64_t before = (size - 1) / 2;
    if (backward) return i < size ? 0 : i - size + 1 + before;
    return i < before ? 0 : least(i - before, length - size);
  }
  int64_t end(int64_t i) const {
    if (backward) return i >= length - size ? length : i + (size - 1) / 2 + 1;
    return begin(i) + size;
  }
};

// sums [groups][LANES] += enter - leave; means = sums * scale. enter and leave are rows or nullptr. A row has `count`
// values. Its groups have up to `lanes` values each and lie `stride` apart.
template <class T>
inline void slide(
    const T* enter, const T* leave, int64_t stride, int64_t lanes, int64_t groups, int64_t count, double scale, double* sums,
    float* means) {
  for (int64_t g = 0; g < groups; g++) {
    const int64_t valid = least(lanes, count - g * stride);
    for (int64_t l = 0; l < LANES; l += HALF) {
      double* at = sums + g * LANES + l;
      wide_vec total = *(const wide_vec*)at;
      if (enter) total += load_wide_upto(enter + g * stride + l, valid - l);
      if (leave) total -= load_wide_upto(leave + g * stride + l, valid - l);
      *(wide_vec*)at = total;
      store_narrow(means + g * LANES + l, total * scale);
    }
  }
}

// The means along a row: from, to [length][LANES].
inline void slide_along(const float* from, float* to, const SlidingWindow& window) {
  const double scale = 1.0 / (double)window.size;
  wide_vec totals[LANES / HALF] = {};
  int64_t begin = 0, end = 0;
  for (int64_t i = 0; i < window.length; i++) {
    const int64_t wanted_begin = window.begin(i), wanted_end = window.end(i);
    for (; end < wanted_end; end++) {
      for (int l = 0; l < LANES / HALF; l++) totals[l] += load_wide(from + end * LANES + l * HALF);
    }
    for (; begin < wanted_begin; begin++) {
      for (int l = 0; l < LANES / HALF; l++) totals[l] -= load_wide(from + begin * LANES + l * HALF);
    }
    for (int l = 0; l < LANES / HALF; l++) store_narrow(to + i * LANES + l * HALF, totals[l] * scale);
  }
}

template <class T>
void local_mean_2d_rows(const LocalMean2d<T>& op, int64_t n, int64_t part, int64_t top, int64_t bottom) {
  const int64_t area = op.height * op.width, padded = (op.width + LANES - 1) / LANES * LANES;
  const int64_t pixel = op.channels_last ? op.channels : 1, row = op.width * pixel;
  const int64_t first = n * op.channels * area + (op.channels_last ? part * LANES : part * area);
  const int64_t lanes = op.channels_last ? least(LANES, op.channels - part * LANES) : LANES;
  const int64_t stride = op.channels_last ? op.channels : LANES, groups = op.channels_last ? op.width : padded / LANES;
  const int64_t count = op.channels_last ? groups * stride : op.width;
  const SlidingWindow down{op.height, op.window_height, op.backward}, across{op.width, op.window_width, op.backward};
  const T* x = op.x + first;
  T* y = op.y + first;

  const auto parts = scratch_parts(2 * groups * LANES, LANES * padded, LANES * op.width, LANES * op.width);
  double* const sums = (double*)parts[0];
  float* const means = parts[1];  // [width][LANES], or LANES rows [padded]
  float *const columns = parts[2], *const out = parts[3];
  for (int64_t i = 0; i < groups * LANES; i++) sums[i] = 0;
  int64_t begin = down.begin(top), end = begin, staged = 0;
  for (int64_t r = top; r < bottom; r++) {
    const int64_t wanted_begin = down.begin(r), wanted_end = down.end(r);
    do {
      const T* enter = end < wanted_end ? x + end++ * row : nullptr;
      const T* leave = begin < wanted_begin ? x + begin++ * row : nullptr;
      slide(enter, leave, stride, lanes, groups, count, 1.0 / (double)down.size, sums, means + staged * padded);
    } while (end < wanted_end || begin < wanted_begin);
    if (op.channels_last) {
      slide_along(means, out, across);
      for (int64_t i = 0; i < op.width; i++) {
        for (int64_t l = 0; l < lanes; l += WIDTH) {
          store_upto(y + r * row + i * stride + l, load(out + i * LANES + l), lanes - l);
        }
      }
    } else if (++staged == LANES || r + 1 == bottom) {
      for (int64_t l = 0; l < staged; l += WIDTH) {
        transpose_rows(means + l * padded, padded, columns + l, LANES, least(WIDTH, staged - l), op.width, WIDTH);
      }
      slide_along(columns, out, across);
      T* rows = y + (r + 1 - staged) * row;
      for (int64_t i = 0; i < op.width; i += WIDTH) {
        transpose_rows(
            out + i * LANES, LANES, rows + i, row, least(WIDTH, op.width - i), staged, least(WIDTH, op.width - i));
      }
      staged = 0;
    }
  }
}

template <class T>
constexpr LocalMean2dKernels<T> local_mean_2d_kernels{.rows = local_mean_2d_rows<T>};
R2R_DEFINE_KERNELS(LocalMean2dKernels, local_mean_2d_kernels)

}  // namespace r2r::R2R_ISA
