#include "depthwise_gate.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

namespace {

// The sums of strips of rows are added in their order, [images, strips, channels] -> mean [images, channels].
void add_strips(
    const std::vector<float>& sums, int64_t images, int64_t strips, int64_t channels, int64_t area, float* mean) {
  for (int64_t n = 0; n < images; n++) {
    for (int64_t c = 0; c < channels; c++) {
      double total = 0;
      for (int64_t s = 0; s < strips; s++) total += sums[(n * strips + s) * channels + c];
      mean[n * channels + c] = static_cast<float>(total / static_cast<double>(area));
    }
  }
}

template <class T>
void gate_rows(const Depthwise& op, int64_t images, const T* x, T* gated, float* mean) {
  constexpr int64_t ROWS = 8;  // of a strip; few, so that their sum keeps its digits
  const int64_t channels = op.channels, area = op.height * op.width, strips = (op.height + ROWS - 1) / ROWS;
  std::vector<float> taps(9 * 2 * channels), sums(images * strips * channels);
  for (int64_t c = 0; c < 2 * channels; c++) {
    for (int64_t t = 0; t < 9; t++) taps[t * 2 * channels + c] = op.weight[c * 9 + t];
  }
  parallel_over_images(images, strips, [&](int64_t n, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++) {
      kernels<DepthwiseGateKernels<T>>().rows(
          op, taps.data(), x + n * 2 * channels * area, gated + n * channels * area, s * ROWS,
          std::min(op.height, (s + 1) * ROWS), sums.data() + (n * strips + s) * channels);
    }
  });
  add_strips(sums, images, strips, channels, area, mean);
}

}  // namespace

template <class T>
void depthwise_gates(const Depthwise& op, int64_t images, const T* x, T* gated, float* mean) {
  // Two planes of a strip should fit the second-level cache.
  const int64_t rows = std::max<int64_t>(4, 16384 / std::max<int64_t>(1, op.width));
  const int64_t channels = op.channels, area = op.height * op.width, strips = (op.height + rows - 1) / rows;
  std::vector<float> sums(images * strips * channels);
  parallel_over_images(images, strips * channels, [&](int64_t n, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t top = i / channels * rows;
      sums[n * strips * channels + i] = kernels<DepthwiseGateKernels<T>>().planes(
          op, x + n * 2 * channels * area, gated + n * channels * area, i % channels,
          Tile{top, std::min(op.height, top + rows), 0, op.width});
    }
  });
  add_strips(sums, images, strips, channels, area, mean);
}

template void depthwise_gates(const Depthwise&, int64_t, const float*, float*, float*);
template void depthwise_gates(const Depthwise&, int64_t, const bfloat16*, bfloat16*, float*);

namespace {

void depthwise_gate(Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor gated, Tensor mean) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const Depthwise op{floats(weight), floats(bias), gated.size(1), gated.size(2), gated.size(3)};
    const auto gate = channels_last ? gate_rows<T> : depthwise_gates<T>;
    gate(op, x.size(0), data<T>(x), data<T>(gated), data<float>(mean));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("depthwise_gate(Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor(a!) gated, Tensor(b!) mean) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("depthwise_gate", TORCH_BOX(&depthwise_gate));
}

}  // namespace r2r
