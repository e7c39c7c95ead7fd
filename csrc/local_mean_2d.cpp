#include "local_mean_2d.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

template <class T>
void local_means(const LocalMean2d<T>& op, int64_t images) {
  const int64_t parts = op.channels_last ? (op.channels + LANES - 1) / LANES : op.channels;
  const int64_t whole = images * parts;
  if (whole * op.height * op.width == 0) return;
  // Few parts are cut into strips of rows. Each strip begins with a whole window.
  constexpr int64_t TASKS = 32;
  const int64_t strips = std::clamp<int64_t>(TASKS / whole, 1, std::max<int64_t>(1, op.height / op.window_height));
  parallel(whole * strips, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t part = i / strips, strip = i % strips;
      kernels<LocalMean2dKernels<T>>().rows(
          op, part / parts, part % parts, op.height * strip / strips, op.height * (strip + 1) / strips);
    }
  });
}

template void local_means(const LocalMean2d<float>&, int64_t);
template void local_means(const LocalMean2d<bfloat16>&, int64_t);

namespace {

void local_mean_2d(Tensor x, int64_t window_height, int64_t window_width, bool backward, bool channels_last, Tensor y) {
  for_dtype(x, [&]<class T>() {
    local_means(
        LocalMean2d<T>{
            .x = data<const T>(x),
            .y = data<T>(y),
            .channels = x.size(1),
            .height = x.size(2),
            .width = x.size(3),
            .window_height = std::min(window_height, x.size(2)),
            .window_width = std::min(window_width, x.size(3)),
            .backward = backward,
            .channels_last = channels_last},
        x.size(0));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def(
      "local_mean_2d(Tensor x, int window_height, int window_width, bool backward, bool channels_last, Tensor(a!) y) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("local_mean_2d", TORCH_BOX(&local_mean_2d));
}

}  // namespace r2r
