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

// The prior may have another size than x: it is area-resized. Backward wants it at the size of x.
void gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor y);
void gated_conv_backward(
    Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias, bool channels_last, Tensor dx, Tensor dprior,
    Tensor dweight, Tensor dbias);
// taking bool [N, T]: which tasks take part, if told, else written; mode: 0 hard, 1 multi, 2 soft; weights [N, T, S].
void bank_retrieve(
    Tensor query, Tensor keys, Tensor values, Tensor counts, double scale, bool told, int64_t mode, Tensor taking,
    Tensor readout, Tensor scores, Tensor weights);
void slot_conv(Tensor x, Tensor weight, Tensor bias, Tensor y);
void slot_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor dx, Tensor dweight, Tensor dbias);

}  // namespace r2r
