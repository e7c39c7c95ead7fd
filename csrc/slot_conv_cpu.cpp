#include "operators.h"

namespace r2r {

void slot_conv(Tensor x, Tensor weight, Tensor bias, Tensor y) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Floats floats;
    const SlotConv<T> op{data<const T>(x), data<T>(y), floats(weight), floats(bias),  x.size(1),
                         x.size(2),        x.size(3),  x.size(4),      weight.size(2)};
    parallel(x.size(0) * op.channels, [&](int64_t begin, int64_t end) {
      float* memory = scratch(slot_conv_scratch(op.slots, op.kernel, op.height, op.width));
      for (int64_t i = begin; i < end; i++) kernels(tag).slot_conv(op, i / op.channels, i % op.channels, memory);
    });
  });
}

void slot_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor dx, Tensor dweight, Tensor dbias) {
  for_dtype(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Floats floats;
    const SlotConvBackward<T> op{data<const T>(dy),  data<const T>(x), data<T>(dx), floats(weight), data<float>(dweight),
                                 data<float>(dbias), x.size(1),        x.size(2),   x.size(3),      x.size(4),
                                 weight.size(2)};
    parallel(x.size(0) * op.channels, [&](int64_t begin, int64_t end) {
      float* memory = scratch(slot_conv_scratch(op.slots, op.kernel, op.height, op.width));
      for (int64_t i = begin; i < end; i++) {
        kernels(tag).slot_conv_backward(op, i / op.channels, i % op.channels, memory);
      }
    });
  });
}

}  // namespace r2r
