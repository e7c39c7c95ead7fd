"""naf_block: a whole NAF block in three launches up to 64 channels, in four above (float32: four).

On rows [N, H, W, C]; the affine of both norms, beta and gamma are folded into the convolutions (`fold`).

1. `_first_half`: g = gate(depthwise3x3(conv1(norm(x)))), and partial sums of g. A program walks down a strip, computes
   conv1 of each row at the three columns that a tap needs (no tensor of 2C channels in memory) and slides three rows of
   the convolution through registers. Above 64 channels `_norm_conv` and depthwise_gate's kernel do it in two launches.
2. `_attention`: the mean of g from the partial sums, in their order, times the attention's matrix.
3. `_second_half`: y = x + conv3(g * s), result = y + conv5(gate(conv4(norm(y)))); y stays in registers.

Training keeps x and the mean of g, and backward recomputes the rest: conv1 and g as above; `_second_half_backward`
does everything of the second half that is local to a pixel; depthwise_gate's two walks; `_norm_conv_backward`. Weight
gradients are products of two written activations over all pixels, left to cuBLAS. In float32, where FMA units and not
memory are the bound, PyTorch's products do the backward's matrix work too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import as_images, as_rows
from r2r_kernels.reference import NAFBlockParams
from r2r_kernels.triton import configs, depthwise_gate
from r2r_kernels.triton.configs import Config
from r2r_kernels.triton.products import precision, product

# What a sweep may try, by kernel. Of the first half, configurations above 64 channels too: the default leaves those to
# `norm_conv` and `depthwise_gate`, which do less arithmetic (docs/kernels/gpu.md). Two stages fetch nothing ahead.
CANDIDATES: dict[str, list[Config]] = {
    "first_half": [
        {"BW": bw, "BH": bh, "num_warps": warps, "num_stages": 2}
        for bw, bh, warps in ((32, 16, 4), (64, 16, 4), (64, 16, 8), (64, 32, 8), (128, 16, 8))
    ],
    "norm_conv": [
        {"BM": bm, "BN": bn, "SPLIT": split, "num_warps": warps, "num_stages": 3}
        for bm, bn, warps in ((16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 32, 8), (64, 64, 4), (128, 64, 8))
        for split in (1, 2, 8)
    ],
    "attention": [{"BJ": bj, "BC": 64, "BP": 16, "num_warps": warps} for bj, warps in ((32, 4), (64, 4), (64, 8))],
    "second_half": [
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
    "second_half_backward": [
        {"BM": bm, "BH": bh, "num_warps": warps, "num_stages": stages}
        for bm, bh, warps in ((16, 16, 8), (32, 16, 8), (32, 32, 8), (64, 32, 4), (64, 32, 8))
        for stages in (2, 3)
    ],
    "norm_conv_backward": [
        {"BM": bm, "BH": bh, "num_warps": warps, "num_stages": stages}
        for bm, bh, warps in ((16, 32, 8), (32, 32, 8), (64, 32, 4), (64, 32, 8), (128, 32, 8))
        for stages in (2, 3, 4)
    ],
    "fold": [{"BJ": bj, "BC": bc, "num_warps": 4} for bj in (8, 16, 32) for bc in (64, 128, 256)],
    "unfold": [{"BC": bc, "BJ": bj, "num_warps": 4} for bc in (8, 16, 32) for bj in (32, 64, 128)],
}


class FoldedParams(NamedTuple):
    """A block's parameters as the kernels read them: the affine of both norms, beta and gamma folded into the
    neighbouring convolutions, matrices as [in, out], padded with zeros to K = a power of two >= max(C, 16) channels.

    conv1, conv4 [K, 2K] (the gate's halves from column 0 and from column K); taps [9, 2K]; conv3,
    conv5 [K, K]; sca [C, C], as it is, [out, in]. Matrices are of the dtype of the activations, the rest float32.
    """

    conv1: Tensor
    conv1_bias: Tensor
    taps: Tensor
    conv2_bias: Tensor
    sca: Tensor
    sca_bias: Tensor
    conv3: Tensor
    conv3_bias: Tensor
    conv4: Tensor
    conv4_bias: Tensor
    conv5: Tensor
    conv5_bias: Tensor


def fold(params: NAFBlockParams, dtype: torch.dtype) -> FoldedParams:
    """Fold and pad the parameters of a block for activations of that dtype: one launch, sums in float32."""
    p = NAFBlockParams(*(t.contiguous() for t in params))
    channels = len(p.norm1_weight)
    padded = max(16, triton.next_power_of_2(channels))
    square, device = padded * padded, p.conv1_weight.device
    matrices = torch.empty(6 * square, dtype=dtype, device=device).split([2 * square, square, 2 * square, square])
    vectors = torch.empty(26 * padded, dtype=torch.float32, device=device)
    bias1, taps, bias2, bias3, bias4, bias5 = vectors.split([n * padded for n in (2, 18, 2, 1, 2, 1)])
    folded = FoldedParams(
        conv1=matrices[0].view(padded, -1),
        conv1_bias=bias1,
        taps=taps.view(9, -1),
        conv2_bias=bias2,
        sca=p.sca_weight.flatten(1),
        sca_bias=p.sca_bias,
        conv3=matrices[1].view(padded, -1),
        conv3_bias=bias3,
        conv4=matrices[2].view(padded, -1),
        conv4_bias=bias4,
        conv5=matrices[3].view(padded, -1),
        conv5_bias=bias5,
    )
    config = _fitting(configs.require("naf_block.fold", channels, matrices[0]), padded)
    with torch.cuda.device_of(matrices[0]):
        _fold[(triton.cdiv(padded, config["BJ"]), 7)](
            p.norm1_weight, p.norm1_bias, p.conv1_weight, p.conv1_bias, folded.conv1, folded.conv1_bias,
            p.conv2_weight, p.conv2_bias, folded.taps, folded.conv2_bias,
            p.conv3_weight, p.conv3_bias, p.beta, folded.conv3, folded.conv3_bias,
            p.norm2_weight, p.norm2_bias, p.conv4_weight, p.conv4_bias, folded.conv4, folded.conv4_bias,
            p.conv5_weight, p.conv5_bias, p.gamma, folded.conv5, folded.conv5_bias,
            C=channels, K=padded, **config,
        )  # fmt: skip
    return folded


def unfold(grads: FoldedParams, params: NAFBlockParams) -> NAFBlockParams:
    """The gradients of a block's parameters from float32 gradients of the folded ones (not padded: K = C).

    Two launches; sums in float32.
    """
    p = NAFBlockParams(*(t.contiguous() for t in params))
    g = FoldedParams(*(t.contiguous() for t in grads))
    found = NAFBlockParams(*(torch.empty_like(t) for t in p))
    channels = len(p.norm1_weight)
    config = configs.require("naf_block.unfold", channels, p.conv1_weight)
    with torch.cuda.device_of(p.conv1_weight):
        programs = triton.cdiv(channels, config["BC"])
        _unfold_norms[(programs, 2)](
            g.conv1, g.conv1_bias, p.norm1_weight, p.norm1_bias, p.conv1_weight,
            found.norm1_weight, found.norm1_bias, found.conv1_weight, found.conv1_bias,
            g.conv4, g.conv4_bias, p.norm2_weight, p.norm2_bias, p.conv4_weight,
            found.norm2_weight, found.norm2_bias, found.conv4_weight, found.conv4_bias,
            C=channels, **config,
        )  # fmt: skip
        _unfold[(programs, 3)](
            g.taps, g.conv2_bias, found.conv2_weight, found.conv2_bias,
            g.sca, g.sca_bias, found.sca_weight, found.sca_bias,
            g.conv3, g.conv3_bias, p.conv3_weight, p.conv3_bias, p.beta,
            found.conv3_weight, found.conv3_bias, found.beta,
            g.conv5, g.conv5_bias, p.conv5_weight, p.conv5_bias, p.gamma,
            found.conv5_weight, found.conv5_bias, found.gamma,
            C=channels, **config,
        )  # fmt: skip
    return found


@triton.jit
def _fold_widening(
    norm_ptr, shift_ptr, w_ptr, b_ptr, out_ptr, bias_ptr, half, j, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr
):
    # conv(norm * weight + bias): scale the columns of w [2C, C], transpose to [K, 2K]; b + w @ bias
    row = half * C + j
    bias = tl.load(b_ptr + row, mask=j < C, other=0.0).to(tl.float32)
    for first in range(0, K, BC):
        c = first + tl.arange(0, BC)
        mask = (j < C)[:, None] & (c < C)[None, :]
        w = tl.load(w_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        bias += tl.sum(w * shift[None, :], 1)
        out = out_ptr + c[None, :] * (2 * K) + (half * K + j)[:, None]
        tl.store(out, (w * norm[None, :]).to(out_ptr.dtype.element_ty))
    tl.store(bias_ptr + half * K + j, bias)


@triton.jit
def _fold_square(w_ptr, b_ptr, scale_ptr, out_ptr, bias_ptr, j, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    # conv * scale: scale the rows of w [C, C], transpose to [K, K]
    scale = tl.load(scale_ptr + j, mask=j < C, other=0.0).to(tl.float32)
    tl.store(bias_ptr + j, tl.load(b_ptr + j, mask=j < C, other=0.0).to(tl.float32) * scale)
    for first in range(0, K, BC):
        c = first + tl.arange(0, BC)
        mask = (j < C)[:, None] & (c < C)[None, :]
        w = tl.load(w_ptr + j[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + c[None, :] * K + j[:, None], (w * scale[:, None]).to(out_ptr.dtype.element_ty))


@triton.jit
def _fold(
    norm1_ptr,
    shift1_ptr,
    w1_ptr,
    b1_ptr,
    out1_ptr,
    bias1_ptr,
    w2_ptr,
    b2_ptr,
    out2_ptr,
    bias2_ptr,
    w3_ptr,
    b3_ptr,
    beta_ptr,
    out3_ptr,
    bias3_ptr,
    norm2_ptr,
    shift2_ptr,
    w4_ptr,
    b4_ptr,
    out4_ptr,
    bias4_ptr,
    w5_ptr,
    b5_ptr,
    gamma_ptr,
    out5_ptr,
    bias5_ptr,
    C: tl.constexpr,
    K: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    # A program takes BJ output channels of one piece: a half of a widening convolution, a square one, or the taps.
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    piece = tl.program_id(1)
    if piece < 2:
        _fold_widening(norm1_ptr, shift1_ptr, w1_ptr, b1_ptr, out1_ptr, bias1_ptr, piece, j, C, K, BC)
    elif piece < 4:
        _fold_widening(norm2_ptr, shift2_ptr, w4_ptr, b4_ptr, out4_ptr, bias4_ptr, piece - 2, j, C, K, BC)
    elif piece == 4:
        _fold_square(w3_ptr, b3_ptr, beta_ptr, out3_ptr, bias3_ptr, j, C, K, BC)
    elif piece == 5:
        _fold_square(w5_ptr, b5_ptr, gamma_ptr, out5_ptr, bias5_ptr, j, C, K, BC)
    else:
        for half in tl.static_range(2):
            row = half * C + j
            tl.store(bias2_ptr + half * K + j, tl.load(b2_ptr + row, mask=j < C, other=0.0).to(tl.float32))
            for tap in tl.static_range(9):
                w = tl.load(w2_ptr + row * 9 + tap, mask=j < C, other=0.0).to(tl.float32)
                tl.store(out2_ptr + tap * 2 * K + half * K + j, w)


@triton.jit
def _unfold_widening(
    grad_ptr, dbias_ptr, norm_ptr, shift_ptr, w_ptr, dnorm_ptr, dshift_ptr, dw_ptr, db_ptr, c,
    C: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    # Of conv(norm * weight + bias), for BC input channels c: the gradients of norm, bias and w; once, that of b.
    norm = tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dnorm = tl.zeros((BC,), tl.float32)
    dshift = tl.zeros((BC,), tl.float32)
    for first in range(0, 2 * C, BJ):
        j = first + tl.arange(0, BJ)
        mask = (j < 2 * C)[:, None] & (c < C)[None, :]
        w = tl.load(w_ptr + j[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + c[None, :] * (2 * C) + j[:, None], mask=mask, other=0.0)
        dbias = tl.load(dbias_ptr + j, mask=j < 2 * C, other=0.0)
        dnorm += tl.sum(grad * w, 0)
        dshift += tl.sum(dbias[:, None] * w, 0)
        dw = grad * norm[None, :] + dbias[:, None] * shift[None, :]
        tl.store(dw_ptr + j[:, None] * C + c[None, :], dw.to(dw_ptr.dtype.element_ty), mask=mask)
        tl.store(db_ptr + j, dbias.to(db_ptr.dtype.element_ty), mask=(j < 2 * C) & (tl.program_id(0) == 0))
    tl.store(dnorm_ptr + c, dnorm.to(dnorm_ptr.dtype.element_ty), mask=c < C)
    tl.store(dshift_ptr + c, dshift.to(dshift_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _unfold_square(
    grad_ptr, dbias_ptr, w_ptr, b_ptr, scale_ptr, dw_ptr, db_ptr, dscale_ptr, j,
    C: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    # Of conv * scale, for BC output channels j: the gradients of w, b and the scale.
    scale = tl.load(scale_ptr + j, mask=j < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + j, mask=j < C, other=0.0).to(tl.float32)
    dbias = tl.load(dbias_ptr + j, mask=j < C, other=0.0)
    dscale = dbias * b
    for first in range(0, C, BJ):
        c = first + tl.arange(0, BJ)
        mask = (j < C)[None, :] & (c < C)[:, None]
        grad = tl.load(grad_ptr + c[:, None] * C + j[None, :], mask=mask, other=0.0)
        w = tl.load(w_ptr + j[None, :] * C + c[:, None], mask=mask, other=0.0).to(tl.float32)
        dscale += tl.sum(grad * w, 0)
        tl.store(dw_ptr + j[None, :] * C + c[:, None], (grad * scale[None, :]).to(dw_ptr.dtype.element_ty), mask=mask)
    tl.store(dscale_ptr + j, dscale.to(dscale_ptr.dtype.element_ty), mask=j < C)
    tl.store(db_ptr + j, (dbias * scale).to(db_ptr.dtype.element_ty), mask=j < C)


@triton.jit
def _unfold_norms(
    conv1_ptr, dbias1_ptr, norm1_ptr, shift1_ptr, w1_ptr, dnorm1_ptr, dshift1_ptr, dw1_ptr, db1_ptr,
    conv4_ptr, dbias4_ptr, norm2_ptr, shift2_ptr, w4_ptr, dnorm2_ptr, dshift2_ptr, dw4_ptr, db4_ptr,
    C: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    # A program takes BC input channels of conv1 or of conv4; sums run over the output channels in their order.
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    if tl.program_id(1) == 0:
        _unfold_widening(
            conv1_ptr, dbias1_ptr, norm1_ptr, shift1_ptr, w1_ptr, dnorm1_ptr, dshift1_ptr, dw1_ptr, db1_ptr,
            c, C, BC, BJ,
        )  # fmt: skip
    else:
        _unfold_widening(
            conv4_ptr, dbias4_ptr, norm2_ptr, shift2_ptr, w4_ptr, dnorm2_ptr, dshift2_ptr, dw4_ptr, db4_ptr,
            c, C, BC, BJ,
        )  # fmt: skip


@triton.jit
def _unfold(
    taps_ptr, dbias2_ptr, dw2_ptr, db2_ptr, sca_ptr, dscale_ptr, dsca_ptr, dsca_bias_ptr,
    conv3_ptr, dbias3_ptr, w3_ptr, b3_ptr, beta_ptr, dw3_ptr, db3_ptr, dbeta_ptr,
    conv5_ptr, dbias5_ptr, w5_ptr, b5_ptr, gamma_ptr, dw5_ptr, db5_ptr, dgamma_ptr,
    C: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    # A program takes BC output channels of conv3 or of conv5, or of what only changes its dtype and order. Apart from
    # the norms' convolutions, as all their addresses do not fit an AMD GPU's scalar registers.
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    piece = tl.program_id(1)
    if piece == 0:
        _unfold_square(
            conv3_ptr, dbias3_ptr, w3_ptr, b3_ptr, beta_ptr, dw3_ptr, db3_ptr, dbeta_ptr, c, C, BC, BJ
        )  # fmt: skip
    elif piece == 1:
        _unfold_square(
            conv5_ptr, dbias5_ptr, w5_ptr, b5_ptr, gamma_ptr, dw5_ptr, db5_ptr, dgamma_ptr, c, C, BC, BJ
        )  # fmt: skip
    else:
        for half in tl.static_range(2):
            row = half * C + c
            bias = tl.load(dbias2_ptr + row, mask=c < C, other=0.0)
            tl.store(db2_ptr + row, bias.to(db2_ptr.dtype.element_ty), mask=c < C)
            for tap in range(9):
                w = tl.load(taps_ptr + tap * 2 * C + row, mask=c < C, other=0.0)
                tl.store(dw2_ptr + row * 9 + tap, w.to(dw2_ptr.dtype.element_ty), mask=c < C)
        bias = tl.load(dscale_ptr + c, mask=c < C, other=0.0)
        tl.store(dsca_bias_ptr + c, bias.to(dsca_bias_ptr.dtype.element_ty), mask=c < C)
        for first in range(0, C, BJ):
            j = first + tl.arange(0, BJ)
            mask = (j < C)[:, None] & (c < C)[None, :]
            at = j[:, None] * C + c[None, :]
            sca = tl.load(sca_ptr + at, mask=mask, other=0.0)
            tl.store(dsca_ptr + at, sca.to(dsca_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalise(x, exists, eps, C: tl.constexpr):
    # float32 [pixels, K], zero where no channel exists -> normalised, and 1 / standard deviation
    mean = tl.sum(x, 1) / C
    centred = tl.where(exists[None, :], x - mean[:, None], 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _first_half(
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
    # gate(conv2(conv1(norm(x)))) of a strip of BW columns, BH gate channels, row by row
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
            normed, _ = _normalise(x, exists, eps, C)
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


@triton.jit(do_not_specialize=["pixels"])
def _norm_conv(
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
    # y [pixels, 2C] = norm(x) @ w + b: a program takes BM pixels, and one of SPLIT shares of the columns.
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
    normed, _ = _normalise(x, exists, eps, C)
    normed = normed.to(x_ptr.dtype.element_ty)
    for block in range(begin, tl.minimum(begin + share, blocks)):
        half = block // (blocks // 2)
        n = block % (blocks // 2) * BN + tl.arange(0, BN)
        w = tl.load(w_ptr + cols[:, None] * (2 * K) + (half * K + n)[None, :])
        y = tl.dot(normed, w, input_precision=PRECISION) + tl.load(b_ptr + half * K + n)[None, :]
        out = y_ptr + first * 2 * C + (m[:, None] * 2 * C + (half * C + n)[None, :])
        tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside & (n < C)[None, :])


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
    # mean = scale * the sum of an image's parts, in their order; s = w @ mean + b
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
def _feed_forward(
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
    # y + conv5(gate(conv4(norm(y)))) for pixels y [BM, K] in float32, BH hidden channels at a time.
    half: tl.constexpr = w4_ptr.dtype.element_ty
    cols = tl.arange(0, K)
    normed, _ = _normalise(y, exists, eps, C)
    normed = normed.to(half)
    y += tl.load(b5_ptr + cols)[None, :]
    for k in range(0, C, BH):
        n = k + tl.arange(0, BH)
        column = cols[:, None] * (2 * K) + n[None, :]
        a = tl.dot(normed, tl.load(w4_ptr + column), input_precision=PRECISION) + tl.load(b4_ptr + n)[None, :]
        b = tl.dot(normed, tl.load(w4_ptr + K + column), input_precision=PRECISION) + tl.load(b4_ptr + K + n)[None, :]
        w5 = tl.load(w5_ptr + n[:, None] * K + cols[None, :])
        y = tl.dot((a * b).to(half), w5, y, input_precision=PRECISION)
    return y


@triton.jit(do_not_specialize=["HW", "parts"])
def _second_half(
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
    # y = x + conv3(g * s), out = y + conv5(gate(conv4(norm(y)))): a program takes BM pixels of one image through.
    # ATTEND: it makes s itself, BH channels at a time, from the partial sums of g, as `_attention` does.
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
    half: tl.constexpr = x_ptr.dtype.element_ty
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
        g = (g.to(tl.float32) * s[None, :]).to(half)
        y = tl.dot(g, tl.load(w3_ptr + n[:, None] * K + cols[None, :]), y, input_precision=PRECISION)
    y = _feed_forward(y, exists, eps, w4_ptr, b4_ptr, w5_ptr, b5_ptr, C, K, PRECISION, BH)
    tl.store(y_ptr + base + offsets, y.to(half), mask=mask)


@triton.jit(do_not_specialize=["HW"])
def _second_half_backward(
    dz_ptr,
    x_ptr,
    g_ptr,
    s_ptr,
    w3_ptr,
    b3_ptr,
    w4_ptr,
    b4_ptr,
    w5_ptr,
    dy_ptr,
    da_ptr,
    normed_ptr,
    gate_ptr,
    dh_ptr,
    sums_ptr,
    HW,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    # Recomputes y, norm(y), conv4 and the gate of BM pixels; from dz, the gradient of the block's result, the gradients
    # dy of y, da of g * s, dh of conv4's output. Writes these and what the weights' gradients are products of.
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
    half: tl.constexpr = x_ptr.dtype.element_ty
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 4 * C
    y = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) + tl.load(b3_ptr + cols)[None, :]
    for k in range(0, C, BH):
        n = k + hid
        g = tl.load(g_ptr + base + (m[:, None] * C + n[None, :]), mask=inside & (n < C)[None, :], other=0.0)
        s = tl.load(s_ptr + image * C + n, mask=n < C, other=0.0)
        g = (g.to(tl.float32) * s[None, :]).to(half)
        y = tl.dot(g, tl.load(w3_ptr + n[:, None] * K + cols[None, :]), y, input_precision=PRECISION)
    wide, rstd = _normalise(y, exists, eps, C)
    normed = wide.to(half)
    tl.store(normed_ptr + base + offsets, normed, mask=mask)
    dz = tl.load(dz_ptr + base + offsets, mask=mask, other=0.0)
    dn = tl.zeros((BM, K), tl.float32)
    for k in range(0, C, BH):
        n = k + hid
        column = cols[:, None] * (2 * K) + n[None, :]
        w4a = tl.load(w4_ptr + column)
        w4b = tl.load(w4_ptr + K + column)
        a = tl.dot(normed, w4a, input_precision=PRECISION) + tl.load(b4_ptr + n)[None, :]
        b = tl.dot(normed, w4b, input_precision=PRECISION) + tl.load(b4_ptr + K + n)[None, :]
        w5 = tl.load(w5_ptr + n[:, None] * K + cols[None, :])
        dq = tl.dot(dz, tl.trans(w5), input_precision=PRECISION)
        there = inside & (n < C)[None, :]
        tl.store(gate_ptr + base + (m[:, None] * C + n[None, :]), (a * b).to(half), mask=there)
        dha = dq * b
        dhb = dq * a
        out = dh_ptr + 2 * base + (m[:, None] * 2 * C + n[None, :])
        tl.store(sums + C + n, tl.sum(dha, 0), mask=n < C)
        tl.store(sums + 2 * C + n, tl.sum(dhb, 0), mask=n < C)
        tl.store(out, dha.to(half), mask=there)
        tl.store(out + C, dhb.to(half), mask=there)
        dn = tl.dot(dha.to(half), tl.trans(w4a), dn, input_precision=PRECISION)
        dn = tl.dot(dhb.to(half), tl.trans(w4b), dn, input_precision=PRECISION)
    level = tl.sum(dn, 1) / C
    along = tl.sum(dn * normed.to(tl.float32), 1) / C
    dz_wide = dz.to(tl.float32)
    dy = dz_wide + (dn - level[:, None] - normed.to(tl.float32) * along[:, None]) * rstd[:, None]
    dy = tl.where(mask, dy, 0.0)
    tl.store(sums + cols, tl.sum(dy, 0), mask=exists)
    tl.store(sums + 3 * C + cols, tl.sum(dz_wide, 0), mask=exists)
    rounded = dy.to(half)
    tl.store(dy_ptr + base + offsets, rounded, mask=mask)
    for k in range(0, C, BH):
        n = k + hid
        w3 = tl.load(w3_ptr + n[:, None] * K + cols[None, :])
        da = tl.dot(rounded, tl.trans(w3), input_precision=PRECISION)
        tl.store(da_ptr + base + (m[:, None] * C + n[None, :]), da.to(half), mask=inside & (n < C)[None, :])


@triton.jit(do_not_specialize=["pixels"])
def _norm_conv_backward(
    dh_ptr,
    x_ptr,
    dy_ptr,
    w_ptr,
    dx_ptr,
    normed_ptr,
    sums_ptr,
    pixels,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    # dx = dy + the gradient of norm(x) @ w for dh; also norm(x), and the sums of dh for the bias.
    first = tl.program_id(0).to(tl.int64) * BM
    m = tl.arange(0, BM)
    cols = tl.arange(0, K)
    hid = tl.arange(0, BH)
    inside = (first + m < pixels)[:, None]
    exists = cols < C
    mask = inside & exists[None, :]
    offsets = m[:, None] * C + cols[None, :]
    half: tl.constexpr = x_ptr.dtype.element_ty
    dn = tl.zeros((BM, K), tl.float32)
    for part in tl.static_range(2):
        for k in range(0, C, BH):
            n = k + hid
            line = dh_ptr + first * 2 * C + (m[:, None] * 2 * C + (part * C + n)[None, :])
            dh = tl.load(line, mask=inside & (n < C)[None, :], other=0.0)
            w = tl.load(w_ptr + cols[:, None] * (2 * K) + (part * K + n)[None, :])
            dn = tl.dot(dh, tl.trans(w), dn, input_precision=PRECISION)
            sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + part * C + n
            tl.store(sums, tl.sum(dh.to(tl.float32), 0), mask=n < C)
    x = tl.load(x_ptr + first * C + offsets, mask=mask, other=0.0).to(tl.float32)
    normed, rstd = _normalise(x, exists, eps, C)
    tl.store(normed_ptr + first * C + offsets, normed.to(half), mask=mask)
    level = tl.sum(dn, 1) / C
    along = tl.sum(dn * normed, 1) / C
    dy = tl.load(dy_ptr + first * C + offsets, mask=mask, other=0.0).to(tl.float32)
    dx = dy + (dn - level[:, None] - normed * along[:, None]) * rstd[:, None]
    tl.store(dx_ptr + first * C + offsets, dx.to(half), mask=mask)


def first_half(rows: Tensor, p: FoldedParams, eps: float, config: Config) -> tuple[Tensor, Tensor]:
    """gate(conv2(conv1(norm1(rows)))) [N, H, W, C] and partial sums for its mean [N, parts, C], in one launch."""
    images, height, width, channels = rows.shape
    config = _fitting(config, len(p.conv1))
    strip = depthwise_gate.strip_rows(height, 7)
    parts = triton.cdiv(height, strip) * triton.cdiv(width, config["BW"])
    gated = torch.empty_like(rows)
    pool = torch.empty((images, parts, channels), dtype=torch.float32, device=rows.device)
    grid = (images * parts * triton.cdiv(channels, config["BH"]),)
    _first_half[grid](
        rows, p.conv1, p.conv1_bias, p.taps, p.conv2_bias, gated, pool, height, width, strip, eps,
        C=channels, K=len(p.conv1), PRECISION=precision(rows), **config,
    )  # fmt: skip
    return gated, pool


def norm_conv(rows: Tensor, weight: Tensor, bias: Tensor, eps: float, config: Config | None = None) -> Tensor:
    """norm(rows) @ weight + bias, the norm without affine: [..., C] -> [..., 2C]; weight [K, 2K], bias [2K]."""
    channels = rows.shape[-1]
    config = config or configs.lookup("naf_block.norm_conv", channels, rows, _pixels(rows))
    if config is None:
        matrix = _trim(weight, channels)
        return F.layer_norm(rows, (channels,), eps=eps) @ matrix + _trim(bias, channels).to(rows.dtype)
    out = rows.new_empty((*rows.shape[:-1], 2 * channels))
    pixels = out[..., 0].numel()
    config = {"SPLIT": 1, **_fitting(config, len(weight))}
    _norm_conv[(triton.cdiv(pixels, config["BM"]) * config["SPLIT"],)](
        rows, weight, bias, out, pixels, eps, C=channels, K=len(weight), PRECISION=precision(rows), **config
    )
    return out


def attention(pool: Tensor, p: FoldedParams, pixels: int, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Partial sums [N, parts, C] -> their mean over that many pixels and the attention, float32 [N, C]."""
    images, parts, channels = pool.shape
    config = config or configs.require("naf_block.attention", channels, pool)
    mean, scale = torch.empty((2, images, channels), dtype=torch.float32, device=pool.device)
    grid = (images * triton.cdiv(channels, config["BJ"]),)
    _attention[grid](pool, p.sca, p.sca_bias, mean, scale, parts, 1 / pixels, C=channels, **config)
    return mean, scale


def second_half(
    rows: Tensor,
    gated: Tensor,
    scale: Tensor,
    p: FoldedParams,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """y = rows + conv3(gated * scale); y + conv5(gate(conv4(norm2(y)))), in one launch."""
    channels = rows.shape[-1]
    config = config or configs.lookup("naf_block.second_half", channels, rows, _pixels(rows))
    if config is None:
        y, _, hidden = _second_half_parts(rows, gated, scale, p, eps)
        first, second = hidden.chunk(2, -1)
        return y + (first * second) @ _trim(p.conv5, channels) + _trim(p.conv5_bias, channels).to(rows.dtype)
    return _launch_second_half(rows, gated, scale, None, None, p, eps, config)


def attend(
    rows: Tensor, gated: Tensor, pool: Tensor, p: FoldedParams, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` and `second_half` -> the block's result and the mean, float32 [N, C]. One launch where the
    configuration has each program make the attention itself, which pays for small images."""
    pixels = rows.shape[1] * rows.shape[2]
    config = config or configs.lookup("naf_block.second_half", rows.shape[-1], rows, _pixels(rows))
    if config is None or not config.get("ATTEND"):
        mean, scale = attention(pool, p, pixels)
        return second_half(rows, gated, scale, p, eps, config), mean
    mean = torch.empty((rows.shape[0], rows.shape[-1]), dtype=torch.float32, device=rows.device)
    return _launch_second_half(rows, gated, None, pool, mean, p, eps, config), mean


def _launch_second_half(
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
    config = _fitting(config, padded) | {"ATTEND": int(scale is None)}
    _second_half[(images * triton.cdiv(pixels, config["BM"]),)](
        rows, gated, p.sca_bias if scale is None else scale, rows if pool is None else pool, p.sca, p.sca_bias,
        rows if mean is None else mean, p.conv3, p.conv3_bias, p.conv4, p.conv4_bias, p.conv5, p.conv5_bias, out,
        pixels, 0 if pool is None else pool.shape[1], 1 / pixels, eps,
        C=channels, K=padded, PRECISION=precision(rows), **config,
    )  # fmt: skip
    return out


def _pixels(rows: Tensor) -> int:
    return rows.shape[:-1].numel()


def _fitting(config: Config, padded: int) -> Config:
    # No wider tiles of columns than the padded matrices have: what lies beyond would be read.
    return {key: min(value, padded) if key in ("BN", "BH", "BJ", "BC") else value for key, value in config.items()}


def _trim(folded: Tensor, channels: int) -> Tensor:
    # A folded matrix or bias without its padding: [K, K] -> [C, C], [K, 2K] -> [C, 2C], [K] -> [C], [2K] -> [2C].
    padded = max(16, triton.next_power_of_2(channels))
    trimmed = folded.unflatten(-1, (-1, padded))[..., :channels].flatten(-2)
    return trimmed[:channels] if trimmed.dim() == 2 else trimmed


def _second_half_parts(
    rows: Tensor, gated: Tensor, scale: Tensor, p: FoldedParams, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # y, norm(y) and conv4(norm(y)) by PyTorch, where no configuration fits (float32 or more than 1024 channels).
    channels = rows.shape[-1]
    attended = gated * scale[:, None, None].to(rows.dtype)
    y = rows + attended @ _trim(p.conv3, channels) + _trim(p.conv3_bias, channels).to(rows.dtype)
    normed = F.layer_norm(y, (channels,), eps=eps)
    return y, normed, normed @ _trim(p.conv4, channels) + _trim(p.conv4_bias, channels).to(rows.dtype)


def _layer_norm_backward(dnormed: Tensor, normed: Tensor, wide: Tensor, eps: float) -> Tensor:
    # The gradient of `wide`, float32 [..., C], for the gradient of its norm.
    rstd = torch.rsqrt(wide.var(-1, unbiased=False, keepdim=True) + eps)
    along = (dnormed * normed).mean(-1, keepdim=True)
    return (dnormed - dnormed.mean(-1, keepdim=True) - normed * along) * rstd


class SecondHalfGrads(NamedTuple):
    """Gradients through the second half, like [N, H, W, C], and the activations that meet them in weight gradients:
    of y, of gated * scale, norm(y), gate(conv4), of conv4's output [N, H, W, 2C]; float32 sums over all pixels of dy,
    of dhidden (two rows) and of dz: [4, C]."""

    dy: Tensor
    dattended: Tensor
    normed: Tensor
    gate: Tensor
    dhidden: Tensor
    sums: Tensor


def second_half_backward(
    dz: Tensor,
    rows: Tensor,
    gated: Tensor,
    scale: Tensor,
    p: FoldedParams,
    eps: float,
    config: Config | None = None,
) -> SecondHalfGrads:
    """Backward of `second_half`, recomputed from its inputs, for the gradient dz of its result."""
    images, height, width, channels = rows.shape
    config = config or configs.lookup("naf_block.second_half_backward", channels, rows, _pixels(rows))
    if config is None:
        y, normed, hidden = _second_half_parts(rows, gated, scale, p, eps)
        first, second = hidden.chunk(2, -1)
        dgate = dz @ _trim(p.conv5, channels).t()
        dhidden = torch.cat((dgate * second, dgate * first), -1)
        dnormed = (dhidden @ _trim(p.conv4, channels).t()).float()
        dy = (dz.float() + _layer_norm_backward(dnormed, normed.float(), y.float(), eps)).to(rows.dtype)
        sums = torch.cat([t.float().sum((0, 1, 2)) for t in (dy, dhidden, dz)]).view(4, channels)
        return SecondHalfGrads(dy, dy @ _trim(p.conv3, channels).t(), normed, first * second, dhidden, sums)
    config = _fitting(config, len(p.conv3))
    dy, dattended, normed, gate = (torch.empty_like(rows) for _ in range(4))
    dhidden = rows.new_empty((images, height, width, 2 * channels))
    pixels = height * width
    programs = images * triton.cdiv(pixels, config["BM"])
    partial = torch.empty((programs, 4, channels), dtype=torch.float32, device=rows.device)
    _second_half_backward[(programs,)](
        dz, rows, gated, scale, p.conv3, p.conv3_bias, p.conv4, p.conv4_bias, p.conv5,
        dy, dattended, normed, gate, dhidden, partial, pixels, eps,
        C=channels, K=len(p.conv3), PRECISION=precision(rows), **config,
    )  # fmt: skip
    return SecondHalfGrads(dy, dattended, normed, gate, dhidden, partial.sum(0))


def norm_conv_backward(
    dhidden: Tensor, rows: Tensor, dy: Tensor, weight: Tensor, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `norm_conv` -> the gradient of rows with dy added, norm(rows), float32 sums of dhidden [2C]."""
    channels = rows.shape[-1]
    config = config or configs.lookup("naf_block.norm_conv_backward", channels, rows, _pixels(rows))
    if config is None:
        normed = F.layer_norm(rows, (channels,), eps=eps)
        dnormed = (dhidden @ _trim(weight, channels).t()).float()
        dx = dy.float() + _layer_norm_backward(dnormed, normed.float(), rows.float(), eps)
        return dx.to(rows.dtype), normed, dhidden.float().sum((0, 1, 2))
    config = _fitting(config, len(weight))
    dx, normed = torch.empty_like(rows), torch.empty_like(rows)
    pixels = rows[..., 0].numel()
    programs = triton.cdiv(pixels, config["BM"])
    partial = torch.empty((programs, 2 * channels), dtype=torch.float32, device=rows.device)
    _norm_conv_backward[(programs,)](
        dhidden,
        rows,
        dy,
        weight,
        dx,
        normed,
        partial,
        pixels,
        eps,
        C=channels,
        K=len(weight),
        PRECISION=precision(rows),
        **config,
    )
    return dx, normed, partial.sum(0)


def _forward(rows: Tensor, p: FoldedParams, eps: float) -> tuple[Tensor, Tensor]:
    fused = configs.lookup("naf_block.first_half", rows.shape[-1], rows, _pixels(rows))
    if fused:
        gated, pool = first_half(rows, p, eps, fused)
    else:
        gated, pool = depthwise_gate.on_rows(norm_conv(rows, p.conv1, p.conv1_bias, eps), p.taps, p.conv2_bias)
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


def backward(dy: Tensor, x: Tensor, saved: Tensor, params: NAFBlockParams, eps: float) -> tuple[Tensor, NAFBlockParams]:
    """-> dx like x, and the gradients of the parameters, each like its parameter."""
    if not len(x):
        return torch.empty_like(x), NAFBlockParams(*(torch.zeros_like(t) for t in params))
    with torch.cuda.device_of(x):
        drows, grads = _backward(as_rows(dy), as_rows(x), saved, fold(params, x.dtype), eps)
        return as_images(drows, x), unfold(grads, params)


def _backward(dz: Tensor, rows: Tensor, mean: Tensor, p: FoldedParams, eps: float) -> tuple[Tensor, FoldedParams]:
    _, height, width, channels = rows.shape
    hidden = norm_conv(rows, p.conv1, p.conv1_bias, eps)
    gated, _ = depthwise_gate.on_rows(hidden, p.taps, p.conv2_bias)
    sca = p.sca.float()
    scale = torch.addmm(p.sca_bias.float(), mean, sca.t())
    second = second_half_backward(dz, rows, gated, scale, p, eps)
    dconv5 = product(second.gate.view(1, -1, channels), dz.view(1, -1, channels))[0]
    dconv4 = product(second.normed.view(1, -1, channels), second.dhidden.view(1, -1, 2 * channels))[0]
    # The attention scales conv3's input image by image: one product an image gives both its gradient and conv3's.
    meeting = product(gated.flatten(1, 2), second.dy.flatten(1, 2))
    dscale = (meeting * _trim(p.conv3, channels).float()).sum(2)
    dhidden, dtaps, dconv2_bias = depthwise_gate.backward_on_rows(
        second.dattended, scale, dscale @ sca / (height * width), hidden, p.taps, p.conv2_bias
    )
    drows, normed, dconv1_bias = norm_conv_backward(dhidden, rows, second.dy, p.conv1, eps)
    return drows, FoldedParams(
        conv1=product(normed.view(1, -1, channels), dhidden.view(1, -1, 2 * channels))[0],
        conv1_bias=dconv1_bias,
        taps=dtaps,
        conv2_bias=dconv2_bias,
        sca=dscale.t() @ mean,
        sca_bias=dscale.sum(0),
        conv3=(meeting * scale[:, :, None]).sum(0),
        conv3_bias=second.sums[0],
        conv4=dconv4,
        conv4_bias=second.sums[1:3].flatten(),
        conv5=dconv5,
        conv5_bias=second.sums[3],
    )
