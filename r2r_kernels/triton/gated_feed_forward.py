"""gated_feed_forward: the feed-forward branch of a NAF block in one launch, on rows [pixels, C].

As the stage `naf_block.result` without its first convolution: it reads x and writes
x + gamma * conv2(gate(conv1(norm(x)))), with the hidden channels in registers, BH at a time. One small launch before it
folds norm and gamma into the convolutions. Its configuration is that of `naf_block.result`, which does the same and a
matrix more. The backward is put together from other operators (`operators/gated_feed_forward.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import as_images, as_rows
from r2r_kernels.reference import GatedFeedForwardParams
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config
from r2r_kernels.triton.naf_block.fold import fitting, fold_square, fold_widening, padded_channels
from r2r_kernels.triton.naf_block.forward import feed_forward, pixels_of
from r2r_kernels.triton.products import precision


@triton.jit
def _fold(
    norm_ptr,
    shift_ptr,
    w1_ptr,
    b1_ptr,
    out1_ptr,
    bias1_ptr,
    w2_ptr,
    b2_ptr,
    gamma_ptr,
    out2_ptr,
    bias2_ptr,
    C: tl.constexpr,
    K: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """A program folds BJ output channels of one piece: half of the widening convolution, or the square one.

    norm, shift, gamma [C]; w1 [2C, C]; b1 [2C]; w2 [C, C]; b2 [C] -> out1 [K, 2K]; out2 [K, K]; bias1 [2K]; bias2 [K].
    """
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    piece = tl.program_id(1)
    if piece < 2:
        fold_widening(norm_ptr, shift_ptr, w1_ptr, b1_ptr, out1_ptr, bias1_ptr, piece, j, C, K, BC)
    else:
        fold_square(w2_ptr, b2_ptr, gamma_ptr, out2_ptr, bias2_ptr, j, C, K, BC)


@triton.jit(do_not_specialize=["pixels"])
def _on_rows(
    x_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    y_ptr,
    pixels,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """A program takes BM pixels: x [pixels, C], w1 [K, 2K], b1 [2K], w2 [K, K], b2 [K], folded -> y [pixels, C]."""
    first = tl.program_id(0).to(tl.int64) * BM
    m = tl.arange(0, BM)
    cols = tl.arange(0, K)
    exists = cols < C
    mask = (first + m < pixels)[:, None] & exists[None, :]
    offsets = m[:, None] * C + cols[None, :]
    y = tl.load(x_ptr + first * C + offsets, mask=mask, other=0.0).to(tl.float32)
    y = feed_forward(y, exists, eps, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, K, PRECISION, BH)
    tl.store(y_ptr + first * C + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def forward(x: Tensor, params: GatedFeedForwardParams, eps: float, config: Config | None = None) -> Tensor:
    """x [N, C, H, W] -> the result like x; parameters contiguous."""
    if not len(x):
        return torch.empty_like(x)
    with torch.cuda.device_of(x):
        rows, channels = as_rows(x), x.shape[1]
        config = config or configs.lookup("naf_block.result", channels, rows, pixels_of(rows))
        y = _by_products(rows, params, eps) if config is None else _launch(rows, params, eps, config)
        return as_images(y, x)


def _launch(rows: Tensor, p: GatedFeedForwardParams, eps: float, config: Config) -> Tensor:
    channels, pixels = rows.shape[-1], pixels_of(rows)
    padded = padded_channels(channels)
    matrix1 = rows.new_empty((padded, 2 * padded))
    matrix2 = rows.new_empty((padded, padded))
    bias1, bias2 = torch.empty(3 * padded, dtype=torch.float32, device=rows.device).split([2 * padded, padded])
    folding = fitting(configs.require("naf_block.fold", channels, rows), padded)
    _fold[(triton.cdiv(padded, folding["BJ"]), 3)](
        p.norm_weight, p.norm_bias, p.conv1_weight, p.conv1_bias, matrix1, bias1,
        p.conv2_weight, p.conv2_bias, p.gamma, matrix2, bias2, C=channels, K=padded, **folding,
    )  # fmt: skip
    y = torch.empty_like(rows)
    tile = {name: value for name, value in fitting(config, padded).items() if name != "ATTEND"}
    _on_rows[(triton.cdiv(pixels, config["BM"]),)](
        rows, matrix1, bias1, matrix2, bias2, y, pixels, eps,
        C=channels, K=padded, PRECISION=precision(rows), **tile,
    )  # fmt: skip
    return y


def _by_products(rows: Tensor, p: GatedFeedForwardParams, eps: float) -> Tensor:
    # By PyTorch, where no configuration fits (more than 1024 channels).
    normed = F.layer_norm(rows, rows.shape[-1:], p.norm_weight, p.norm_bias, eps)
    first, second = F.linear(normed, p.conv1_weight.flatten(1), p.conv1_bias).chunk(2, -1)
    return rows + F.linear(first * second, p.conv2_weight.flatten(1), p.conv2_bias) * p.gamma.flatten()
