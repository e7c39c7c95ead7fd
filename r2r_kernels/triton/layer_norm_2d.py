"""layer_norm_2d: normalise each pixel over its channels; statistics in float32, variance about the mean (two passes
over registers).

One read and one write of the activations, in NCHW and in channels_last alike: a program holds BP whole pixels, and the
compiler lays its threads along whichever axis is contiguous. Backward reads x and dy once and writes dx; gradients of
weight and bias are summed by a fixed number of programs over fixed pixels, then over the programs, in the same order
in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import is_channels_last, memory_format
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

# Programs of backward: several for each multiprocessor of any GPU, few enough that their partial sums cost nothing.
PROGRAMS = 1024

_TILES: list[Config] = [
    {"elements": e, "num_warps": w} for e, w in ((1024, 1), (2048, 2), (2048, 4), (4096, 4), (8192, 8))
]
CANDIDATES = {"forward": _TILES, "backward": _TILES}


@triton.jit
def _tile(tile, pixels, C: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    # Where a tile's statistics and activations lie, and which of its pixels and elements exist.
    tiles = tl.cdiv(pixels, BP)
    image = (tile // tiles).to(tl.int64)
    first = (tile % tiles).to(tl.int64) * BP
    p = tl.arange(0, BP)
    c = tl.arange(0, BC)
    exists = first + p < pixels
    if LAST:
        base = (image * pixels + first) * C
        offsets = p[:, None] * C + c[None, :]
    else:
        base = image * C * pixels + first
        offsets = c.to(tl.int64)[None, :] * pixels + p[:, None]
    return image * pixels + first + p, base + offsets, exists, exists[:, None] & (c < C)[None, :]


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    eps,
    C: tl.constexpr,
    LAST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """y = (x - mean) * rstd * weight + bias: a program takes BP pixels.

    x [N, C, pixels], or [pixels, C] where LAST; weight, bias [C] -> y like x; mean, rstd float32 [N, pixels].
    """
    c = tl.arange(0, BC)
    stats, offsets, exists, mask = _tile(tl.program_id(0), pixels, C, LAST, BP, BC)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where((c < C)[None, :], x - mean[:, None], 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + stats, mean, mask=exists)
    tl.store(rstd_ptr + stats, rstd, mask=exists)


@triton.jit(do_not_specialize=["tiles"])
def _backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    pixels,
    tiles,
    C: tl.constexpr,
    LAST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """dx, and a program's sums for dweight and dbias: program p takes the tiles p, p + programs, ...

    dy, x [N, C, pixels], or [pixels, C] where LAST; weight [C]; mean, rstd float32 [N, pixels] -> dx like x; partial
    float32 [programs, 2, C].
    """
    c = tl.arange(0, BC)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BP, BC), tl.float32)
    dbias = tl.zeros((BP, BC), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        stats, offsets, exists, mask = _tile(tile, pixels, C, LAST, BP, BC)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + stats, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + stats, mask=exists, other=0.0)
        normed = (x - mean[:, None]) * rstd[:, None]
        dnormed = dy * weight[None, :]  # 0 beyond C, as dy is
        along = tl.sum(dnormed * normed, 1) / C
        level = tl.sum(dnormed, 1) / C
        dx = (dnormed - level[:, None] - normed * along[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * normed
        dbias += dy
    partial = partial_ptr + tl.program_id(0) * 2 * C + c
    tl.store(partial, tl.sum(dweight, 0), mask=c < C)
    tl.store(partial + C, tl.sum(dbias, 0), mask=c < C)


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    # x in a format that the kernels read, and whether that is channels_last. In NCHW, 16 pixels of more than 256
    # channels do not fit the registers of a program: such an x is copied to channels_last first.
    if is_channels_last(x) or x.shape[1] > 256:
        return x.contiguous(memory_format=torch.channels_last), True
    return x.contiguous(), False


def _tiling(x: Tensor, last: bool, config: Config) -> tuple[int, int, dict[str, int | bool]]:
    # In channels_last all pixels of the batch are rows of one matrix; in NCHW each image is a matrix of its own.
    images, channels, height, width = x.shape
    pixels = height * width
    if last:
        images, pixels = 1, images * pixels
    padded = triton.next_power_of_2(channels)
    # In NCHW threads want 16 neighbouring pixels (32 bytes, a sector) however many channels there are.
    block = max(1 if last else 16, config["elements"] // padded)
    warps = config["num_warps"] * max(1, block * padded // config["elements"])
    tiles = images * triton.cdiv(pixels, block)
    return pixels, tiles, {"C": channels, "LAST": last, "BP": block, "BC": padded, "num_warps": min(warps, 16)}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, H, W], weight and bias [C] -> y like x, mean and rstd float32 [N, H, W]."""
    config = config or configs.require("layer_norm_2d.forward", x.shape[1], x)
    source, last = _readable(x)
    y = torch.empty_like(source)
    mean, rstd = torch.empty((2, x.shape[0], *x.shape[2:]), dtype=torch.float32, device=x.device)
    pixels, tiles, tiling = _tiling(x, last, config)
    if tiles:
        with torch.cuda.device_of(x):
            _forward[(tiles,)](source, weight, bias, y, mean, rstd, pixels, eps, **tiling)
    return y.contiguous(memory_format=memory_format(x)), mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx like x, dweight and dbias [C] of the dtype of weight."""
    config = config or configs.require("layer_norm_2d.backward", x.shape[1], x)
    source, last = _readable(x)
    dy = dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    dx = torch.empty_like(source)
    pixels, tiles, tiling = _tiling(x, last, config)
    programs = min(tiles, PROGRAMS)
    partial = torch.empty((programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    if tiles:
        with torch.cuda.device_of(x):
            _backward[(programs,)](dy, source, weight, mean, rstd, dx, partial, pixels, tiles, **tiling)
    dweight, dbias = partial.sum(0).to(weight.dtype)
    return dx.contiguous(memory_format=memory_format(x)), dweight, dbias
