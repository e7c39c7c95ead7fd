// The module r2r_kernels._C: the operators of the namespace r2r_native, and what the build was made with.
#include <pybind11/pybind11.h>

#include "operators.h"
#include "unchanged.h"

STABLE_TORCH_LIBRARY(r2r_native, m) {
  m.def(
      "layer_norm_2d(Tensor x, Tensor weight, Tensor bias, float eps, bool channels_last, Tensor(a!) y, Tensor(b!) mean, "
      "Tensor(c!) rstd) -> ()");
  m.def(
      "layer_norm_2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool channels_last, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
  m.def("simple_gate(Tensor x, bool channels_last, Tensor(a!) y) -> ()");
  m.def("simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor(a!) dx) -> ()");
  m.def("depthwise_gate(Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor(a!) gated, Tensor(b!) mean) -> ()");
  m.def(
      "depthwise_gate_backward(Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias, bool channels_last, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
  m.def("naf_block(Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) gated, Tensor(b!) y) -> ()");
  m.def(
      "naf_block_backward(Tensor dz, Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) work, "
      "Tensor(b!) dx, Tensor(c!)[] dparams) -> ()");
  m.def("gated_feed_forward(Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) y) -> ()");
  m.def(
      "gated_feed_forward_backward(Tensor dz, Tensor x, Tensor[] params, float eps, bool channels_last, Tensor(a!) dx, "
      "Tensor(b!)[] dparams) -> ()");
  m.def("gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor(a!) y) -> ()");
  m.def(
      "gated_conv_backward(Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, "
      "Tensor(a!) dx, Tensor(b!) dprior, Tensor(c!) dweight, Tensor(d!) dbias) -> ()");
  m.def(
      "bank_retrieve(Tensor query, Tensor keys, Tensor values, Tensor counts, float scale, bool told, int mode, "
      "Tensor(a!) taking, Tensor(b!) readout, Tensor(c!) scores, Tensor(d!) weights) -> ()");
  m.def("slot_conv(Tensor x, Tensor weight, Tensor bias, Tensor(a!) y) -> ()");
  m.def(
      "slot_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) "
      "-> ()");
  m.def(
      "local_mean_2d(Tensor x, int window_height, int window_width, bool backward, bool channels_last, Tensor(a!) y) "
      "-> ()");
  m.def(
      "local_naf_block(Tensor x, Tensor[] params, float eps, int window_height, int window_width, bool channels_last, "
      "Tensor(a!) gated, Tensor(b!) pooled, Tensor(c!) y) -> ()");
  m.def("upsample_add(Tensor x, Tensor weight, Tensor skip, bool channels_last, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r2r_native, CPU, m) {
  m.impl("layer_norm_2d", TORCH_BOX(&r2r::layer_norm_2d));
  m.impl("layer_norm_2d_backward", TORCH_BOX(&r2r::layer_norm_2d_backward));
  m.impl("simple_gate", TORCH_BOX(&r2r::simple_gate));
  m.impl("simple_gate_backward", TORCH_BOX(&r2r::simple_gate_backward));
  m.impl("depthwise_gate", TORCH_BOX(&r2r::depthwise_gate));
  m.impl("depthwise_gate_backward", TORCH_BOX(&r2r::depthwise_gate_backward));
  m.impl("naf_block", TORCH_BOX(&r2r::naf_block));
  m.impl("naf_block_backward", TORCH_BOX(&r2r::naf_block_backward));
  m.impl("gated_feed_forward", TORCH_BOX(&r2r::gated_feed_forward));
  m.impl("gated_feed_forward_backward", TORCH_BOX(&r2r::gated_feed_forward_backward));
  m.impl("gated_conv", TORCH_BOX(&r2r::gated_conv));
  m.impl("gated_conv_backward", TORCH_BOX(&r2r::gated_conv_backward));
  m.impl("bank_retrieve", TORCH_BOX(&r2r::bank_retrieve));
  m.impl("slot_conv", TORCH_BOX(&r2r::slot_conv));
  m.impl("slot_conv_backward", TORCH_BOX(&r2r::slot_conv_backward));
  m.impl("local_mean_2d", TORCH_BOX(&r2r::local_mean_2d));
  m.impl("local_naf_block", TORCH_BOX(&r2r::local_naf_block));
  m.impl("upsample_add", TORCH_BOX(&r2r::upsample_add));
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of r2r_kernels; importing this registers them with PyTorch.";
  module.attr("compiler") = R2R_COMPILER;
  module.attr("flags") = R2R_FLAGS;
  module.attr("torch") = R2R_TORCH;
  module.attr("cuda_architectures") = R2R_CUDA_ARCHITECTURES;
  if (!r2r::add_unchanged(module.ptr())) throw pybind11::error_already_set();
  module.attr("instruction_set") = r2r::kernels(static_cast<const float*>(nullptr)).name;
}
