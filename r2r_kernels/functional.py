"""The fused operators: names, signatures and answers of `r2r_kernels.reference`, on any device.

Activations are float tensors [N, C, H, W] of any memory format, which the results keep; parameters have the same dtype
(under autocast: any float dtype) and device. What does not fit raises a ValueError, or a TypeError for a dtype, in one
line that names the argument, what was got and what is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2r_kernels import library  # noqa: F401  (registers torch.ops.r2r)
from r2r_kernels.reference import NAFBlockParams, bank_retrieve, gated_conv, slot_conv, task_mask

__all__ = [
    "NAFBlockParams",
    "bank_retrieve",
    "depthwise_gate",
    "gated_conv",
    "layer_norm_2d",
    "naf_block",
    "simple_gate",
    "slot_conv",
    "task_mask",
]


def _check_images(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a float dtype, got {x.dtype}")


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
    if parameter.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} to fit x {list(x.shape)}, got {list(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as x is, got {parameter.device}")
    if parameter.dtype != x.dtype:
        cast = torch.is_autocast_enabled(x.device.type)
        if not (cast and parameter.is_floating_point()):
            raise TypeError(f"{name} must be {x.dtype} as x is, got {parameter.dtype}")


def _check_even(name: str, x: Tensor) -> None:
    if x.shape[1] % 2:
        raise ValueError(f"{name} must have an even number of channels, got {list(x.shape)}")


def layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each pixel of x [N, C, H, W] over its channels; weight, bias [C] (NAFNet's LayerNorm2d)."""
    _check_images("x", x)
    _check_parameter("weight", weight, (x.shape[1],), x)
    _check_parameter("bias", bias, (x.shape[1],), x)
    return torch.ops.r2r.layer_norm_2d(x, weight, bias, eps)[0]


def simple_gate(x: Tensor) -> Tensor:
    """First half of the channels times the second half: [N, 2C, H, W] -> [N, C, H, W] (NAFNet, section 3.4)."""
    _check_images("x", x)
    _check_even("x", x)
    return torch.ops.r2r.simple_gate(x)


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """3x3 depthwise convolution, SimpleGate, and the spatial mean of the result, in one pass.

    x [N, 2C, H, W], weight [2C, 1, 3, 3], bias [2C] -> gated [N, C, H, W], mean [N, C, 1, 1].
    """
    _check_images("x", x)
    _check_even("x", x)
    _check_parameter("weight", weight, (x.shape[1], 1, 3, 3), x)
    _check_parameter("bias", bias, (x.shape[1],), x)
    return torch.ops.r2r.depthwise_gate(x, weight, bias)


def naf_block_shapes(channels: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a NAF block's parameters, in the order of NAFBlockParams."""
    c = channels
    norm, wide, narrow, scale = ((c,), (c,)), ((2 * c, c, 1, 1), (2 * c,)), ((c, c, 1, 1), (c,)), ((1, c, 1, 1),)
    depthwise = ((2 * c, 1, 3, 3), (2 * c,))
    return (*norm, *wide, *depthwise, *narrow, *narrow, *scale, *norm, *wide, *narrow, *scale)


def naf_block(x: Tensor, params: NAFBlockParams, eps: float = 1e-6) -> Tensor:
    """A whole NAF block without dropout: x [N, C, H, W] -> [N, C, H, W] (NAFNet, figure 3 and section 3.4).

    Training keeps x alone and computes the rest again in the backward pass.
    """
    _check_images("x", x)
    if len(params) != len(NAFBlockParams._fields):
        raise ValueError(f"params must be the {len(NAFBlockParams._fields)} of NAFBlockParams, got {len(params)}")
    shapes = naf_block_shapes(x.shape[1])
    for name, parameter, shape in zip(NAFBlockParams._fields, params, shapes, strict=True):
        _check_parameter(name, parameter, shape, x)
    return torch.ops.r2r.naf_block(x, list(params), eps)
