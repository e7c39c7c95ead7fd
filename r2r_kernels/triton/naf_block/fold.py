"""naf_block, parameters: `fold` before the forward, `unfold` of the gradients after the backward.

`fold` multiplies the affine of both norms, beta and gamma into the convolutions beside them. Sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.reference import NAFBlockParams
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

# What a sweep may try, by kernel.
CANDIDATES: dict[str, list[Config]] = {
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
    padded = padded_channels(channels)
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
    config = fitting(configs.require("naf_block.fold", channels, matrices[0]), padded)
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


def padded_channels(channels: int) -> int:
    """K, the number of channels to which `fold` pads: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(channels))


def fitting(config: Config, padded: int) -> Config:
    """The configuration with tiles of columns no wider than the padded matrices: beyond these nothing may be read."""
    return {key: min(value, padded) if key in ("BN", "BH", "BJ", "BC") else value for key, value in config.items()}


def trim(folded: Tensor, channels: int) -> Tensor:
    """A folded matrix or bias without its padding: [K, K] -> [C, C], [K, 2K] -> [C, 2C], [K] -> [C], [2K] -> [2C]."""
    trimmed = folded.unflatten(-1, (-1, padded_channels(channels)))[..., :channels].flatten(-2)
    return trimmed[:channels] if trimmed.dim() == 2 else trimmed


@triton.jit
def fold_widening(
    norm_ptr, shift_ptr, w_ptr, b_ptr, out_ptr, bias_ptr, half, j, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr
):
    """Of one half of the gate's channels, fold conv(norm * weight + bias) for output channels j.

    norm, shift [C], the norm's weight and bias; w [2C, C], b [2C], the convolution's -> out [K, 2K], w with its columns
    scaled, transposed; bias float32 [2K], b + w @ shift.
    """
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
def fold_square(w_ptr, b_ptr, scale_ptr, out_ptr, bias_ptr, j, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    """Fold conv * scale for output channels j: w [C, C], b, scale [C] -> out [K, K], transposed; bias float32 [K]."""
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
    """A program folds BJ output channels of one piece: half of a widening convolution, a square one, or the taps.

    norm1, shift1, norm2, shift2, beta, gamma [C]; w1, w4 [2C, C]; w2 [2C, 9]; w3, w5 [C, C]; b1, b2, b4 [2C];
    b3, b5 [C] -> out1, out4 [K, 2K]; out2 [9, 2K]; out3, out5 [K, K]; bias1, bias2, bias4 [2K]; bias3, bias5 [K].
    """
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    piece = tl.program_id(1)
    if piece < 2:
        fold_widening(norm1_ptr, shift1_ptr, w1_ptr, b1_ptr, out1_ptr, bias1_ptr, piece, j, C, K, BC)
    elif piece < 4:
        fold_widening(norm2_ptr, shift2_ptr, w4_ptr, b4_ptr, out4_ptr, bias4_ptr, piece - 2, j, C, K, BC)
    elif piece == 4:
        fold_square(w3_ptr, b3_ptr, beta_ptr, out3_ptr, bias3_ptr, j, C, K, BC)
    elif piece == 5:
        fold_square(w5_ptr, b5_ptr, gamma_ptr, out5_ptr, bias5_ptr, j, C, K, BC)
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
    """The gradients through conv(norm * weight + bias), for BC input channels c.

    grad [C, 2C], dbias [2C], gradients of what `fold_widening` wrote; norm, shift [C], w [2C, C] -> dnorm, dshift [C],
    dw [2C, C], db [2C]; the first program alone writes db.
    """
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
    """The gradients through conv * scale, for BC output channels j.

    grad [C, C], dbias [C], gradients of what `fold_square` wrote; w [C, C], b, scale [C] -> dw [C, C], db, dscale [C].
    """
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
    """A program takes BC input channels of conv1 or of conv4; sums run over the output channels in their order.

    Shapes as in `_unfold_widening`: conv1, conv4 [C, 2C] and dbias1, dbias4 [2C] are its grad and dbias.
    """
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
    """A program takes BC output channels of conv3, of conv5, or of what only changes its dtype and order.

    taps [9, 2C], dbias2 [2C] -> dw2 [2C, 9], db2 [2C]; sca [C, C], dscale [C] -> dsca [C, C], dsca_bias [C]; the others
    as in `_unfold_square`. `_unfold_norms` is apart: all addresses together do not fit an AMD GPU's scalar registers.
    """
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
