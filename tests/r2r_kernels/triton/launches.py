"""Every launch that the package makes, on meta tensors: what the ahead-of-time tests compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from r2r_kernels.reference import GatedFeedForwardParams, NAFBlockParams
from r2r_kernels.triton import (
    bank_retrieve,
    depthwise_gate,
    gated_feed_forward,
    layer_norm_2d,
    local_mean_2d,
    naf_block,
    simple_gate,
    slot_conv,
    upsample_add,
)

Size = tuple[int, int]


def _images(channels: int, dtype: torch.dtype, size: Size, memory_format: torch.memory_format) -> Tensor:
    return torch.empty((2, channels, *size), dtype=dtype, device="meta").to(memory_format=memory_format)


def _vector(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def params(channels: int, dtype: torch.dtype, device: str = "meta") -> NAFBlockParams:
    """A block's parameters, random."""
    c = channels

    def new(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (torch.randn(shape) * scale + shift).to(device, dtype)

    return NAFBlockParams(
        norm1_weight=new(c, scale=0.3, shift=1.0),
        norm1_bias=new(c, scale=0.3),
        conv1_weight=new(2 * c, c, 1, 1, scale=c**-0.5),
        conv1_bias=new(2 * c, scale=0.3),
        conv2_weight=new(2 * c, 1, 3, 3, scale=0.3),
        conv2_bias=new(2 * c, scale=0.3),
        sca_weight=new(c, c, 1, 1, scale=c**-0.5),
        sca_bias=new(c, scale=0.3, shift=1.0),
        conv3_weight=new(c, c, 1, 1, scale=c**-0.5),
        conv3_bias=new(c, scale=0.3),
        beta=new(1, c, 1, 1),
        norm2_weight=new(c, scale=0.3, shift=1.0),
        norm2_bias=new(c, scale=0.3),
        conv4_weight=new(2 * c, c, 1, 1, scale=c**-0.5),
        conv4_bias=new(2 * c, scale=0.3),
        conv5_weight=new(c, c, 1, 1, scale=c**-0.5),
        conv5_bias=new(c, scale=0.3),
        gamma=new(1, c, 1, 1),
    )


def layer_norm_2d_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = _images(channels, dtype, size, memory_format)
        weight = _vector(channels, dtype=dtype)
        _, mean, rstd = layer_norm_2d.forward(x, weight, weight, 1e-6)
        layer_norm_2d.backward(x, x, weight, mean, rstd)


def simple_gate_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = _images(2 * channels, dtype, size, memory_format)
        simple_gate.backward(simple_gate.forward(x), x)


def depthwise_gate_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    x = _images(2 * channels, dtype, size, torch.channels_last)
    weight, bias = _vector(2 * channels, 1, 3, 3, dtype=dtype), _vector(2 * channels, dtype=dtype)
    gated, mean = depthwise_gate.forward(x, weight, bias)
    depthwise_gate.backward(gated, mean, x, weight, bias)


def naf_block_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    x = _images(channels, dtype, size, torch.channels_last)
    y, saved = naf_block.forward_training(x, params(channels, dtype), 1e-6)
    naf_block.backward(y, x, saved, params(channels, dtype), 1e-6)


def gated_feed_forward_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    x = _images(channels, dtype, size, torch.channels_last)
    gated_feed_forward.forward(x, GatedFeedForwardParams(*params(channels, dtype)[11:]), 1e-6)


def upsample_add_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    x = _images(2 * channels, dtype, size, torch.channels_last)
    skip = _images(channels, dtype, (2 * size[0], 2 * size[1]), torch.channels_last)
    upsample_add.forward(x, _vector(4 * channels, 2 * channels, 1, 1, dtype=dtype), skip)


def local_mean_2d_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    x = _images(channels, dtype, size, torch.channels_last)
    local_mean_2d.backward(local_mean_2d.forward(x, (31, 33)), (31, 33))


def bank_retrieve_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    """`channels` of the values; a quarter of them of the keys."""
    keys, values = (_vector(5, 53, c, *size, dtype=dtype) for c in (max(1, channels // 4), channels))
    counts, scale = _vector(5, dtype=torch.int64), _vector(dtype=torch.float32)
    for told in (None, _vector(8, 5, dtype=torch.bool)):
        for mode in ("hard", "multi", "soft"):
            bank_retrieve.forward(_vector(8, *keys.shape[2:], dtype=dtype), keys, values, counts, scale, told, mode)


def slot_conv_launches(channels: int, dtype: torch.dtype, size: Size) -> None:
    x, weight = _vector(2, 64, channels, *size, dtype=dtype), _vector(2, channels, 12, 3, 3, dtype=dtype)
    slot_conv.backward(slot_conv.forward(x, weight, _vector(2, channels, dtype=dtype)), x, weight)


LAUNCHES: dict[str, Callable[[int, torch.dtype, Size], None]] = {
    "layer_norm_2d": layer_norm_2d_launches,
    "simple_gate": simple_gate_launches,
    "depthwise_gate": depthwise_gate_launches,
    "naf_block": naf_block_launches,
    "gated_feed_forward": gated_feed_forward_launches,
    "upsample_add": upsample_add_launches,
    "local_mean_2d": local_mean_2d_launches,
    "bank_retrieve": bank_retrieve_launches,
    "slot_conv": slot_conv_launches,
}
