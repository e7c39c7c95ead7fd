#include "operators.h"

namespace r2r {

namespace {

// How images are cut: what is kept of a tile should fit the first-level cache, or with planes of channels_last, which are
// made several at a time, the second-level cache; tiles no smaller than that, as what lies around them is computed again.
struct Grid {
  int64_t down;
  int64_t across;
  int64_t height;
  int64_t width;

  Grid(int64_t image_height, int64_t image_width, bool channels_last) : height(image_height), width(image_width) {
    const int64_t area = channels_last ? 1024 : 2048, widest = channels_last ? 128 : 512;
    across = (width + widest - 1) / widest;
    const int64_t rows = std::max<int64_t>(8, area * across / width);
    down = (height + rows - 1) / rows;
  }

  int64_t tiles() const {
    return down * across;
  }
  Tile tile(int64_t i) const {
    const int64_t row = i / across, column = i % across;
    return {height * row / down, height * (row + 1) / down, width * column / across, width * (column + 1) / across};
  }
};

}  // namespace

template <class T>
void depthwise_gate_gradients(const DepthwiseGateBackward<T>& op, int64_t images, float* dweight, float* dbias) {
  const T* tag = nullptr;
  const int64_t channels = op.conv.channels, step = op.channels_last ? LANES : 1;
  const Grid grid(op.conv.height, op.conv.width, op.channels_last);
  const int64_t tiles = grid.tiles(), groups = (channels + step - 1) / step;
  // A part of the images' tiles is summed up before it is added to the others, in their order. Parts do not depend on
  // the number of threads.
  constexpr int64_t TASKS = 64;
  const int64_t parts = std::min(images * tiles, (TASKS + groups - 1) / groups), sums = 2 * channels * 10 * LANES;
  std::vector<float> totals(parts * sums);
  parallel(parts * groups, [&](int64_t begin, int64_t end) {
    const Tile largest{0, (grid.height + grid.down - 1) / grid.down, 0, (grid.width + grid.across - 1) / grid.across};
    float* memory = scratch(4 * step * gradient_plane_floats(largest.bottom, largest.right));
    for (int64_t i = begin; i < end; i++) {
      const int64_t part = i / groups, first = i % groups * step;
      for (int64_t at = images * tiles * part / parts; at < images * tiles * (part + 1) / parts; at++) {
        kernels(tag).depthwise_gate_backward(
            op, at / tiles, grid.tile(at % tiles), first, std::min(channels, first + step), totals.data() + part * sums,
            memory);
      }
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

void depthwise_gate_backward(
    Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Floats floats;
    const int64_t images = x.size(0), channels = dgated.size(1), height = x.size(2), width = x.size(3);
    const float* of_mean = floats(dmean);
    std::vector<float> shift(images * channels);
    for (size_t i = 0; i < shift.size(); i++) shift[i] = of_mean[i] / static_cast<float>(height * width);
    const DepthwiseGateBackward<T> op{
        {floats(weight), floats(bias), channels, height, width},
        data<T>(dgated),
        data<T>(x),
        data<T>(dx),
        nullptr,
        shift.data(),
        channels_last};
    depthwise_gate_gradients(op, images, data<float>(dweight), data<float>(dbias));
  });
}

}  // namespace r2r
