"""Registers `layer_norm_2d`: each pixel is normalised over its channels.

The operator also returns the statistics of the pixels, which its backward reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import implementation
from r2r_kernels.operators.layout import dense, empty, is_channels_last
from r2r_kernels.operators.registry import first_derivative_only, register

_Three = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Three:
    """x [N, C, H, W], weight and bias [C] -> y like x, mean and 1 / standard deviation [N, H, W], at least float32."""
    chosen = implementation.of(x)
    if chosen == "triton":
        kernels = implementation.triton_kernels("layer_norm_2d")
        y, mean, rstd = kernels.forward(x, weight.contiguous(), bias.contiguous(), eps)
        return dense(y, x), mean, rstd
    if chosen == "native":
        y, mean, rstd = _forward_fake(x, weight, bias, eps)
        implementation.NATIVE.layer_norm_2d(
            dense(x, x), weight.contiguous(), bias.contiguous(), eps, is_channels_last(x), y, mean, rstd
        )
        return y, mean, rstd
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(1)
    rstd = torch.rsqrt((wide - mean[:, None]).square().mean(1) + eps)
    y = reference.layer_norm_2d(x, weight, bias, eps)
    return dense(y, x), mean.contiguous(), rstd.contiguous()


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Three:
    return empty(x, x.shape[1]), _statistics(x), _statistics(x)


def _statistics(x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.new_empty((n, h, w), dtype=torch.promote_types(x.dtype, torch.float32))


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> _Three:
    """The gradients of x, weight and bias."""
    chosen = implementation.of(x)
    if chosen == "triton":
        kernels = implementation.triton_kernels("layer_norm_2d")
        dx, dweight, dbias = kernels.backward(dy, x, weight.contiguous(), mean, rstd)
        return dense(dx, x), dweight, dbias
    if chosen == "native":
        dx = empty(x, x.shape[1])
        dweight, dbias = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(weight, dtype=torch.float32)
        implementation.NATIVE.layer_norm_2d_backward(
            dense(dy, x), dense(x, x), weight.contiguous(), mean, rstd, is_channels_last(x), dx, dweight, dbias
        )
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
    dx, dweight, dbias = _plain_backward(dy, x, weight, mean, rstd)
    return dense(dx, x), dweight, dbias


def _plain_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> _Three:
    mean, rstd = mean[:, None], rstd[:, None]
    wide = dy.to(mean.dtype)
    normed = (x.to(mean.dtype) - mean) * rstd
    scaled = wide * weight[:, None, None]
    along = (scaled * normed).mean(1, keepdim=True)
    dx = (scaled - scaled.mean(1, keepdim=True) - normed * along) * rstd
    return dx.to(x.dtype), (wide * normed).sum((0, 2, 3)).to(weight.dtype), wide.sum((0, 2, 3)).to(weight.dtype)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> _Three:
    return empty(x, x.shape[1]), torch.empty_like(weight), torch.empty_like(weight)


class _LayerNorm2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Three:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = torch.ops.r2r.layer_norm_2d(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*torch.ops.r2r.layer_norm_2d_backward(dy, *ctx.saved_tensors), None)


register(
    "layer_norm_2d(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    forward,
    _forward_fake,
    autograd=_LayerNorm2d.apply,
    autocast="norm",
)
register(
    "layer_norm_2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
)
