#include "slot_conv.h"

#include "common/tensors.h"

namespace r2r {

namespace {

void slot_conv(Tensor x, Tensor weight, Tensor bias, Tensor y) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const SlotConv<T> op{
        .x = data<const T>(x),
        .y = data<T>(y),
        .weight = floats(weight),
        .bias = floats(bias),
        .slots = x.size(1),
        .channels = x.size(2),
        .height = x.size(3),
        .width = x.size(4),
        .kernel = weight.size(2)};
    parallel_over_images(x.size(0), op.channels, [&](int64_t task, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) kernels<SlotConvKernels<T>>().forward(op, task, c);
    });
  });
}

void slot_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor dx, Tensor dweight, Tensor dbias) {
  for_dtype(x, [&]<class T>() {
    Floats floats;
    const SlotConvBackward<T> op{
        .dy = data<const T>(dy),
        .x = data<const T>(x),
        .dx = data<T>(dx),
        .weight = floats(weight),
        .dweight = data<float>(dweight),
        .dbias = data<float>(dbias),
        .slots = x.size(1),
        .channels = x.size(2),
        .height = x.size(3),
        .width = x.size(4),
        .kernel = weight.size(2)};
    parallel_over_images(x.size(0), op.channels, [&](int64_t task, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) kernels<SlotConvKernels<T>>().backward(op, task, c);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r2r_native, m) {
  m.def("slot_conv(Tensor x, Tensor weight, Tensor bias, Tensor(a!) y) -> ()");
  m.def(
      "slot_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("slot_conv", TORCH_BOX(&slot_conv));
  m.impl("slot_conv_backward", TORCH_BOX(&slot_conv_backward));
}

}  // namespace r2r
