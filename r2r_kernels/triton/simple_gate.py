"""simple_gate: the first half of the channels times the second half.

A stream: forward reads 2C and writes C, backward reads 3C and writes 2C, each element once. Both memory formats are
[outer, 2, inner] without gaps: outer = pixels and inner = C in channels_last, outer = images and inner = C*H*W in NCHW.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import is_channels_last, memory_format
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

_TILES: list[Config] = [
    {"elements": e, "num_warps": w} for e, w in ((1024, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8))
]
CANDIDATES = {"forward": _TILES, "backward": _TILES}


@triton.jit
def _tile(outer, inner, BO: tl.constexpr, BI: tl.constexpr):
    # The output's offsets, the input's (of its first half), and which exist.
    blocks = tl.cdiv(inner, BI)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BO
    column = (tl.program_id(0) % blocks).to(tl.int64) * BI
    o = tl.arange(0, BO)
    i = tl.arange(0, BI)
    exists = (row + o < outer)[:, None] & (column + i < inner)[None, :]
    # BO > 1 only where a row is short, so that offsets inside a tile fit 32 bits.
    out = row * inner + column + (o[:, None] * inner + i[None, :])
    first = row * 2 * inner + column + (o[:, None] * 2 * inner + i[None, :])
    return out, first, exists


@triton.jit(do_not_specialize=["outer"])
def _forward(x_ptr, y_ptr, outer, inner, BO: tl.constexpr, BI: tl.constexpr):
    """x [outer, 2, inner] -> y [outer, inner], the first half times the second: a program takes BO x BI values."""
    out, first, exists = _tile(outer, inner, BO, BI)
    a = tl.load(x_ptr + first, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + first + inner, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, (a * b).to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["outer"])
def _backward(dy_ptr, x_ptr, dx_ptr, outer, inner, BO: tl.constexpr, BI: tl.constexpr):
    """dy [outer, inner], x [outer, 2, inner] -> dx like x."""
    out, first, exists = _tile(outer, inner, BO, BI)
    dy = tl.load(dy_ptr + out, mask=exists, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + first, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + first + inner, mask=exists, other=0.0).to(tl.float32)
    tl.store(dx_ptr + first, (dy * b).to(dx_ptr.dtype.element_ty), mask=exists)
    tl.store(dx_ptr + first + inner, (dy * a).to(dx_ptr.dtype.element_ty), mask=exists)


def _tiling(x: Tensor, config: Config) -> tuple[int, int, int, dict[str, int]]:
    images, channels, height, width = x.shape
    if is_channels_last(x):
        outer, inner = images * height * width, channels // 2
    else:
        outer, inner = images, channels // 2 * height * width
    across = min(config["elements"], triton.next_power_of_2(max(inner, 1)))
    down = config["elements"] // across
    programs = triton.cdiv(outer, down) * triton.cdiv(inner, across)
    return outer, inner, programs, {"BO": down, "BI": across, "num_warps": config["num_warps"]}


def forward(x: Tensor, config: Config | None = None) -> Tensor:
    """x [N, 2C, H, W] -> [N, C, H, W]."""
    config = config or configs.require("simple_gate.forward", x.shape[1] // 2, x)
    x = x.contiguous(memory_format=memory_format(x))
    images, channels, height, width = x.shape
    y = torch.empty(
        (images, channels // 2, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )
    outer, inner, programs, tiling = _tiling(x, config)
    if programs:
        with torch.cuda.device_of(x):
            _forward[(programs,)](x, y, outer, inner, **tiling)
    return y


def backward(dy: Tensor, x: Tensor, config: Config | None = None) -> Tensor:
    """dy [N, C, H, W], x [N, 2C, H, W] -> dx like x."""
    config = config or configs.require("simple_gate.backward", x.shape[1] // 2, x)
    x = x.contiguous(memory_format=memory_format(x))
    dy = dy.contiguous(memory_format=memory_format(x))
    dx = torch.empty_like(x)
    outer, inner, programs, tiling = _tiling(x, config)
    if programs:
        with torch.cuda.device_of(x):
            _backward[(programs,)](dy, x, dx, outer, inner, **tiling)
    return dx
