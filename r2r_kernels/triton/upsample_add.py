"""upsample_add: 1x1 convolution without bias, PixelShuffle(2) and the skip, in one pass.

On rows: a product [pixels, 2C] @ [2C, 4C] whose columns are ordered (i, j, c), so that the 2C of one i are
neighbours in row 2h + i of the result; the epilogue adds the skip there and stores. It reads x and the skip once and
writes the result once, 10C for a pixel of x, where convolution, shuffle and addition one by one move 26C.

Backward is two plain products around one copy (the unshuffled gradient) and is left to cuBLAS; the skip's gradient is
the result's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import as_images, as_rows
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config
from r2r_kernels.triton.products import precision, product

CANDIDATES: dict[str, list[Config]] = {
    "forward": [
        {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}
        for bm, bn, bk, warps in (
            (64, 64, 32, 4),
            (128, 64, 32, 4),
            (128, 64, 64, 8),
            (128, 128, 32, 8),
            (64, 128, 64, 4),
        )
        for stages in (3, 4)
    ]
}


@triton.jit(do_not_specialize=["pixels", "W"])
def _forward(
    x_ptr,
    w_ptr,
    skip_ptr,
    y_ptr,
    pixels,
    W,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = PixelShuffle2(x @ w) + skip: a program takes BM pixels of x and BN columns of w.

    x [pixels, 2C], w [2C, 4C] with columns ordered (i, j, c), skip [N, 2H, 2W, C] -> y like skip; W is the width of x.
    """
    blocks: tl.constexpr = (4 * C + BN - 1) // BN
    first = (tl.program_id(0) // blocks).to(tl.int64) * BM
    m = tl.arange(0, BM)
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    inside = (first + m < pixels)[:, None]
    product = tl.zeros((BM, BN), tl.float32)
    for k in range(0, 2 * C, BK):
        c = k + tl.arange(0, BK)
        x = tl.load(
            x_ptr + first * 2 * C + (m[:, None] * 2 * C + c[None, :]), mask=inside & (c < 2 * C)[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + c[:, None] * (4 * C) + n[None, :], mask=(c < 2 * C)[:, None] & (n < 4 * C)[None, :], other=0.0
        )
        product = tl.dot(x, w, product, input_precision=PRECISION)
    # Pixel p of x, in image row p // W, owns pixels (2p, 2p + 1) of rows 2h and 2h + 1, 2C values each.
    row = first // W
    begin = (first + row * W) * 2 * C
    down = (first + m) // W - row
    line = (m + down * W)[:, None] * (2 * C)
    column = (n // (2 * C) * W * 2 * C + n % (2 * C))[None, :]
    mask = inside & (n < 4 * C)[None, :]
    skip = tl.load(skip_ptr + begin + (line + column), mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + begin + (line + column), (product + skip).to(y_ptr.dtype.element_ty), mask=mask)


def _ordered(weight: Tensor) -> Tensor:
    # [4C, 2C, 1, 1], output channels ordered (c, i, j) -> [2C, 4C], ordered (i, j, c)
    return weight.view(-1, 2, 2, weight.shape[1]).permute(3, 1, 2, 0).flatten(1)


def forward(x: Tensor, weight: Tensor, skip: Tensor, config: Config | None = None) -> Tensor:
    """x [N, 2C, h, w], weight [4C, 2C, 1, 1], skip [N, C, 2h, 2w] -> [N, C, 2h, 2w] like skip."""
    images, double, height, width = x.shape
    config = config or configs.require("upsample_add.forward", double // 2, x)
    rows, others = as_rows(x), as_rows(skip)
    y = torch.empty_like(others)
    pixels = images * height * width
    if pixels:
        grid = (triton.cdiv(pixels, config["BM"]) * triton.cdiv(2 * double, config["BN"]),)
        with torch.cuda.device_of(x):
            _forward[grid](
                rows,
                _ordered(weight).to(x.dtype),
                others,
                y,
                pixels,
                width,
                C=double // 2,
                PRECISION=precision(x),
                **config,
            )
    return as_images(y, skip)


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx like x, dweight like weight, dskip (dy itself)."""
    images, double, height, width = x.shape
    unshuffled = as_rows(dy).view(images, height, 2, width, 2, double // 2).permute(0, 1, 3, 2, 4, 5).flatten(3)
    dx = unshuffled @ _ordered(weight).to(x.dtype).t()
    dweight = product(as_rows(x).view(1, -1, double), unshuffled.view(1, -1, 2 * double))[0]
    dweight = dweight.view(double, 2, 2, double // 2).permute(3, 1, 2, 0).reshape(weight.shape)
    return as_images(dx, x), dweight.to(weight.dtype), dy
