// The CPU operators. Activations are contiguous, in NCHW or (channels_last) NHWC, float32 or bfloat16; parameters are
// contiguous, of the same dtype; statistics and their gradients are float32. Results are written to the last arguments.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace r2r {

void layer_norm_2d(Tensor x, Tensor weight, Tensor bias, double eps, bool channels_last, Tensor y, Tensor mean, Tensor rstd);
void layer_norm_2d_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias);
void simple_gate(Tensor x, bool channels_last, Tensor y);
void simple_gate_backward(Tensor dy, Tensor x, bool channels_last, Tensor dx);
void depthwise_gate(Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor gated, Tensor mean);
void depthwise_gate_backward(
    Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias, bool channels_last, Tensor dx, Tensor dweight,
    Tensor dbias);
// The same on raw memory; dx is written, dweight [2 C, 9] and dbias [2 C] too.
template <class T>
void depthwise_gate_gradients(const DepthwiseGateBackward<T>& op, int64_t images, float* dweight, float* dbias);
// gated [N, C, H, W] of the dtype of x is memory to work in.
void naf_block(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor gated, Tensor y);
// work [G, 6 C, H, W] of the dtype of x is memory to work in, for G images at a time; dparams are float32.
void naf_block_backward(
    Tensor dz, Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor work, Tensor dx,
    std::vector<Tensor> dparams);

// The second half of a NAF block, of seven parameters; dparams are float32.
void gated_feed_forward(Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor y);
void gated_feed_forward_backward(
    Tensor dz, Tensor x, std::vector<Tensor> params, double eps, bool channels_last, Tensor dx, std::vector<Tensor> dparams);

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

// A block whose attention pools over windows; gated and pooled [N, C, H, W] of the dtype of x are memory to work in.
void local_naf_block(
    Tensor x, std::vector<Tensor> params, double eps, int64_t window_height, int64_t window_width, bool channels_last,
    Tensor gated, Tensor pooled, Tensor y);
void local_mean_2d(Tensor x, int64_t window_height, int64_t window_width, bool backward, bool channels_last, Tensor y);
// x [N, 2C, h, w], weight [4C, 2C, 1, 1]; skip and y [N, C, 2h, 2w] in the format of x; channels_last: float32 only.
void upsample_add(Tensor x, Tensor weight, Tensor skip, bool channels_last, Tensor y);

}  // namespace r2r
