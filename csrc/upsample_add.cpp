#include "upsample_add.h"

#include <algorithm>

#include "common/tensors.h"

namespace r2r {

namespace {

void upsample_add(Tensor x, Tensor weight, Tensor skip, bool channels_last, Tensor y) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    UpsampleAdd<T> op{
        .x = images<const T>(x, channels_last),
        .skip = data<const T>(skip),
        .y = data<T>(y),
        .weight = floats(weight),
        .channels = skip.size(1),
        .width = x.size(3)};
    if (x.numel() == 0) return;
    const int64_t depth = x.size(1), blocks = 2 * panels(depth);
    std::unique_ptr<float[]> packed;
    if (channels_last) {
      packed.reset(new float[blocks * depth * PANEL]);
      parallel(blocks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          kernels<UpsampleAddKernels<T>>().pack(op.weight, op.channels, i, packed.get() + i * depth * PANEL);
        }
      });
      op.weight = packed.get();
    }
    // A task takes a few panels: enough that the weights are not read too often, few enough for the cache.
    constexpr int64_t MOST = 4;
    const int64_t each = panels(op.x.pixels), groups = (each + MOST - 1) / MOST;
    parallel_over_images(x.size(0), groups, [&](int64_t n, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = each * i / groups * PANEL, last = std::min(op.x.pixels, each * (i + 1) / groups * PANEL);
        kernels<UpsampleAddKernels<T>>().forward(op, n, first, last - first);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("upsample_add(Tensor x, Tensor weight, Tensor skip, bool channels_last, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("upsample_add", TORCH_BOX(&upsample_add));
}

}  // namespace r2r
