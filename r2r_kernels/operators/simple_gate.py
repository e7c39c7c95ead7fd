"""Registers `simple_gate`: the first half of the channels times the second half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import implementation
from r2r_kernels.operators.layout import dense, empty, is_channels_last
from r2r_kernels.operators.registry import first_derivative_only, register


def forward(x: Tensor) -> Tensor:
    """x [N, 2C, H, W] -> [N, C, H, W]."""
    chosen = implementation.of(x)
    if chosen == "triton":
        return dense(implementation.triton_kernels("simple_gate").forward(x), x)
    if chosen == "native":
        y = _forward_fake(x)
        implementation.NATIVE.simple_gate(dense(x, x), is_channels_last(x), y)
        return y
    return dense(reference.simple_gate(x), x)


def _forward_fake(x: Tensor) -> Tensor:
    return empty(x, x.shape[1] // 2)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    chosen = implementation.of(x)
    if chosen == "triton":
        return dense(implementation.triton_kernels("simple_gate").backward(dy, x), x)
    if chosen == "native":
        dx = _backward_fake(dy, x)
        implementation.NATIVE.simple_gate_backward(dense(dy, x), dense(x, x), is_channels_last(x), dx)
        return dx
    first, second = x.chunk(2, dim=1)
    return dense(torch.cat((dy * second, dy * first), dim=1), x)


def _backward_fake(dy: Tensor, x: Tensor) -> Tensor:
    return empty(x, x.shape[1])


class _SimpleGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.simple_gate(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.ops.r2r.simple_gate_backward(dy, *ctx.saved_tensors)


register("simple_gate(Tensor x) -> Tensor", forward, _forward_fake, autograd=_SimpleGate.apply)
register("simple_gate_backward(Tensor dy, Tensor x) -> Tensor", backward, _backward_fake)
