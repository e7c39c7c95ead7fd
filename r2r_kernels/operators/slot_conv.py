"""Registers `slot_conv`: depthwise (k, 3, 3) convolution along the slots, with weights of its own for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import implementation
from r2r_kernels.operators.registry import first_derivative_only, register

_Three = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T, S, C, h, w], weight [T, C, k, 3, 3], bias [T, C] -> [T, S - k + 1, C, h, w], contiguous."""
    chosen = implementation.of(x)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    if not x.numel():
        return _forward_fake(x, weight, bias)
    if chosen == "triton":
        return implementation.triton_kernels("slot_conv").forward(x, weight, bias)
    if chosen == "native":
        y = _forward_fake(x, weight, bias)
        implementation.NATIVE.slot_conv(x, weight, bias, y)
        return y
    return reference.slot_conv(x, weight, bias).contiguous()


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] - weight.shape[2] + 1, *x.shape[2:]))


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> _Three:
    """The gradients of x, weight and bias."""
    chosen = implementation.of(x)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[:2])
    if chosen == "triton":
        return implementation.triton_kernels("slot_conv").backward(dy, x, weight)
    if chosen == "native":
        dx, dweight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
        dbias = weight.new_empty(weight.shape[:2], dtype=torch.float32)
        implementation.NATIVE.slot_conv_backward(dy, x, weight, dx, dweight, dbias)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
    dx, dweight, dbias = _plain_backward(dy, x, weight)
    return dx.contiguous(), dweight.contiguous(), dbias.contiguous()


def _plain_backward(dy: Tensor, x: Tensor, weight: Tensor) -> _Three:
    groups = weight.shape[0] * weight.shape[1]
    flat_dy, flat_x = (t.transpose(1, 2).reshape(1, groups, t.shape[1], *t.shape[3:]) for t in (dy, x))
    ones, pads = [1, 1, 1], [0, 1, 1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        flat_dy, flat_x, weight.flatten(0, 1)[:, None], [groups], ones, pads, ones, False, [0, 0, 0], groups, [True] * 3
    )
    dx = dx.view(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]).transpose(1, 2)
    return dx, dweight.view(weight.shape), dbias.view(weight.shape[:2])


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor) -> _Three:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


class _SlotConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.slot_conv(x, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.r2r.slot_conv_backward(dy, *ctx.saved_tensors)


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    _t, slots, _c, h, w = x
    return 2 * (slots - weight[2] + 1) * h * w * math.prod(weight)


def _backward_flops(dy: Any, x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The gradients of the input and of the weight."""
    return 2 * _flops(x, weight)


register(
    "slot_conv(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    forward,
    _forward_fake,
    autograd=_SlotConv.apply,
    autocast="convolution",
    flops=_flops,
)
register(
    "slot_conv_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
