// upsample_add in one pass: sums go from registers to their place in the result. NCHW multiplies rows of weights by panels
// of pixels; output channels (2k, 2k + 1) interleave to one row of the result. channels_last multiplies pixels by panels of
// weights.
#include "common/panel-inl.h"
#include "upsample_add.h"

namespace r2r::R2R_ISA {

// Block `block` of the weights [4 * channels, depth] as a panel [depth][PANEL]. The columns are ordered (i, j, c), because
// (j, c) are neighbours in row i of the result. The columns of each i are padded to whole panels.
inline void upsample_add_pack(const float* weight, int64_t channels, int64_t block, float* packed) {
  const int64_t depth = 2 * channels, half = panels(depth), i = block / half;
  for (int64_t l = 0; l < PANEL; l += WIDTH) {
    const int64_t first = block % half * PANEL + l;
    for (int64_t k = 0; k < depth; k += WIDTH) {
      vec rows[WIDTH];
      for (int r = 0; r < WIDTH; r++) {
        const int64_t j = (first + r) / channels, c = (first + r) % channels;
        rows[r] = j < 2 ? load_upto(weight + (4 * c + 2 * i + j) * depth + k, depth - k) : vec{};
      }
      transpose(rows);
      for (int64_t r = 0; r < least(WIDTH, depth - k); r++) store(packed + (k + r) * PANEL + l, rows[r]);
    }
  }
}

// The place of pixel p's first result in row i of its two rows, in an image of one channel.
template <class T>
inline int64_t upsampled(const UpsampleAdd<T>& op, int64_t p, int64_t i) {
  return (2 * (p / op.width) + i) * 2 * op.width + 2 * (p % op.width);
}

template <class T>
inline void upsample_add_planes(const UpsampleAdd<T>& op, int64_t n, int64_t first, int64_t pixels) {
  const int64_t depth = 2 * op.channels, area = 4 * op.x.pixels;
  float* const x = scratch(panels(pixels) * PANEL * depth);
  for (int64_t p = 0; p < pixels; p += PANEL) {
    load_panel(op.x, n, first + p, least(PANEL, pixels - p), x + p * depth);
  }
  ivec low;
  for (int l = 0; l < WIDTH; l++) low[l] = l / 2 + l % 2 * WIDTH;
  const ivec high = low + WIDTH / 2;
  for_blocks(depth, ROWS / 2, 1, [&](int64_t begin, int64_t end) {
    const int64_t o = 2 * begin, pairs = end - begin;
    const float* rows = op.weight + o * depth;
    multiply(
        pairs, rows, rows + pairs * depth, depth, x, pixels,
        [=, &op](auto& sums, int64_t pixel) __attribute__((always_inline)) {
          constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
          unrolled<V>([&](auto v) __attribute__((always_inline)) {
            const int64_t from = pixel + v * WIDTH, to = least(from + WIDTH, pixels);
            for (int64_t run = from; run < to;) {  // the end of the image's row, or of the vector
              const int64_t column = (first + run) % op.width, length = least(to - run, op.width - column);
              unrolled<M / 2>([&](auto pair) __attribute__((always_inline)) {
                constexpr int m = 2 * pair;
                float both[3 * WIDTH];
                store(both, __builtin_shuffle(sums[m][v], sums[m + 1][v], low));
                store(both + WIDTH, __builtin_shuffle(sums[m][v], sums[m + 1][v], high));
                const int64_t channel = (o + m) / 4, i = (o + m) / 2 % 2;
                const int64_t at = (n * op.channels + channel) * area + upsampled(op, first + run, i);
                for (int64_t k = 0; k < 2 * length; k += WIDTH) {
                  const vec value = load(both + 2 * (run - from) + k) + load_upto(op.skip + at + k, 2 * length - k);
                  store_upto(op.y + at + k, value, 2 * length - k);
                }
              });
              run += length;
            }
          });
        });
  });
}

inline void upsample_add_rows(const UpsampleAdd<float>& op, int64_t n, int64_t first, int64_t pixels) {
  const int64_t channels = op.channels, depth = 2 * channels, half = panels(depth);
  const float* x = op.x.image(n) + first * depth;
  for (int64_t block = 0; block < 2 * half; block++) {
    const int64_t o = block % half * PANEL;
    for_blocks(pixels, ROWS, 1, [&](int64_t p, int64_t end) {
      const int64_t pairs = (end - p + 1) / 2, second = end - pairs;  // of an odd number, the middle one is computed twice
      multiply(
          pairs, x + p * depth, x + second * depth, depth, op.weight + block * depth * PANEL, least(PANEL, depth - o),
          [=, &op](auto& sums, int64_t column) __attribute__((always_inline)) {
            constexpr int M = sizeof(sums) / sizeof(sums[0]), V = sizeof(sums[0]) / sizeof(vec);
            unrolled<M>([&](auto m) __attribute__((always_inline)) {
              const int64_t pixel = first + (m < M / 2 ? p + m : second + m - M / 2);
              const int64_t at = (n * 4 * op.x.pixels + upsampled(op, pixel, block / half)) * channels;
              unrolled<V>([&](auto v) __attribute__((always_inline)) {
                const int64_t c = o + column + v * WIDTH;
                store_upto(op.y + at + c, sums[m][v] + load_upto(op.skip + at + c, depth - c), depth - c);
              });
            });
          });
    });
  }
}

template <class T>
void upsample_add(const UpsampleAdd<T>& op, int64_t n, int64_t first, int64_t pixels) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (op.x.channels_last) return upsample_add_rows(op, n, first, pixels);
  }
  upsample_add_planes(op, n, first, pixels);
}

template <class T>
constexpr UpsampleAddKernels<T> upsample_add_kernels{
    .pack = upsample_add_pack,
    .forward = upsample_add<T>,
};
R2R_DEFINE_KERNELS(UpsampleAddKernels, upsample_add_kernels)

}  // namespace r2r::R2R_ISA
