"""What a swapped module calls: the operators on tensors as anyone's module keeps them.

Biases, affines and scales that a module does not have are None; vectors may have dimensions of 1 around them. Tensors
that an operator does not take, though the module itself may, raise `Unfit` before any work. Under autocast the answers
have the dtype of the module's own: the residual stays in the wider of the dtypes of x and of the scale that it is added
to, for PyTorch multiplies and adds in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r_kernels import functional, reference
from r2r_kernels.reference import GatedFeedForwardParams, NAFBlockParams

FUNCTIONAL: ModuleType = functional
REFERENCE: ModuleType = reference


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Modulation = tuple[Tensor | None, Tensor | None]  # what a norm is multiplied with, and what is added: [N, C, 1, 1]


class Unfit(Exception):
    """The operator does not take these tensors; the module's own forward is to answer."""


def _eps(x: Tensor, eps: Sequence[float | None]) -> float:
    """Of those for DTYPES, the one for x."""
    for dtype, value in zip(DTYPES, eps, strict=True):
        if dtype == x.dtype and value is not None:
            return value
    raise Unfit


def _images(x: Tensor) -> None:
    plain = type(x) is Tensor or type(x) is nn.Parameter or (torch.compiler.is_compiling() and isinstance(x, Tensor))
    if not plain or x.dim() != 4 or not x.is_floating_point():
        raise Unfit


def _places(kind: type, channels: int) -> tuple[tuple[tuple[int, ...], float | None], ...]:
    """Shape of each parameter, and the value that stands for one that a module can do without."""
    shapes = functional.naf_block_shapes if kind is NAFBlockParams else functional.gated_feed_forward_shapes
    ones = ("norm_weight", "norm1_weight", "norm2_weight", "beta", "gamma")
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    filled = (1.0 if name in ones else 0.0 if name.endswith("bias") else None for name in names)
    return tuple(zip(shapes(channels), filled, strict=True))


_known_places = cache(_places)  # a compiler traces what is in the cache too, and warns of it


def _parameters(kind: Any, x: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype | None) -> Any:
    """The operator's parameters, of x's dtype, or of any float dtype where `dtype` is what they are cast to."""
    device, own = x.device, x.dtype
    places = _places if torch.compiler.is_compiling() else _known_places
    found = []
    for tensor, (shape, fill) in zip(tensors, places(kind, x.shape[1]), strict=True):
        if tensor is None:
            if fill is None:
                raise Unfit
            tensor = torch.full(shape, fill, dtype=dtype or own, device=device)
        elif tensor.shape != shape:
            if tensor.numel() != torch.Size(shape).numel() or tensor.dim() > 4:
                raise Unfit
            tensor = tensor.reshape(shape)
        if tensor.device != device:
            raise Unfit
        if dtype is not None:
            tensor = tensor.to(dtype)
        elif tensor.dtype != own:
            raise Unfit
        found.append(tensor)
    return kind(*found)


def _residual_dtype(x: Tensor, scales: Sequence[Tensor | None]) -> torch.dtype:
    """Under autocast: of x + convolution * scale, one after the other."""
    dtype = torch.promote_types(x.dtype, torch.get_autocast_dtype(x.device.type))
    for scale in scales:
        dtype = dtype if scale is None else torch.promote_types(dtype, scale.dtype)
    return dtype


def layer_norm_2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Sequence[float | None], ops: ModuleType
) -> Tensor:
    """LayerNorm over the channels of [N, C, H, W], with or without weight and bias."""
    _images(x)
    channels = x.shape[1]
    found = []
    for tensor, fill in ((weight, 1.0), (bias, 0.0)):
        if tensor is None:
            tensor = torch.full((channels,), fill, dtype=x.dtype, device=x.device)
        if tensor.numel() != channels or tensor.dtype != x.dtype or tensor.device != x.device:
            raise Unfit
        found.append(tensor.reshape(channels))
    return ops.layer_norm_2d(x, *found, _eps(x, eps))


def simple_gate(x: Tensor, ops: ModuleType) -> Tensor:
    _images(x)
    if x.shape[1] % 2:
        raise Unfit
    return ops.simple_gate(x)


def _modulated(
    weight: Tensor | None, bias: Tensor | None, modulation: Modulation, n: int, x: Tensor
) -> tuple[Any, Any]:
    """Weight and bias of a norm for image n, with what comes after it: (normed * weight + bias) * scale + shift."""
    scale, shift = modulation
    for tensor in modulation:
        if tensor is not None and tensor.shape != (x.shape[0], x.shape[1], 1, 1) and tensor.numel() != x.shape[1]:
            raise Unfit

    def of(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, x.shape[1])[n if tensor.numel() > x.shape[1] else 0]

    if scale is not None:
        weight = of(scale) if weight is None else weight.flatten() * of(scale)
        bias = None if bias is None else bias.flatten() * of(scale)
    if shift is not None:
        bias = of(shift) if bias is None else bias.flatten() + of(shift)
    return weight, bias


def _each_image(
    x: Tensor, tensors: Sequence[Tensor | None], norms: Sequence[int], modulations: Sequence[Modulation], call: Any
) -> Tensor:
    """call(images, tensors) where norms are followed by scales and shifts of each image's own: image by image, with
    these taken into the affines of the norms, whose places among the tensors are `norms`."""
    if all(tensor is None for modulation in modulations for tensor in modulation):
        return call(x, tensors)
    answers = []
    for n in range(x.shape[0]):
        own = list(tensors)
        for place, modulation in zip(norms, modulations, strict=True):
            own[place], own[place + 1] = _modulated(own[place], own[place + 1], modulation, n, x)
        answers.append(call(x[n : n + 1], own))
    if not answers:
        raise Unfit
    return answers[0] if len(answers) == 1 else torch.cat(answers)


def naf_block(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    eps: Sequence[float | None],
    modulations: Sequence[Modulation],
    window: Sequence[int] | None,
    ops: ModuleType,
) -> Tensor:
    """A NAF block; `tensors` in the order of NAFBlockParams, modulations of its two norms."""
    _images(x)

    def call(images: Tensor, own: Sequence[Tensor | None]) -> Tensor:
        return _naf_block(images, own, _eps(x, eps), window, ops)

    return _each_image(x, tensors, (0, 11), modulations, call)


def gated_feed_forward(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    eps: Sequence[float | None],
    modulations: Sequence[Modulation],
    ops: ModuleType,
) -> Tensor:
    """The second half of a NAF block; `tensors` in the order of GatedFeedForwardParams, modulations of its norm."""
    _images(x)

    def call(images: Tensor, own: Sequence[Tensor | None]) -> Tensor:
        return _gated_feed_forward(images, own, _eps(x, eps), ops)

    return _each_image(x, tensors, (0,), modulations, call)


def _naf_block(
    x: Tensor, tensors: Sequence[Tensor | None], eps: float, window: Sequence[int] | None, ops: ModuleType
) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return ops.naf_block(x, _parameters(NAFBlockParams, x, tensors, None), eps, window)
    dtype = _residual_dtype(x, (tensors[10], tensors[17]))
    if x.device.type == "cpu":  # more exact than the products of autocast, and faster than the parts one by one
        p = _parameters(NAFBlockParams, x, tensors, dtype)
        with torch.autocast("cpu", enabled=False):
            return ops.naf_block(x.to(dtype), p, eps, window)
    p = _parameters(NAFBlockParams, x, tensors, torch.float32)
    hidden = F.conv2d(ops.layer_norm_2d(x, p.norm1_weight, p.norm1_bias, eps), p.conv1_weight, p.conv1_bias)
    gated, mean = ops.depthwise_gate(hidden, p.conv2_weight, p.conv2_bias)
    attention = F.conv2d(mean if window is None else ops.local_mean_2d(gated, window), p.sca_weight, p.sca_bias)
    y = x + F.conv2d(gated * attention, p.conv3_weight, p.conv3_bias) * p.beta
    return _feed_forward_by_parts(y, GatedFeedForwardParams(*p[11:]), eps, ops).to(dtype)


def _gated_feed_forward(x: Tensor, tensors: Sequence[Tensor | None], eps: float, ops: ModuleType) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return ops.gated_feed_forward(x, _parameters(GatedFeedForwardParams, x, tensors, None), eps)
    dtype = _residual_dtype(x, tensors[6:])
    if x.device.type == "cpu":
        p = _parameters(GatedFeedForwardParams, x, tensors, dtype)
        with torch.autocast("cpu", enabled=False):
            return ops.gated_feed_forward(x.to(dtype), p, eps)
    return _feed_forward_by_parts(x, _parameters(GatedFeedForwardParams, x, tensors, torch.float32), eps, ops).to(dtype)


def _feed_forward_by_parts(x: Tensor, p: GatedFeedForwardParams, eps: float, ops: ModuleType) -> Tensor:
    hidden = F.conv2d(ops.layer_norm_2d(x, p.norm_weight, p.norm_bias, eps), p.conv1_weight, p.conv1_bias)
    return x + F.conv2d(ops.simple_gate(hidden), p.conv2_weight, p.conv2_bias) * p.gamma
