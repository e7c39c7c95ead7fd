#include "operators.h"

namespace r2r {

void depthwise_gate(Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor gated, Tensor mean) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* in = data<T>(x);
    T* out = data<T>(gated);
    Floats floats;
    const Depthwise op{floats(weight), floats(bias), gated.size(1), gated.size(2), gated.size(3)};
    const int64_t images = x.size(0), area = op.height * op.width;
    // Strips of rows that leave two planes in the second-level cache, or for channels_last, which reads rows where they are,
    // few enough that their sum keeps its digits. The strips' sums are added in their order.
    const int64_t rows = channels_last ? 8 : std::max<int64_t>(4, 16384 / std::max<int64_t>(1, op.width));
    const int64_t strips = (op.height + rows - 1) / rows;
    std::vector<float> sums(images * strips * op.channels);
    if (channels_last) {
      std::vector<float> taps(9 * 2 * op.channels);
      for (int64_t c = 0; c < 2 * op.channels; c++) {
        for (int64_t t = 0; t < 9; t++) taps[t * 2 * op.channels + c] = op.weight[c * 9 + t];
      }
      parallel(images * strips, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t n = i / strips, top = i % strips * rows;
          kernels(tag).depthwise_gate_channels_last(
              op, taps.data(), in + n * 2 * op.channels * area, out + n * op.channels * area, top,
              std::min(op.height, top + rows), sums.data() + i * op.channels);
        }
      });
    } else {
      parallel(images * strips * op.channels, [&](int64_t begin, int64_t end) {
        float* memory = scratch(2 * plane_floats(rows, op.width));
        for (int64_t i = begin; i < end; i++) {
          const int64_t n = i / op.channels / strips, top = i / op.channels % strips * rows;
          sums[i] = kernels(tag).depthwise_gate(
              op, in + n * 2 * op.channels * area, out + n * op.channels * area, i % op.channels,
              Tile{top, std::min(op.height, top + rows), 0, op.width}, memory);
        }
      });
    }
    for (int64_t n = 0; n < images; n++) {
      for (int64_t c = 0; c < op.channels; c++) {
        double total = 0;
        for (int64_t s = 0; s < strips; s++) total += sums[(n * strips + s) * op.channels + c];
        data<float>(mean)[n * op.channels + c] = static_cast<float>(total / static_cast<double>(area));
      }
    }
  });
}

}  // namespace r2r
