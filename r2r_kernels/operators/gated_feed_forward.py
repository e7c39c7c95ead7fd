"""Registers `gated_feed_forward`, the feed-forward branch of a NAF block with its residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import gradients, implementation, layer_norm_2d, simple_gate
from r2r_kernels.operators.layout import dense, empty, is_channels_last
from r2r_kernels.operators.registry import first_derivative_only, register
from r2r_kernels.reference import GatedFeedForwardParams


def forward(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    """x [N, C, H, W] -> like x; params in the order of GatedFeedForwardParams."""
    chosen = implementation.of(x)
    contiguous = [p.contiguous() for p in params]
    if chosen == "triton":
        kernels = implementation.triton_kernels("gated_feed_forward")
        return dense(kernels.forward(x, GatedFeedForwardParams(*contiguous), eps), x)
    if chosen == "native":
        y = empty(x, x.shape[1])
        implementation.NATIVE.gated_feed_forward(dense(x, x), contiguous, eps, is_channels_last(x), y)
        return y
    return dense(reference.gated_feed_forward(x, GatedFeedForwardParams(*params), eps), x)


def _forward_fake(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    return empty(x, x.shape[1])


def backward(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The gradients of x and of the seven parameters."""
    if implementation.of(x) == "native":
        dx, found = empty(x, x.shape[1]), [torch.empty(p.shape, dtype=torch.float32) for p in params]
        images, parameters = (dense(dy, x), dense(x, x)), [p.contiguous() for p in params]
        implementation.NATIVE.gated_feed_forward_backward(*images, parameters, eps, is_channels_last(x), dx, found)
        return [dx, *(g.to(x.dtype) for g in found)]
    dx, *found = plain_backward(dense(dy, x), dense(x, x), params, eps)
    return [dense(dx, x), *(g.contiguous() for g in found)]


def plain_backward(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    """`backward`, put together from layer_norm_2d, simple_gate and PyTorch's convolutions."""
    p = GatedFeedForwardParams(*params)
    normed, mean, rstd = layer_norm_2d.forward(x, p.norm_weight, p.norm_bias, eps)
    hidden = F.conv2d(normed, p.conv1_weight, p.conv1_bias)
    dgated, dconv2_weight, dconv2_bias, dgamma = gradients.scaled_convolution(
        dy, simple_gate.forward(hidden), p.conv2_weight, p.conv2_bias, p.gamma
    )
    dhidden = simple_gate.backward(dgated, hidden)
    dnormed, dconv1_weight, dconv1_bias = gradients.convolution(dhidden, normed, p.conv1_weight)
    dresidual, dnorm_weight, dnorm_bias = layer_norm_2d.backward(dnormed, x, p.norm_weight, mean, rstd)
    parameters = (dnorm_weight, dnorm_bias, dconv1_weight, dconv1_bias, dconv2_weight, dconv2_bias, dgamma)
    return [dy + dresidual, *parameters]


def _backward_fake(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [empty(x, x.shape[1]), *(p.new_empty(p.shape) for p in params)]


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, *params)
        ctx.eps = eps
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.gated_feed_forward(x, params, eps)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        dx, *found = torch.ops.r2r.gated_feed_forward_backward(dy, x, params, ctx.eps)
        return (dx, None, *found)


def _flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * h * w * 3 * c * c


def _backward_flops(dy: Any, x: Sequence[int], *_: Any, **__: Any) -> int:
    """The hidden channels again, and of both convolutions the gradients of input and weight."""
    return 2 * x[0] * x[2] * x[3] * 8 * x[1] * x[1]


register(
    "gated_feed_forward(Tensor x, Tensor[] params, float eps) -> Tensor",
    forward,
    _forward_fake,
    autograd=lambda x, params, eps: _GatedFeedForward.apply(x, eps, *params),
    autocast="convolution",
    flops=_flops,
)
register(
    "gated_feed_forward_backward(Tensor dy, Tensor x, Tensor[] params, float eps) -> Tensor[]",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
