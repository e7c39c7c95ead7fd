"""Gradients of the parts that several operators are made of, in plain PyTorch.

They are explicit formulas, because operators run below autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolution(
    dy: Tensor, x: Tensor, weight: Tensor, padding: int = 0, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of a convolution."""
    ones, pads = [1, 1], [padding, padding]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], ones, pads, ones, False, [0, 0], groups, [True, True, True]
    )


def scaled_convolution(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and scale of (conv1x1(x, weight) + bias) * scale.

    The scale is folded into the weight, so that neither the convolution's output nor dy * scale is made.
    """
    factor = scale.view(-1, 1, 1, 1)
    dx, dweight, dbias = convolution(dy, x, weight * factor)
    dscale = (weight * dweight).sum((1, 2, 3)) + bias * dbias
    return dx, dweight * factor, dbias * factor.flatten(), dscale.view(scale.shape)


def average(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """down @ x @ across.T on the planes of x [N, C, H, W], in its layout. With both matrices transposed: its gradient.

    PyTorch's pooling is slow in NCHW. Its products of planes are slow in channels_last, so there rows of pixels are
    multiplied.
    """
    wide = x.to(down.dtype)
    if wide.is_contiguous() or not wide.is_contiguous(memory_format=torch.channels_last):
        return (down @ (wide @ across.T)).to(x.dtype)
    pixels = wide.permute(0, 2, 3, 1)
    rows = (down @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
    return (across @ rows).permute(0, 3, 1, 2).to(x.dtype)
