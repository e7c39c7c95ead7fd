"""Registers `upsample_add`: 1x1 convolution, PixelShuffle(2), and the skip added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import gradients, implementation
from r2r_kernels.operators.layout import dense, empty, is_channels_last, memory_format
from r2r_kernels.operators.registry import first_derivative_only, register


def _native_pays(x: Tensor) -> bool:
    """Whether the C++ kernel beats convolution, shuffle and addition; docs/kernels/cpu.md has the measurements."""
    return x.shape[1] <= 128 and (x.dtype == torch.float32 or not is_channels_last(x))


def forward(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    """x [N, 2C, h, w], weight [4C, 2C, 1, 1], skip [N, C, 2h, 2w] -> [N, C, 2h, 2w] in the memory format of x."""
    chosen = implementation.of(x)
    if chosen == "triton":
        return dense(implementation.triton_kernels("upsample_add").forward(x, weight.contiguous(), skip), x)
    if chosen == "native" and _native_pays(x):
        y = _forward_fake(x, weight, skip)
        implementation.NATIVE.upsample_add(dense(x, x), weight.contiguous(), dense(skip, x), is_channels_last(x), y)
        return y
    return dense(reference.upsample_add(x, weight, skip), x)


def _forward_fake(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    return torch.empty(skip.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; that of the skip is dy."""
    if not x.numel():  # PyTorch's pixel_unshuffle answers another shape
        return torch.zeros_like(x), torch.zeros_like(weight)
    if implementation.of(x) == "triton":
        dx, dweight, _ = implementation.triton_kernels("upsample_add").backward(dy, x, weight.contiguous())
    else:
        dx, dweight, _ = gradients.convolution(F.pixel_unshuffle(dense(dy, x), 2), dense(x, x), weight)
    return dense(dx, x), dweight.contiguous()


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape[1]), weight.new_empty(weight.shape)


class _UpsampleAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.upsample_add(x, weight, skip)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return (*torch.ops.r2r.upsample_add_backward(dy, *ctx.saved_tensors), dy)


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


def _backward_flops(dy: Any, x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The gradients of the convolution's input and of its weight."""
    return 2 * _flops(x, weight)


register(
    "upsample_add(Tensor x, Tensor weight, Tensor skip) -> Tensor",
    forward,
    _forward_fake,
    autograd=_UpsampleAdd.apply,
    autocast="convolution",
    flops=_flops,
)
register(
    "upsample_add_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
