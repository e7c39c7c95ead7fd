#include "depthwise_gate_backward.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

namespace {

// What a task keeps of a tile should fit the first-level cache. In channels_last it keeps several planes, which should fit
// the second-level cache. Tiles are no smaller than that, because the pixels around them are computed again.
Tiling tiling(int64_t height, int64_t width, bool channels_last) {
  const int64_t area = channels_last ? 1024 : 2048, widest = channels_last ? 128 : 512;
  const int64_t across = (width + widest - 1) / widest, rows = std::max<int64_t>(8, area * across / width);
  return {height, width, (height + rows - 1) / rows, across};
}

}  // namespace

template <class T>
void depthwise_gate_gradients(const DepthwiseGateBackward<T>& op, int64_t images, float* dweight, float* dbias) {
  const int64_t channels = op.conv.channels, step = op.channels_last ? LANES : 1;
  const Tiling tiles = tiling(op.conv.height, op.conv.width, op.channels_last);
  const int64_t all = images * tiles.count(), groups = (channels + step - 1) / step;
  // A part is some of the tiles of all images, whose sums are added together. The parts are then added in their order. Their
  // number does not depend on the number of threads.
  constexpr int64_t TASKS = 64;
  const int64_t parts = std::min(all, (TASKS + groups - 1) / groups), sums = 2 * channels * 10 * LANES;
  std::vector<float> totals(parts * sums);
  parallel(parts * groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t part = i / groups, first = i % groups * step;
      for_images(all * part / parts, all * (part + 1) / parts, tiles.count(), [&](int64_t n, int64_t at, int64_t stop) {
        for (; at < stop; at++) {
          kernels<DepthwiseGateBackwardKernels<T>>().tile(
              op, n, tiles.tile(at), first, std::min(channels, first + step), totals.data() + part * sums);
        }
      });
    }
  });
  for (int64_t i = 0; i < 20 * channels; i++) {
    double total = 0;
    for (int64_t part = 0; part < parts; part++) {
      for (int64_t lane = 0; lane < LANES; lane++) total += totals[part * sums + i * LANES + lane];
    }
    (i % 10 < 9 ? dweight[i / 10 * 9 + i % 10] : dbias[i / 10]) = static_cast<float>(total);
  }
}

template void depthwise_gate_gradients(const DepthwiseGateBackward<float>&, int64_t, float*, float*);
template void depthwise_gate_gradients(const DepthwiseGateBackward<bfloat16>&, int64_t, float*, float*);

namespace {

void depthwise_gate_backward(
    Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const int64_t images = x.size(0), channels = dgated.size(1), height = x.size(2), width = x.size(3);
    const float* of_mean = floats(dmean);
    std::vector<float> shift(images * channels);
    for (size_t i = 0; i < shift.size(); i++) shift[i] = of_mean[i] / static_cast<float>(height * width);
    const DepthwiseGateBackward<T> op{
        .conv = {floats(weight), floats(bias), channels, height, width},
        .dgated = data<T>(dgated),
        .x = data<T>(x),
        .dx = data<T>(dx),
        .scale = nullptr,
        .shift = shift.data(),
        .channels_last = channels_last};
    depthwise_gate_gradients(op, images, data<float>(dweight), data<float>(dbias));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def(
      "depthwise_gate_backward(Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias, bool channels_last, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("depthwise_gate_backward", TORCH_BOX(&depthwise_gate_backward));
}

}  // namespace r2r
