#include "operators.h"

namespace r2r {

void upsample_add(Tensor x, Tensor weight, Tensor skip, bool channels_last, Tensor y) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Floats floats;
    UpsampleAdd<T> op{
        images<const T>(x, channels_last), data<const T>(skip), data<T>(y), floats(weight), skip.size(1), x.size(3)};
    if (x.numel() == 0) return;
    const int64_t depth = x.size(1), blocks = 2 * panels(depth);
    std::unique_ptr<float[]> packed;
    if (channels_last) {
      packed.reset(new float[blocks * depth * PANEL]);
      parallel(blocks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          kernels(tag).upsample_add_pack(op.weight, op.channels, i, packed.get() + i * depth * PANEL);
        }
      });
      op.weight = packed.get();
    }
    // Pieces of an image: large enough that the weights are not read too often, and small enough for the cache.
    const int64_t each = panels(op.x.pixels), pieces = (each + UPSAMPLE_PANELS - 1) / UPSAMPLE_PANELS;
    parallel(x.size(0) * pieces, [&](int64_t begin, int64_t end) {
      float* memory = scratch(UPSAMPLE_PANELS * PANEL * depth);
      for (int64_t i = begin; i < end; i++) {
        const int64_t piece = i % pieces, first = each * piece / pieces * PANEL;
        const int64_t last = std::min(op.x.pixels, each * (piece + 1) / pieces * PANEL);
        kernels(tag).upsample_add(op, i / pieces, first, last - first, memory);
      }
    });
  });
}

}  // namespace r2r
