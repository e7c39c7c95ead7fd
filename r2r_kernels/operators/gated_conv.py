"""Registers `gated_conv`: x and a prior are blended through a gate that a convolution computes from both."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels import extension, reference
from r2r_kernels.operators import gradients, implementation
from r2r_kernels.operators.layout import dense, empty, is_channels_last, memory_format
from r2r_kernels.operators.registry import first_derivative_only, register

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _is_native(x: Tensor) -> bool:
    """Whether the C++ or the CUDA kernel runs on x; there is none in Triton."""
    forced = os.environ.get("R2R_KERNELS")
    on_gpu = x.device.type == "cuda" and forced != "reference" and x.numel() and x.dtype in implementation.GPU_DTYPES
    if on_gpu and torch.version.hip is None and extension.runs_on(torch.cuda.get_device_capability(x.device)):
        return True
    return forced != "triton" and implementation.of(x) == "native"


def forward(x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, C, H, W], prior [N, C, h, w], weight [C, 2, k, k], bias [C] -> [N, C, H, W]."""
    if _is_native(x):
        y = empty(x, x.shape[1])
        implementation.NATIVE.gated_conv(
            dense(x, x), dense(prior, x), weight.contiguous(), bias.contiguous(), is_channels_last(x), y
        )
        return y
    return dense(reference.gated_conv(x, prior, weight, bias), x)


def _forward_fake(x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return empty(x, x.shape[1])


def backward(dy: Tensor, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> _Four:
    """The gradients of x, prior, weight and bias."""
    resized = prior
    if prior.shape[2:] != x.shape[2:]:
        down, across = (reference.averaging(prior.shape[dim], x.shape[dim], prior) for dim in (2, 3))
        resized = gradients.average(prior, down, across)
    if _is_native(x):
        weight, bias = weight.contiguous(), bias.contiguous()
        dx, dprior = empty(x, x.shape[1]), empty(x, x.shape[1])
        dweight, dbias = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(bias, dtype=torch.float32)
        images, layout = (dense(dy, x), dense(x, x), dense(resized, x)), is_channels_last(x)
        implementation.NATIVE.gated_conv_backward(*images, weight, bias, layout, dx, dprior, dweight, dbias)
    else:
        dx, dprior, dweight, dbias = _plain_backward(dy, x, resized, weight, bias)
    if resized is not prior:
        dprior = gradients.average(dprior, down.T, across.T)
    return dense(dx, x), dense(dprior, x), dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype)


def _plain_backward(dy: Tensor, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> _Four:
    """`backward` for a prior of the size of x."""
    padding, groups = weight.shape[-1] // 2, x.shape[1]
    both = torch.stack((x, prior), dim=2).flatten(1, 2)
    logits = F.conv2d(both, weight, bias, padding=padding, groups=groups)
    gate = logits.to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
    dlogits = (dy * (prior - x) * gate * (1 - gate)).to(x.dtype)
    dboth, dweight, dbias = gradients.convolution(dlogits, both, weight, padding, groups)
    dx, dprior = dy * (1 - gate) + dboth[:, 0::2], dy * gate + dboth[:, 1::2]
    return dx.to(x.dtype), dprior.to(x.dtype), dweight, dbias


def _backward_fake(dy: Tensor, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> _Four:
    dprior = torch.empty(prior.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return empty(x, x.shape[1]), dprior, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


class _GatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, prior, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.gated_conv(x, prior, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.r2r.gated_conv_backward(dy, *ctx.saved_tensors)


def _flops(x: Sequence[int], prior: Any, weight: Sequence[int], *_: Any, **__: Any) -> int:
    n, _c, h, w = x
    return 2 * n * h * w * math.prod(weight)


def _backward_flops(dy: Any, x: Sequence[int], prior: Any, weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The convolution again, and the gradients of its input and of its weight."""
    return 3 * _flops(x, prior, weight)


register(
    "gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias) -> Tensor",
    forward,
    _forward_fake,
    autograd=_GatedConv.apply,
    autocast="convolution",
    flops=_flops,
)
register(
    "gated_conv_backward(Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
