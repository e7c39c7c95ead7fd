// The CPU operators. Activations are contiguous, in NCHW or (channels_last) NHWC, float32 or bfloat16; parameters are
// contiguous, of the same dtype; statistics and their gradients are float32. Results are written to the last arguments.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace r2r {

void layer_norm_2d(
    Tensor x, Tensor weight, Tensor bias, double eps, bool channels_last, Tensor y, Tensor mean, Tensor rstd);
void layer_norm_2d_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias);
void simple_gate(Tensor x, bool channels_last, Tensor y);
void simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor dx);
void depthwise_gate(Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor gated, Tensor mean);
// gated [N, C, H, W] of the dtype of x is memory to work in.
void naf_block(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor gated, Tensor y);

}  // namespace r2r
