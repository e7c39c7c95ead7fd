#include "operators.h"

namespace r2r {

void gated_feed_forward(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor y) {
  STD_TORCH_CHECK(params.size() == 7, "the second half of a NAF block has 7 parameters");
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr size_t CONV1 = 2, CONV2 = 4;
    const bool pairs = kernels(tag).pairs && x.size(1) % 2 == 0;
    Floats floats;
    const float* p[7] = {};
    for (size_t i = 0; i < 7; i++) {
      if (!(pairs && (i == CONV1 || i == CONV2))) p[i] = floats(params[i]);
    }
    NAFBlockWeights weights{};
    weights.norm2_weight = p[0];
    weights.norm2_bias = p[1];
    weights.conv4_weight = p[2];
    weights.conv4_bias = p[3];
    weights.conv5_weight = p[4];
    weights.conv5_bias = p[5];
    weights.gamma = p[6];
    const T *conv4 = data<T>(params[CONV1]), *conv5 = data<T>(params[CONV2]);
    const NAFBlock<T> op{
        weights,
        images<const T>(x, channels_last),
        images<T>(y, channels_last),
        nullptr,
        x.size(2),
        x.size(3),
        static_cast<float>(eps),
        {nullptr, nullptr, nullptr, conv4, conv5},
        pairs};
    const int64_t channels = op.x.channels;
    if (x.size(0) * channels * op.x.pixels == 0) return;

    constexpr int64_t GRAIN = PANEL / 2;  // threads share the pixels of a small image to half a panel
    const int64_t each = (op.x.pixels + GRAIN - 1) / GRAIN;
    parallel(x.size(0) * each, [&](int64_t begin, int64_t end) {
      float* memory = scratch(naf_block_second_scratch(channels));
      while (begin < end) {
        const int64_t n = begin / each, stop = std::min(end, (n + 1) * each);
        kernels(tag).naf_block_second(
            op, n, nullptr, (begin - n * each) * GRAIN, std::min(op.x.pixels, (stop - n * each) * GRAIN), memory);
        begin = stop;
      }
    });
  });
}

}  // namespace r2r
