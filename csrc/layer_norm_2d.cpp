#include "layer_norm_2d.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

namespace {

void layer_norm_2d(
    Tensor x, Tensor weight, Tensor bias, double eps, bool channels_last, Tensor y, Tensor mean, Tensor rstd) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const LayerNorm2d<T> op{
        .x = images<const T>(x, channels_last),
        .y = images<T>(y, channels_last),
        .weight = floats(weight),
        .bias = floats(bias),
        .eps = static_cast<float>(eps),
        .mean = data<float>(mean),
        .rstd = data<float>(rstd)};
    parallel_over_images(x.size(0), panels(op.x.pixels), [&](int64_t n, int64_t begin, int64_t end) {
      kernels<LayerNorm2dKernels<T>>().forward(op, n, begin, end);
    });
  });
}

void layer_norm_2d_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const LayerNorm2dBackward<T> op{
        .dy = images<const T>(dy, channels_last),
        .x = images<const T>(x, channels_last),
        .dx = images<T>(dx, channels_last),
        .weight = floats(weight),
        .mean = data<float>(mean),
        .rstd = data<float>(rstd)};
    constexpr int64_t CHUNK = 8;  // panels; short sums keep their digits, and chunks are added in their order
    const int64_t channels = op.x.channels, each = panels(op.x.pixels), chunks = (each + CHUNK - 1) / CHUNK;
    const int64_t tasks = x.size(0) * chunks;
    std::vector<float> sums(tasks * 2 * channels);
    parallel(tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = i % chunks * CHUNK;
        kernels<LayerNorm2dKernels<T>>().backward(
            op, i / chunks, first, std::min(each, first + CHUNK), sums.data() + i * 2 * channels);
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def(
      "layer_norm_2d(Tensor x, Tensor weight, Tensor bias, float eps, bool channels_last, Tensor(a!) y, Tensor(b!) mean, "
      "Tensor(c!) rstd) -> ()");
  m.def(
      "layer_norm_2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool channels_last, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("layer_norm_2d", TORCH_BOX(&layer_norm_2d));
  m.impl("layer_norm_2d_backward", TORCH_BOX(&layer_norm_2d_backward));
}

}  // namespace r2r
