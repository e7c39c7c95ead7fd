#include "operators.h"

namespace r2r {

void local_mean_2d(Tensor x, int64_t window_height, int64_t window_width, bool backward, bool channels_last, Tensor y) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const LocalMean2d<T> op{
        data<const T>(x),
        data<T>(y),
        x.size(1),
        x.size(2),
        x.size(3),
        std::min(window_height, x.size(2)),
        std::min(window_width, x.size(3)),
        backward,
        channels_last};
    const int64_t parts = channels_last ? (op.channels + STRAND - 1) / STRAND : op.channels;
    const int64_t whole = x.size(0) * parts;
    if (whole * op.height * op.width == 0) return;
    // Few parts: they are cut into strips of rows, each of which begins with a whole window.
    constexpr int64_t TASKS = 32;
    const int64_t strips = std::clamp<int64_t>(TASKS / whole, 1, std::max<int64_t>(1, op.height / op.window_height));
    parallel(whole * strips, [&](int64_t begin, int64_t end) {
      float* memory = scratch(local_mean_2d_scratch(op.width));
      for (int64_t i = begin; i < end; i++) {
        const int64_t part = i / strips, strip = i % strips;
        kernels(tag).local_mean_2d(
            op, part / parts, part % parts, op.height * strip / strips, op.height * (strip + 1) / strips, memory);
      }
    });
  });
}

}  // namespace r2r
