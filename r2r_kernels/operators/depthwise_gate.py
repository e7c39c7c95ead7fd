"""Registers `depthwise_gate`: 3x3 depthwise convolution, SimpleGate, and the spatial mean of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import gradients, implementation, simple_gate
from r2r_kernels.operators.layout import dense, empty, is_channels_last
from r2r_kernels.operators.registry import first_derivative_only, register

_Three = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, 2C, H, W], weight [2C, 1, 3, 3], bias [2C] -> gated [N, C, H, W], mean [N, C, 1, 1]."""
    chosen = implementation.of(x)
    if chosen == "triton":
        kernels = implementation.triton_kernels("depthwise_gate")
        gated, mean = kernels.forward(x, weight.contiguous(), bias.contiguous())
        return dense(gated, x), mean
    if chosen == "native":
        gated = empty(x, x.shape[1] // 2)
        mean = x.new_empty((*gated.shape[:2], 1, 1), dtype=torch.float32)
        implementation.NATIVE.depthwise_gate(
            dense(x, x), weight.contiguous(), bias.contiguous(), is_channels_last(x), gated, mean
        )
        return gated, mean.to(x.dtype)
    gated, mean = reference.depthwise_gate(x, weight, bias)
    return dense(gated, x), mean.contiguous()


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    gated = empty(x, x.shape[1] // 2)
    return gated, x.new_empty((*gated.shape[:2], 1, 1))


def backward(dgated: Tensor, dmean: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> _Three:
    """The gradients of x, weight and bias."""
    chosen = implementation.of(x)
    if chosen == "triton":
        kernels = implementation.triton_kernels("depthwise_gate")
        dx, dweight, dbias = kernels.backward(dgated, dmean, x, weight.contiguous(), bias.contiguous())
    elif chosen == "native":
        dx = empty(x, x.shape[1])
        dweight, dbias = (torch.empty(p.shape, dtype=torch.float32) for p in (weight, bias))
        images = (dense(dgated, x), dmean.contiguous(), dense(x, x))
        parameters = (weight.contiguous(), bias.contiguous())
        implementation.NATIVE.depthwise_gate_backward(*images, *parameters, is_channels_last(x), dx, dweight, dbias)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)
    else:
        dx, dweight, dbias = _plain_backward(dense(dgated, x), dmean, dense(x, x), weight, bias)
    return dense(dx, x), dweight.contiguous(), dbias


def _plain_backward(dgated: Tensor, dmean: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> _Three:
    hidden = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    dgated = dgated + dmean / max(1, dgated.shape[2] * dgated.shape[3])
    dhidden = simple_gate.backward(dgated, hidden)
    return gradients.convolution(dhidden, x, weight, padding=1, groups=x.shape[1])


def _backward_fake(dgated: Tensor, dmean: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> _Three:
    return empty(x, x.shape[1]), weight.new_empty(weight.shape), torch.empty_like(bias)


class _DepthwiseGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.depthwise_gate(x, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dgated: Tensor, dmean: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.r2r.depthwise_gate_backward(dgated, dmean, *ctx.saved_tensors)


def _flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * c * h * w * 9


def _backward_flops(dgated: Any, dmean: Any, x: Sequence[int], *_: Any, **__: Any) -> int:
    """The convolution again, and the gradients of its input and of its weight."""
    return 3 * _flops(x)


register(
    "depthwise_gate(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    forward,
    _forward_fake,
    autograd=_DepthwiseGate.apply,
    autocast="convolution",
    flops=_flops,
)
register(
    "depthwise_gate_backward(Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
