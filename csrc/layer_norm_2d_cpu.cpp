#include "operators.h"

namespace r2r {

void layer_norm_2d(
    Tensor x, Tensor weight, Tensor bias, double eps, bool channels_last, Tensor y, Tensor mean, Tensor rstd) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Floats floats;
    const LayerNorm2d<T> op{images<const T>(x, channels_last), images<T>(y, channels_last), floats(weight),   floats(bias),
                            static_cast<float>(eps),           data<float>(mean),           data<float>(rstd)};
    const int64_t each = panels(op.x.pixels);
    parallel(x.size(0) * each, [&](int64_t begin, int64_t end) {
      float* memory = scratch(layer_norm_2d_scratch(op.x.channels));
      while (begin < end) {
        const int64_t n = begin / each, stop = std::min(end, (n + 1) * each);
        kernels(tag).layer_norm_2d(op, n, begin - n * each, stop - n * each, memory);
        begin = stop;
      }
    });
  });
}

void layer_norm_2d_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Floats floats;
    const LayerNorm2dBackward<T> op{
        images<const T>(dy, channels_last),
        images<const T>(x, channels_last),
        images<T>(dx, channels_last),
        floats(weight),
        data<float>(mean),
        data<float>(rstd)};
    constexpr int64_t CHUNK = 8;  // panels; short sums keep their digits, and chunks are added in their order
    const int64_t channels = op.x.channels, each = panels(op.x.pixels), chunks = (each + CHUNK - 1) / CHUNK;
    const int64_t tasks = x.size(0) * chunks;
    std::vector<float> sums(tasks * 2 * channels);
    parallel(tasks, [&](int64_t begin, int64_t end) {
      float* memory = scratch(layer_norm_2d_scratch(channels));
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = i % chunks * CHUNK;
        kernels(tag).layer_norm_2d_backward(
            op, i / chunks, first, std::min(each, first + CHUNK), sums.data() + i * 2 * channels, memory);
      }
    });
    float* out[2] = {data<float>(dweight), data<float>(dbias)};
    for (int64_t c = 0; c < 2 * channels; c++) {
      double total = 0;
      for (int64_t i = 0; i < tasks; i++) total += sums[i * 2 * channels + c];
      out[c / channels][c % channels] = static_cast<float>(total);
    }
  });
}

}  // namespace r2r
