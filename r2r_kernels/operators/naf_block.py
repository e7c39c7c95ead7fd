"""Registers `naf_block`, a whole NAF block, and what belongs to it.

`local_naf_block` pools its attention over windows, `naf_block_folded` takes the folded parameters of a frozen model,
`naf_block_training` returns what `naf_block_backward` reads beside the block's input (`kept`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import gated_feed_forward, gradients, implementation, layer_norm_2d, simple_gate
from r2r_kernels.operators.layout import dense, empty, is_channels_last
from r2r_kernels.operators.registry import first_derivative_only, register
from r2r_kernels.reference import NAFBlockParams


def forward(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    """x [N, C, H, W] -> like x; params in the order of NAFBlockParams, of any float dtype."""
    chosen = implementation.of(x)
    if chosen == "triton":
        contiguous = NAFBlockParams(*(p.contiguous() for p in params))
        return dense(implementation.triton_kernels("naf_block").forward(x, contiguous, eps), x)
    params = _in_dtype_of(x, params)
    if chosen == "native":
        y, parameters = empty(x, x.shape[1]), [p.contiguous() for p in params]
        implementation.NATIVE.naf_block(dense(x, x), parameters, eps, is_channels_last(x), y)
        return y
    return dense(reference.naf_block(x, NAFBlockParams(*params), eps), x)


def _in_dtype_of(x: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters in the dtype of x: under autocast on a GPU they come in their own."""
    return [p if p.dtype == x.dtype else p.to(x.dtype) for p in params]  # `to` takes a microsecond or two to do nothing


def _forward_fake(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    return empty(x, x.shape[1])


# A block whose attention pools over windows is fused in C++. Elsewhere, and for gradients, other operators make it.


def _local_forward(x: Tensor, params: Sequence[Tensor], eps: float, window: Sequence[int]) -> Tensor:
    if window[0] >= x.shape[2] and window[1] >= x.shape[3]:
        return forward(x, params, eps)
    chosen = implementation.of(x)
    if chosen == "native":
        y, contiguous = empty(x, x.shape[1]), [p.contiguous() for p in params]
        implementation.NATIVE.local_naf_block(dense(x, x), contiguous, eps, *window, is_channels_last(x), y)
        return y
    if chosen == "triton":
        return dense(_by_operators(x, params, eps, window), x)
    return dense(reference.naf_block(x, NAFBlockParams(*params), eps, window), x)


def _local_forward_fake(x: Tensor, params: Sequence[Tensor], eps: float, window: Sequence[int]) -> Tensor:
    return empty(x, x.shape[1])


def _by_operators(x: Tensor, params: Sequence[Tensor], eps: float, window: Sequence[int]) -> Tensor:
    """The block through the registered operators, so that each brings its gradient."""
    p, ops = NAFBlockParams(*params), torch.ops.r2r
    hidden = F.conv2d(ops.layer_norm_2d(x, p.norm1_weight, p.norm1_bias, eps)[0], p.conv1_weight, p.conv1_bias)
    gated = ops.depthwise_gate(hidden, p.conv2_weight, p.conv2_bias)[0]
    attended = gated * F.conv2d(ops.local_mean_2d(gated, window), p.sca_weight, p.sca_bias)
    y = torch.addcmul(x, F.conv2d(attended, p.conv3_weight, p.conv3_bias), p.beta)
    hidden = F.conv2d(ops.layer_norm_2d(y, p.norm2_weight, p.norm2_bias, eps)[0], p.conv4_weight, p.conv4_bias)
    return torch.addcmul(y, F.conv2d(ops.simple_gate(hidden), p.conv5_weight, p.conv5_bias), p.gamma)


# A frozen model on a GPU folds its parameters beforehand, which saves a launch a call.


@torch.no_grad()
def fold(params: NAFBlockParams, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What `naf_block_folded` takes, in its order, for activations of that dtype on the parameters' device; None where
    the implementation there reads parameters as they are."""
    if implementation.of(params.norm1_weight.to(dtype)) != "triton":
        return None
    folded = implementation.triton_kernels("naf_block").fold(params, dtype)._asdict()
    return {**folded, "sca": folded["sca"].to(dtype)}


def _folded_forward(x: Tensor, folded: Sequence[Tensor], eps: float) -> Tensor:
    if implementation.of(x) == "triton":
        kernels = implementation.triton_kernels("naf_block")
        return dense(kernels.forward(x, kernels.FoldedParams(*folded), eps), x)
    if x.numel():
        raise RuntimeError(f"folded parameters are for Triton's kernels, x is on {x.device}; freeze the model there")
    return torch.empty_like(x)


# What is kept beside x for the backward. Triton's reads the mean of the gated features [N, C]. The one in C++ makes the
# block again: where channels are few, memory takes longer than products. Where they are many, the products that make
# it are almost a third of the backward's, and what they made is kept, [5, N, C, H, W], as long as it is small. From
# 128 channels on a block gains from this, but a step of `base` does not until 512: fetching the memory takes as long.
_MANY_CHANNELS = 512
_MOST_KEPT = 2**23  # floats


def _kept(x: Tensor) -> Tensor:
    chosen = implementation.of(x)
    if chosen == "triton":
        return x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float32)
    small = x.dtype == torch.float32 and x.shape[1] >= _MANY_CHANNELS and 5 * x.numel() <= _MOST_KEPT
    return x.new_empty((5 if chosen == "native" and small else 0, *x.shape), dtype=torch.float32)


def _training_forward(x: Tensor, params: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    if implementation.of(x) == "triton":
        contiguous = NAFBlockParams(*(p.contiguous() for p in params))
        y, mean = implementation.triton_kernels("naf_block").forward_training(x, contiguous, eps)
        return dense(y, x), mean
    kept = _kept(x)
    if not kept.numel():
        return forward(x, params, eps), kept
    y, parameters = empty(x, x.shape[1]), [p.contiguous() for p in _in_dtype_of(x, params)]
    implementation.NATIVE.naf_block_training(dense(x, x), parameters, eps, is_channels_last(x), y, kept)
    return y, kept


def _training_forward_fake(x: Tensor, params: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape[1]), _kept(x)


def backward(dy: Tensor, x: Tensor, kept: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The gradients of x and of the 18 parameters; `kept` is the second result of `naf_block_training`."""
    chosen = implementation.of(x)
    if chosen == "triton":
        contiguous = NAFBlockParams(*(p.contiguous() for p in params))
        dx, found = implementation.triton_kernels("naf_block").backward(dy, x, kept, contiguous, eps)
        return [dense(dx, x), *found]
    dtypes, params = [p.dtype for p in params], _in_dtype_of(x, params)
    if chosen == "native":
        dx, found = empty(x, x.shape[1]), [torch.empty(p.shape, dtype=torch.float32) for p in params]
        images, parameters = (dense(dy, x), dense(x, x)), [p.contiguous() for p in params]
        implementation.NATIVE.naf_block_backward(*images, kept, parameters, eps, is_channels_last(x), dx, found)
        return [dx, *(g.to(dtype) for g, dtype in zip(found, dtypes, strict=True))]
    dx, *found = _plain_backward(dense(dy, x), dense(x, x), params, eps)
    return [dense(dx, x), *(g.to(dtype).contiguous() for g, dtype in zip(found, dtypes, strict=True))]


def _plain_backward(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    p = NAFBlockParams(*params)
    normed, mean, rstd = layer_norm_2d.forward(x, p.norm1_weight, p.norm1_bias, eps)
    hidden = F.conv2d(normed, p.conv1_weight, p.conv1_bias)
    convolved = F.conv2d(hidden, p.conv2_weight, p.conv2_bias, padding=1, groups=hidden.shape[1])
    gated = simple_gate.forward(convolved)
    pooled = gated.mean((2, 3), keepdim=True)
    attention = F.conv2d(pooled, p.sca_weight, p.sca_bias)
    attended = gated * attention
    y = x + F.conv2d(attended, p.conv3_weight, p.conv3_bias) * p.beta
    dy, *of_feed_forward = gated_feed_forward.plain_backward(dy, y, p[11:], eps)

    dattended, dconv3_weight, dconv3_bias, dbeta = gradients.scaled_convolution(
        dy, attended, p.conv3_weight, p.conv3_bias, p.beta
    )
    dattention = (dattended * gated).sum((2, 3), keepdim=True)
    dpooled, dsca_weight, dsca_bias = gradients.convolution(dattention, pooled, p.sca_weight)
    dgated = torch.addcmul(dpooled / max(1, x.shape[2] * x.shape[3]), dattended, attention)
    dconvolved = simple_gate.backward(dgated, convolved)
    dhidden, dconv2_weight, dconv2_bias = gradients.convolution(dconvolved, hidden, p.conv2_weight, 1, hidden.shape[1])
    dnormed, dconv1_weight, dconv1_bias = gradients.convolution(dhidden, normed, p.conv1_weight)
    dx, dnorm1_weight, dnorm1_bias = layer_norm_2d.backward(dnormed, x, p.norm1_weight, mean, rstd)
    return [
        dy + dx,
        *(dnorm1_weight, dnorm1_bias, dconv1_weight, dconv1_bias, dconv2_weight, dconv2_bias),
        *(dsca_weight, dsca_bias, dconv3_weight, dconv3_bias, dbeta),
        *of_feed_forward,
    ]


def _backward_fake(dy: Tensor, x: Tensor, kept: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [empty(x, x.shape[1]), *(p.new_empty(p.shape) for p in params)]


class _NAFBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *params: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, kept = torch.ops.r2r.naf_block_training(x, params, eps)
        ctx.save_for_backward(x, kept, *params)
        ctx.eps = eps
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *params = ctx.saved_tensors
        dx, *found = torch.ops.r2r.naf_block_backward(dy, x, kept, params, ctx.eps)
        return (dx, None, *found)


def _flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * c * (h * w * (6 * c + 18) + c)


def _local_flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * c * h * w * (7 * c + 18)


def _backward_flops(dy: Any, x: Sequence[int], kept: Sequence[int], *_: Any, **__: Any) -> int:
    products = 6 if len(kept) == 5 and kept[0] else 1  # that are not computed again; conv5 never is
    return 3 * _flops(x) - 2 * x[0] * x[1] * x[1] * x[2] * x[3] * products


register(
    "naf_block(Tensor x, Tensor[] params, float eps) -> Tensor",
    forward,
    _forward_fake,
    autograd=lambda x, params, eps: _NAFBlock.apply(x, eps, *params),
    autocast="mixed",
    flops=_flops,
)
register(
    "local_naf_block(Tensor x, Tensor[] params, float eps, int[] window) -> Tensor",
    _local_forward,
    _local_forward_fake,
    autograd=_by_operators,
    autocast="convolution",
    flops=_local_flops,
)
register(
    "naf_block_folded(Tensor x, Tensor[] folded, float eps) -> Tensor", _folded_forward, _forward_fake, flops=_flops
)
register(
    "naf_block_training(Tensor x, Tensor[] params, float eps) -> (Tensor, Tensor)",
    _training_forward,
    _training_forward_fake,
    flops=_flops,
)
register(
    "naf_block_backward(Tensor dy, Tensor x, Tensor kept, Tensor[] params, float eps) -> Tensor[]",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
