"""naf_block, forward: a launch for each stage, on rows [N, H, W, C]. A stage has the name of what it writes.

hidden = conv1(norm(x)), gated = gate(depthwise3x3(hidden)) with partial sums of it, attention = the attention's matrix
times the mean of gated, result = y + conv5(gate(conv4(norm(y)))) with y = x + conv3(gated * attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import as_images, as_rows
from r2r_kernels.reference import NAFBlockParams
from r2r_kernels.triton import configs, depthwise_gate, products
from r2r_kernels.triton.configs import Config
from r2r_kernels.triton.naf_block.fold import FoldedParams, fitting, fold, trim

# What a sweep may try, by kernel. For `gated` there are configurations above 64 channels too. The default leaves those
# to `hidden` and depthwise_gate, which do less arithmetic (docs/kernels/gpu.md). num_stages = 2 fetches nothing ahead.
CANDIDATES: dict[str, list[Config]] = {
    "gated": [
        {"BW": bw, "BH": bh, "num_warps": warps, "num_stages": 2}
        for bw, bh, warps in ((32, 16, 4), (64, 16, 4), (64, 16, 8), (64, 32, 8), (128, 16, 8))
    ],
    "hidden": [
        {"BM": bm, "BN": bn, "SPLIT": split, "num_warps": warps, "num_stages": 3}
        for bm, bn, warps in ((16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 32, 8), (64, 64, 4), (128, 64, 8))
        for split in (1, 2, 8)
    ],
    "attention": [{"BJ": bj, "BC": 64, "BP": 16, "num_warps": warps} for bj, warps in ((32, 4), (64, 4), (64, 8))],
    "result": [
        {"BM": bm, "BH": bh, "ATTEND": attend, "num_warps": warps, "num_stages": stages}
        for bm, bh, warps in (
            (16, 64, 8),
            (32, 32, 8),
            (32, 64, 8),
            (64, 32, 4),
            (64, 32, 8),
            (128, 32, 4),
            (128, 32, 8),
        )
        for stages in (2, 3, 4)
        for attend in (0, 1)
    ],
}


@triton.jit
def normalise(x, exists, eps, C: tl.constexpr):
    """x float32 [pixels, K], zero where no channel `exists` [K] -> x normalised, 1 / standard deviation [pixels]."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(exists[None, :], x - mean[:, None], 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["pixels"])
def _hidden(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    pixels,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """hidden = norm(x) @ w + b: a program takes BM pixels, and one of SPLIT shares of the columns.

    x [pixels, C], w [K, 2K], b [2K] -> y [pixels, 2C].
    """
    blocks: tl.constexpr = 2 * ((C + BN - 1) // BN)
    share: tl.constexpr = (blocks + SPLIT - 1) // SPLIT
    begin = tl.program_id(0) % SPLIT * share
    first = (tl.program_id(0) // SPLIT).to(tl.int64) * BM
    m = tl.arange(0, BM)
    cols = tl.arange(0, K)
    inside = (first + m < pixels)[:, None]
    exists = cols < C
    offsets = m[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + first * C + offsets, mask=inside & exists[None, :], other=0.0).to(tl.float32)
    normed, _ = normalise(x, exists, eps, C)
    normed = normed.to(x_ptr.dtype.element_ty)
    for block in range(begin, tl.minimum(begin + share, blocks)):
        half = block // (blocks // 2)
        n = block % (blocks // 2) * BN + tl.arange(0, BN)
        w = tl.load(w_ptr + cols[:, None] * (2 * K) + (half * K + n)[None, :])
        y = tl.dot(normed, w, input_precision=PRECISION) + tl.load(b_ptr + half * K + n)[None, :]
        out = y_ptr + first * 2 * C + (m[:, None] * 2 * C + (half * C + n)[None, :])
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside & (n < C)[None, :])


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gated(
    x_ptr,
    w1_ptr,
    b1_ptr,
    taps_ptr,
    b2_ptr,
    g_ptr,
    pool_ptr,
    H,
    W,
    rows,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    """gated = gate(depthwise3x3(conv1(norm(x)))): a program walks down a strip of BW columns for BH gate channels.

    x [N, H, W, C], w1 [K, 2K], b1 [2K], taps [9, 2K], b2 [2K] -> g [N, H, W, C]; pool float32 [N, parts, C], sums of g
    over each strip. It computes conv1 of a row at the three columns that a tap needs, so that no tensor of 2C channels
    is written, and slides three rows of the convolution through registers.
    """
    groups: tl.constexpr = (C + BH - 1) // BH
    columns = tl.cdiv(W, BW)
    strips = tl.cdiv(H, rows)
    part = tl.program_id(0) // groups
    hid = (tl.program_id(0) % groups) * BH + tl.arange(0, BH)
    w = (part % columns) * BW + tl.arange(0, BW)
    top = (part // columns) % strips * rows
    image = (part // columns // strips).to(tl.int64)
    cols = tl.arange(0, K)
    exists = cols < C
    x_ptr += image * H * W * C
    g_ptr += image * H * W * C
    wa = tl.load(w1_ptr + cols[:, None] * (2 * K) + hid[None, :])
    wb = tl.load(w1_ptr + cols[:, None] * (2 * K) + (K + hid)[None, :])
    ba = tl.load(b1_ptr + hid)[None, :]
    bb = tl.load(b1_ptr + K + hid)[None, :]
    prev_a = tl.zeros((BW, BH), tl.float32)
    prev_b = tl.zeros((BW, BH), tl.float32)
    cur_a = tl.zeros((BW, BH), tl.float32)
    cur_b = tl.zeros((BW, BH), tl.float32)
    pooled = tl.zeros((BH,), tl.float32)
    for i in range(0, rows + 2):
        row = top + i - 1
        next_a = tl.zeros((BW, BH), tl.float32)
        next_b = tl.zeros((BW, BH), tl.float32)
        line = x_ptr + row.to(tl.int64) * W * C
        for dx in tl.static_range(-1, 2):
            col = w + dx
            inside = (col >= 0) & (col < W) & (row >= 0) & (row < H)
            mask = inside[:, None] & exists[None, :]
            x = tl.load(line + (col[:, None] * C + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
            normed, _ = normalise(x, exists, eps, C)
            normed = normed.to(x_ptr.dtype.element_ty)
            # The depthwise convolution pads the output of conv1 with zeros: its bias must not leak in from outside.
            ha = tl.where(inside[:, None], tl.dot(normed, wa, input_precision=PRECISION) + ba, 0.0)
            hb = tl.where(inside[:, None], tl.dot(normed, wb, input_precision=PRECISION) + bb, 0.0)
            tap = taps_ptr + (dx + 1) * 2 * K + hid
            prev_a += ha * tl.load(tap + 12 * K)[None, :]
            prev_b += hb * tl.load(tap + 13 * K)[None, :]
            cur_a += ha * tl.load(tap + 6 * K)[None, :]
            cur_b += hb * tl.load(tap + 7 * K)[None, :]
            next_a += ha * tl.load(tap)[None, :]
            next_b += hb * tl.load(tap + K)[None, :]
        done = row - 1
        write = (w < W) & (done >= top) & (done < tl.minimum(top + rows, H))
        g = (prev_a + tl.load(b2_ptr + hid)[None, :]) * (prev_b + tl.load(b2_ptr + K + hid)[None, :])
        g = tl.where(write[:, None], g, 0.0)
        out = g_ptr + done.to(tl.int64) * W * C + (w[:, None] * C + hid[None, :])
        tl.store(out, g.to(g_ptr.dtype.element_ty), mask=write[:, None] & (hid < C)[None, :])
        pooled += tl.sum(g, 0)
        prev_a = cur_a
        prev_b = cur_b
        cur_a = next_a
        cur_b = next_b
    tl.store(pool_ptr + part.to(tl.int64) * C + hid, pooled, mask=hid < C)


@triton.jit(do_not_specialize=["parts"])
def _attention(
    pool_ptr,
    w_ptr,
    b_ptr,
    mean_ptr,
    s_ptr,
    parts,
    scale,
    C: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """mean = scale * the sum of an image's parts, in their order; s = w @ mean + b.

    pool [N, parts, C], w [C, C], b [C] -> mean, s [N, C]; all float32 but w and b.
    """
    blocks: tl.constexpr = (C + BJ - 1) // BJ
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    j = block * BJ + tl.arange(0, BJ)
    s = tl.load(b_ptr + j, mask=j < C, other=0.0).to(tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        total = tl.zeros((BP, BC), tl.float32)
        for p in range(0, parts, BP):
            part = p + tl.arange(0, BP)
            mask = (part < parts)[:, None] & (c < C)[None, :]
            total += tl.load(pool_ptr + image * parts * C + (part[:, None] * C + c[None, :]), mask=mask, other=0.0)
        mean = tl.sum(total, 0) * scale
        w = tl.load(w_ptr + j[:, None] * C + c[None, :], mask=(j < C)[:, None] & (c < C)[None, :], other=0.0)
        s += tl.sum(w.to(tl.float32) * mean[None, :], 1)
        tl.store(mean_ptr + image * C + c, mean, mask=(c < C) & (block == 0))
    tl.store(s_ptr + image * C + j, s, mask=j < C)


@triton.jit
def feed_forward(
    y,
    exists,
    eps,
    w4_ptr,
    b4_ptr,
    w5_ptr,
    b5_ptr,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr,
):
    """y + conv5(gate(conv4(norm(y)))) for pixels y float32 [BM, K], BH hidden channels at a time.

    w4 [K, 2K], b4 [2K], w5 [K, K], b5 [K], folded.
    """
    dtype: tl.constexpr = w4_ptr.dtype.element_ty
    cols = tl.arange(0, K)
    normed, _ = normalise(y, exists, eps, C)
    normed = normed.to(dtype)
    y += tl.load(b5_ptr + cols)[None, :]
    for k in range(0, C, BH):
        n = k + tl.arange(0, BH)
        column = cols[:, None] * (2 * K) + n[None, :]
        a = tl.dot(normed, tl.load(w4_ptr + column), input_precision=PRECISION) + tl.load(b4_ptr + n)[None, :]
        b = tl.dot(normed, tl.load(w4_ptr + K + column), input_precision=PRECISION) + tl.load(b4_ptr + K + n)[None, :]
        w5 = tl.load(w5_ptr + n[:, None] * K + cols[None, :])
        y = tl.dot((a * b).to(dtype), w5, y, input_precision=PRECISION)
    return y


@triton.jit(do_not_specialize=["HW", "parts"])
def _result(
    x_ptr,
    g_ptr,
    s_ptr,
    pool_ptr,
    sca_ptr,
    sca_bias_ptr,
    mean_ptr,
    w3_ptr,
    b3_ptr,
    w4_ptr,
    b4_ptr,
    w5_ptr,
    b5_ptr,
    y_ptr,
    HW,
    parts,
    scale,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    ATTEND: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """result = y + conv5(gate(conv4(norm(y)))), y = x + conv3(g * s): a program takes BM pixels of one image through.

    x, g [N, HW, C]; s float32 [N, C]; w3, w5 [K, K]; w4 [K, 2K]; b3, b5 [K]; b4 [2K] -> y [N, HW, C].
    ATTEND: the program makes s itself, BH channels at a time, from pool float32 [N, parts, C], sca [C, C] and
    sca_bias [C], as `_attention` does; it writes mean float32 [N, C].
    """
    tiles = tl.cdiv(HW, BM)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BM
    m = tl.arange(0, BM)
    cols = tl.arange(0, K)
    hid = tl.arange(0, BH)
    inside = (first + m < HW)[:, None]
    exists = cols < C
    mask = inside & exists[None, :]
    base = (image * HW + first) * C
    offsets = m[:, None] * C + cols[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) + tl.load(b3_ptr + cols)[None, :]
    mean = tl.zeros((K,), tl.float32)
    if ATTEND:
        for p in range(0, parts, 16):
            part = p + tl.arange(0, 16)
            there = (part < parts)[:, None] & exists[None, :]
            line = pool_ptr + (image * parts + part[:, None]) * C + cols[None, :]
            mean += tl.sum(tl.load(line, mask=there, other=0.0), 0)
        mean *= scale
        tl.store(mean_ptr + image * C + cols, mean, mask=exists & (tl.program_id(0) % tiles == 0))
    for k in range(0, C, BH):
        n = k + hid
        g = tl.load(g_ptr + base + (m[:, None] * C + n[None, :]), mask=inside & (n < C)[None, :], other=0.0)
        if ATTEND:
            there = (n < C)[:, None] & exists[None, :]
            w = tl.load(sca_ptr + n[:, None] * C + cols[None, :], mask=there, other=0.0).to(tl.float32)
            s = tl.sum(w * mean[None, :], 1) + tl.load(sca_bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)
        else:
            s = tl.load(s_ptr + image * C + n, mask=n < C, other=0.0)
        g = (g.to(tl.float32) * s[None, :]).to(dtype)
        y = tl.dot(g, tl.load(w3_ptr + n[:, None] * K + cols[None, :]), y, input_precision=PRECISION)
    y = feed_forward(y, exists, eps, w4_ptr, b4_ptr, w5_ptr, b5_ptr, C, K, PRECISION, BH)
    tl.store(y_ptr + base + offsets, y.to(dtype), mask=mask)


def make_hidden(rows: Tensor, weight: Tensor, bias: Tensor, eps: float, config: Config | None = None) -> Tensor:
    """norm(rows) @ weight + bias, the norm without affine: [..., C] -> [..., 2C]; weight [K, 2K], bias [2K].

    hidden = make_hidden(rows, folded.conv1, folded.conv1_bias, eps)
    """
    channels = rows.shape[-1]
    config = config or configs.lookup("naf_block.hidden", channels, rows, pixels_of(rows))
    if config is None:
        matrix = trim(weight, channels)
        return F.layer_norm(rows, (channels,), eps=eps) @ matrix + trim(bias, channels).to(rows.dtype)
    out = rows.new_empty((*rows.shape[:-1], 2 * channels))
    pixels = out[..., 0].numel()
    config = {"SPLIT": 1, **fitting(config, len(weight))}
    _hidden[(triton.cdiv(pixels, config["BM"]) * config["SPLIT"],)](
        rows, weight, bias, out, pixels, eps, C=channels, K=len(weight), PRECISION=products.precision(rows), **config
    )
    return out


def make_gated(rows: Tensor, p: FoldedParams, eps: float, config: Config) -> tuple[Tensor, Tensor]:
    """gate(conv2(conv1(norm1(rows)))) [N, H, W, C] and partial sums for its mean [N, parts, C], in one launch.

    gated, pool = make_gated(rows, folded, eps, config)
    """
    images, height, width, channels = rows.shape
    config = fitting(config, len(p.conv1))
    strip = depthwise_gate.strip_rows(height, 7)
    parts = triton.cdiv(height, strip) * triton.cdiv(width, config["BW"])
    gated = torch.empty_like(rows)
    pool = torch.empty((images, parts, channels), dtype=torch.float32, device=rows.device)
    grid = (images * parts * triton.cdiv(channels, config["BH"]),)
    _gated[grid](
        rows, p.conv1, p.conv1_bias, p.taps, p.conv2_bias, gated, pool, height, width, strip, eps,
        C=channels, K=len(p.conv1), PRECISION=products.precision(rows), **config,
    )  # fmt: skip
    return gated, pool


def make_attention(pool: Tensor, p: FoldedParams, pixels: int, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Partial sums [N, parts, C] -> their mean over that many pixels and the attention, float32 [N, C].

    mean, scale = make_attention(pool, folded, height * width)
    """
    images, parts, channels = pool.shape
    config = config or configs.require("naf_block.attention", channels, pool)
    mean, scale = torch.empty((2, images, channels), dtype=torch.float32, device=pool.device)
    grid = (images * triton.cdiv(channels, config["BJ"]),)
    _attention[grid](pool, p.sca, p.sca_bias, mean, scale, parts, 1 / pixels, C=channels, **config)
    return mean, scale


def make_result(
    rows: Tensor,
    gated: Tensor,
    scale: Tensor,
    p: FoldedParams,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """y = rows + conv3(gated * scale); y + conv5(gate(conv4(norm2(y)))), in one launch: [N, H, W, C].

    result = make_result(rows, gated, scale, folded, eps)
    """
    channels = rows.shape[-1]
    config = config or configs.lookup("naf_block.result", channels, rows, pixels_of(rows))
    if config is None:
        y, _, hidden = result_by_products(rows, gated, scale, p, eps)
        first, second = hidden.chunk(2, -1)
        return y + (first * second) @ trim(p.conv5, channels) + trim(p.conv5_bias, channels).to(rows.dtype)
    return _launch_result(rows, gated, scale, None, None, p, eps, config)


def attend(
    rows: Tensor, gated: Tensor, pool: Tensor, p: FoldedParams, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`make_attention` and `make_result` -> the block's result and the mean, float32 [N, C].

    One launch where the configuration has each program make the attention itself, which pays for small images.
    """
    pixels = rows.shape[1] * rows.shape[2]
    config = config or configs.lookup("naf_block.result", rows.shape[-1], rows, pixels_of(rows))
    if config is None or not config.get("ATTEND"):
        mean, scale = make_attention(pool, p, pixels)
        return make_result(rows, gated, scale, p, eps, config), mean
    mean = torch.empty((rows.shape[0], rows.shape[-1]), dtype=torch.float32, device=rows.device)
    return _launch_result(rows, gated, None, pool, mean, p, eps, config), mean


def _launch_result(
    rows: Tensor,
    gated: Tensor,
    scale: Tensor | None,
    pool: Tensor | None,
    mean: Tensor | None,
    p: FoldedParams,
    eps: float,
    config: Config,
) -> Tensor:
    images, height, width, channels = rows.shape
    out, pixels, padded = torch.empty_like(rows), height * width, len(p.conv3)
    config = fitting(config, padded) | {"ATTEND": int(scale is None)}
    _result[(images * triton.cdiv(pixels, config["BM"]),)](
        rows, gated, p.sca_bias if scale is None else scale, rows if pool is None else pool, p.sca, p.sca_bias,
        rows if mean is None else mean, p.conv3, p.conv3_bias, p.conv4, p.conv4_bias, p.conv5, p.conv5_bias, out,
        pixels, 0 if pool is None else pool.shape[1], 1 / pixels, eps,
        C=channels, K=padded, PRECISION=products.precision(rows), **config,
    )  # fmt: skip
    return out


def pixels_of(rows: Tensor) -> int:
    """N * H * W of [N, H, W, C]."""
    return rows.shape[:-1].numel()


def result_by_products(
    rows: Tensor, gated: Tensor, scale: Tensor, p: FoldedParams, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, norm(y) and conv4(norm(y)) by PyTorch, where no configuration fits (float32 or more than 1024 channels)."""
    channels = rows.shape[-1]
    attended = gated * scale[:, None, None].to(rows.dtype)
    y = rows + attended @ trim(p.conv3, channels) + trim(p.conv3_bias, channels).to(rows.dtype)
    normed = F.layer_norm(y, (channels,), eps=eps)
    return y, normed, normed @ trim(p.conv4, channels) + trim(p.conv4_bias, channels).to(rows.dtype)


def _forward(rows: Tensor, p: FoldedParams, eps: float) -> tuple[Tensor, Tensor]:
    fused = configs.lookup("naf_block.gated", rows.shape[-1], rows, pixels_of(rows))
    if fused:
        gated, pool = make_gated(rows, p, eps, fused)
    else:
        gated, pool = depthwise_gate.on_rows(make_hidden(rows, p.conv1, p.conv1_bias, eps), p.taps, p.conv2_bias)
    return attend(rows, gated, pool, p, eps)


def forward(x: Tensor, params: NAFBlockParams | FoldedParams, eps: float) -> Tensor:
    """x [N, C, H, W] -> the block's result like x; parameters as they are, or folded for the dtype of x."""
    folded = params if isinstance(params, FoldedParams) else fold(params, x.dtype)
    if not len(x):
        return torch.empty_like(x)
    with torch.cuda.device_of(x):
        return as_images(_forward(as_rows(x), folded, eps)[0], x)


def forward_training(x: Tensor, params: NAFBlockParams, eps: float) -> tuple[Tensor, Tensor]:
    """As `forward`, and what backward needs besides x: the mean of the gated features, float32 [N, C]."""
    if not len(x):
        return torch.empty_like(x), x.new_empty((0, x.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        y, mean = _forward(as_rows(x), fold(params, x.dtype), eps)
        return as_images(y, x), mean
