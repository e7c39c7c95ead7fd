// gated_feed_forward: the feed-forward branch of a NAF block, which is stage `result` without attention.
#include "naf_block.h"
#include "naf_block_gradients.h"

namespace r2r {

namespace {

void gated_feed_forward(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor result) {
  if (x.numel() == 0) return;
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const bool pairs = multiplies_pairs<T>(x.size(1));
    const std::vector<Parameter> without = pairs ? std::vector{CONV4_WEIGHT, CONV5_WEIGHT} : std::vector<Parameter>{};
    const NAFBlock<T> op{
        .weights = widened(params, NORM2_WEIGHT, without, floats),
        .matrices = pointers<const T>(params, NORM2_WEIGHT),
        .pairs = pairs,
        .x = images<const T>(x, channels_last),
        .result = images<T>(result, channels_last),
        .gated = nullptr,
        .height = x.size(2),
        .width = x.size(3),
        .eps = static_cast<float>(eps)};
    make_result(op, x.size(0), nullptr);
  });
}

void gated_feed_forward_backward(
    Tensor dz, Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor dx,
    std::vector<Tensor> dparams) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const int64_t images = x.size(0), each = panels(x.size(2) * x.size(3));
    SumsInParts sums(NORM2_WEIGHT, x.size(1), images * each);
    const NAFBlockBackward<T> op = taken_back<T>(dz, x, params, NORM2_WEIGHT, eps, channels_last, dx, sums, floats);
    sums.sweep(images, each, [&](int64_t, int64_t n, int64_t first, int64_t last, const Parameters<float>& to) {
      kernels<NAFBlockBackwardKernels<T>>().result_backward(op, n, nullptr, first, last, nullptr, to);
    });
    sums.to_gradients(op.weights, pointers<float>(dparams, NORM2_WEIGHT));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("gated_feed_forward(Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) result) -> ()");
  m.def(
      "gated_feed_forward_backward(Tensor dz, Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) dx, "
      "Tensor(b!)[] dparams) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("gated_feed_forward", TORCH_BOX(&gated_feed_forward));
  m.impl("gated_feed_forward_backward", TORCH_BOX(&gated_feed_forward_backward));
}

}  // namespace r2r
