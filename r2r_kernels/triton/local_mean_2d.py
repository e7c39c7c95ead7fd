"""local_mean_2d: the mean over a window around each pixel, the window moved inside the image at its borders (TLC's
"local" pooling, Chu et al., ECCV 2022, without its approximation).

A box filter is two passes of a running sum, one along rows and one along columns. Seen as [outer, length, inner] both
are the same kernel: a program holds BI neighbours of `inner`, walks along `length` and, at each step, adds what
enters the window and subtracts what leaves it, in float32. Each value is read three times at most (entering, leaving,
and by the next program's first window), whatever the size of the window. Between the passes the sums stay float32.

The backward is the same walk: the windows that hold a pixel are neighbours too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import as_images, as_rows
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

CANDIDATES: dict[str, list[Config]] = {
    "": [{"BI": bi, "num_warps": warps} for bi, warps in ((128, 1), (256, 2), (256, 4), (512, 4), (1024, 4))]
}


@triton.jit
def _bounds(i, length, window, BACKWARD: tl.constexpr):
    # The first of what is summed for i, and one past its last: forward the pixels of the window of i, backward the
    # windows that hold pixel i. Windows near a border are those of the nearest pixel whose window fits.
    before = (window - 1) // 2
    if BACKWARD:
        begin = tl.where(i < window, 0, i - window + 1 + before)
        end = tl.where(i >= length - window, length, i + before + 1)
    else:
        begin = tl.minimum(tl.maximum(i - before, 0), length - window)
        end = begin + window
    return begin, end


@triton.jit(do_not_specialize=["length", "window", "steps"])
def _running_sum(x_ptr, y_ptr, length, inner, window, steps, scale, BACKWARD: tl.constexpr, BI: tl.constexpr):
    """y = scale * the sum of x over the window of each place along `length`: a program takes BI neighbours of `inner`.

    x [outer, length, inner] -> y like it. BACKWARD: over the windows that hold the place.
    """
    blocks = tl.cdiv(inner, BI)
    segments = tl.cdiv(length, steps)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    outer = (tl.program_id(0) // blocks // segments).to(tl.int64)
    i = block.to(tl.int64) * BI + tl.arange(0, BI)
    exists = i < inner
    x_ptr += outer * length * inner
    y_ptr += outer * length * inner
    first = segment * steps
    begin, _ = _bounds(first, length, window, BACKWARD)
    end = begin
    total = tl.zeros((BI,), tl.float32)
    for k in range(0, tl.minimum(steps, length - first)):
        step = first + k
        wanted_begin, wanted_end = _bounds(step, length, window, BACKWARD)
        while end < wanted_end:
            total += tl.load(x_ptr + end.to(tl.int64) * inner + i, mask=exists, other=0.0).to(tl.float32)
            end += 1
        while begin < wanted_begin:
            total -= tl.load(x_ptr + begin.to(tl.int64) * inner + i, mask=exists, other=0.0).to(tl.float32)
            begin += 1
        tl.store(y_ptr + step.to(tl.int64) * inner + i, (total * scale).to(y_ptr.dtype.element_ty), mask=exists)


def _along(x: Tensor, y: Tensor, outer: int, length: int, inner: int, window: int, back: bool, config: Config) -> None:
    # A walk is as long as half a window at least: its first window is summed from nothing.
    steps = max(32, window // 2)
    grid = (outer * triton.cdiv(length, steps) * triton.cdiv(inner, config["BI"]),)
    _running_sum[grid](x, y, length, inner, window, steps, 1 / window, BACKWARD=back, **config)


def _local_mean(x: Tensor, window: tuple[int, int], back: bool, config: Config | None) -> Tensor:
    config = config or configs.require("local_mean_2d", x.shape[1], x)
    rows = as_rows(x)
    images, height, width, channels = rows.shape
    y = torch.empty_like(rows)
    if images:
        between = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
        down, across = min(window[0], height), min(window[1], width)
        with torch.cuda.device_of(x):
            _along(rows, between, images, height, width * channels, down, back, config)
            _along(between, y, images * height, width, channels, across, back, config)
    return as_images(y, x)


def forward(x: Tensor, window: tuple[int, int], config: Config | None = None) -> Tensor:
    """x [N, C, H, W] -> the mean over a window (kh, kw) around each pixel, like x."""
    return _local_mean(x, window, False, config)


def backward(dy: Tensor, window: tuple[int, int], config: Config | None = None) -> Tensor:
    """-> dx like dy."""
    return _local_mean(dy, window, True, config)
