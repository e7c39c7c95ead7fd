"""Registers `local_mean_2d`: the mean over a window around each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import gradients, implementation
from r2r_kernels.operators.layout import dense, empty, is_channels_last
from r2r_kernels.operators.registry import first_derivative_only, register


def forward(x: Tensor, window: Sequence[int]) -> Tensor:
    """x [N, C, H, W], window (height, width) -> [N, C, H, W]."""
    chosen = implementation.of(x)
    if chosen == "triton":
        return dense(implementation.triton_kernels("local_mean_2d").forward(x, tuple(window)), x)
    if chosen == "native":
        y = _fake(x, window)
        implementation.NATIVE.local_mean_2d(dense(x, x), window[0], window[1], False, is_channels_last(x), y)
        return y
    return dense(reference.local_mean_2d(x, window), x)


def backward(dy: Tensor, window: Sequence[int]) -> Tensor:
    """The gradient of x."""
    chosen = implementation.of(dy)
    if chosen == "triton":
        return dense(implementation.triton_kernels("local_mean_2d").backward(dy, tuple(window)), dy)
    if chosen == "native":
        dx = _fake(dy, window)
        implementation.NATIVE.local_mean_2d(dense(dy, dy), window[0], window[1], True, is_channels_last(dy), dx)
        return dx
    return dense(_plain_backward(dy, window), dy)


def _plain_backward(dy: Tensor, window: Sequence[int]) -> Tensor:
    """The averaging matrices, transposed."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    down, across = (reference.window_averaging(dy.shape[dim], window[dim - 2], dy.device).to(wide) for dim in (2, 3))
    return gradients.average(dy, down.T, across.T)


def _fake(x: Tensor, window: Sequence[int]) -> Tensor:
    return empty(x, x.shape[1])


class _LocalMean2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Sequence[int]) -> Tensor:
        ctx.window = window
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.r2r.local_mean_2d(x, window)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.r2r.local_mean_2d_backward(dy, ctx.window), None


register(
    "local_mean_2d(Tensor x, int[] window) -> Tensor", forward, _fake, autograd=_LocalMean2d.apply, autocast="norm"
)
register("local_mean_2d_backward(Tensor dy, int[] window) -> Tensor", backward, _fake)
