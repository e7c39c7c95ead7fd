"""naf_block, backward: it keeps x and the mean of gated [N, C], and computes the rest again.

`hidden` and `gated` are those of the forward. `result_backward` does in one launch what is local to a pixel: all after
the attention. Two walks of depthwise_gate and `hidden_backward` do the rest. Gradients of weights are products of two
written activations over all pixels; cuBLAS makes them. In float32, where FMA units and not memory are the bound,
PyTorch's products do the other matrix work too.
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
from r2r_kernels.triton import configs, depthwise_gate, products
from r2r_kernels.triton.configs import Config
from r2r_kernels.triton.naf_block.fold import FoldedParams, fitting, fold, trim, unfold
from r2r_kernels.triton.naf_block.forward import make_hidden, normalise, pixels_of, result_by_products

# What a sweep may try, by kernel.
CANDIDATES: dict[str, list[Config]] = {
    "result_backward": [
        {"BM": bm, "BH": bh, "num_warps": warps, "num_stages": stages}
        for bm, bh, warps in ((16, 16, 8), (32, 16, 8), (32, 32, 8), (64, 32, 4), (64, 32, 8))
        for stages in (2, 3)
    ],
    "hidden_backward": [
        {"BM": bm, "BH": bh, "num_warps": warps, "num_stages": stages}
        for bm, bh, warps in ((16, 32, 8), (32, 32, 8), (64, 32, 4), (64, 32, 8), (128, 32, 8))
        for stages in (2, 3, 4)
    ],
}


@triton.jit(do_not_specialize=["HW"])
def _result_backward(
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
    """A program recomputes y, norm(y), conv4 and the gate of BM pixels and takes dz, the result's gradient, back.

    dz, x, g [N, HW, C]; s float32 [N, C]; w3, w5 [K, K]; w4 [K, 2K]; b3 [K]; b4 [2K] -> gradients dy of y, da of g * s
    [N, HW, C], dh of conv4's output [N, HW, 2C]; normed, gate [N, HW, C], which the weights' gradients are products of;
    sums float32 [programs, 4, C], over the program's pixels, of dy, of dh (two rows) and of dz.
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
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 4 * C
    y = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) + tl.load(b3_ptr + cols)[None, :]
    for k in range(0, C, BH):
        n = k + hid
        g = tl.load(g_ptr + base + (m[:, None] * C + n[None, :]), mask=inside & (n < C)[None, :], other=0.0)
        s = tl.load(s_ptr + image * C + n, mask=n < C, other=0.0)
        g = (g.to(tl.float32) * s[None, :]).to(dtype)
        y = tl.dot(g, tl.load(w3_ptr + n[:, None] * K + cols[None, :]), y, input_precision=PRECISION)
    wide, rstd = normalise(y, exists, eps, C)
    normed = wide.to(dtype)
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
        tl.store(gate_ptr + base + (m[:, None] * C + n[None, :]), (a * b).to(dtype), mask=there)
        dha = dq * b
        dhb = dq * a
        out = dh_ptr + 2 * base + (m[:, None] * 2 * C + n[None, :])
        tl.store(sums + C + n, tl.sum(dha, 0), mask=n < C)
        tl.store(sums + 2 * C + n, tl.sum(dhb, 0), mask=n < C)
        tl.store(out, dha.to(dtype), mask=there)
        tl.store(out + C, dhb.to(dtype), mask=there)
        dn = tl.dot(dha.to(dtype), tl.trans(w4a), dn, input_precision=PRECISION)
        dn = tl.dot(dhb.to(dtype), tl.trans(w4b), dn, input_precision=PRECISION)
    level = tl.sum(dn, 1) / C
    along = tl.sum(dn * normed.to(tl.float32), 1) / C
    dz_wide = dz.to(tl.float32)
    dy = dz_wide + (dn - level[:, None] - normed.to(tl.float32) * along[:, None]) * rstd[:, None]
    dy = tl.where(mask, dy, 0.0)
    tl.store(sums + cols, tl.sum(dy, 0), mask=exists)
    tl.store(sums + 3 * C + cols, tl.sum(dz_wide, 0), mask=exists)
    rounded = dy.to(dtype)
    tl.store(dy_ptr + base + offsets, rounded, mask=mask)
    for k in range(0, C, BH):
        n = k + hid
        w3 = tl.load(w3_ptr + n[:, None] * K + cols[None, :])
        da = tl.dot(rounded, tl.trans(w3), input_precision=PRECISION)
        tl.store(da_ptr + base + (m[:, None] * C + n[None, :]), da.to(dtype), mask=inside & (n < C)[None, :])


@triton.jit(do_not_specialize=["pixels"])
def _hidden_backward(
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
    """dx = dy + the gradient of norm(x) @ w for dh: a program takes BM pixels.

    dh [pixels, 2C]; x, dy [pixels, C]; w [K, 2K] -> dx, normed = norm(x) [pixels, C]; sums float32 [programs, 2C] of dh
    over the program's pixels, for the bias.
    """
    first = tl.program_id(0).to(tl.int64) * BM
    m = tl.arange(0, BM)
    cols = tl.arange(0, K)
    hid = tl.arange(0, BH)
    inside = (first + m < pixels)[:, None]
    exists = cols < C
    mask = inside & exists[None, :]
    offsets = m[:, None] * C + cols[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
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
    normed, rstd = normalise(x, exists, eps, C)
    tl.store(normed_ptr + first * C + offsets, normed.to(dtype), mask=mask)
    level = tl.sum(dn, 1) / C
    along = tl.sum(dn * normed, 1) / C
    dy = tl.load(dy_ptr + first * C + offsets, mask=mask, other=0.0).to(tl.float32)
    dx = dy + (dn - level[:, None] - normed * along[:, None]) * rstd[:, None]
    tl.store(dx_ptr + first * C + offsets, dx.to(dtype), mask=mask)


class ResultGrads(NamedTuple):
    """What `result_backward` writes: gradients, and the activations that meet them in the gradients of weights.

    [N, H, W, C]: dy, of y; dattended, of gated * scale; normed = norm(y); gate = gate(conv4(normed)).
    [N, H, W, 2C]: dhidden, of conv4's output.
    float32 [4, C]: sums over all pixels of dy, of dhidden (two rows) and of dz.
    """

    dy: Tensor
    dattended: Tensor
    normed: Tensor
    gate: Tensor
    dhidden: Tensor
    sums: Tensor


def result_backward(
    dz: Tensor,
    rows: Tensor,
    gated: Tensor,
    scale: Tensor,
    p: FoldedParams,
    eps: float,
    config: Config | None = None,
) -> ResultGrads:
    """Backward of `make_result`, recomputed from its inputs, for the gradient dz [N, H, W, C] of its result.

    grads = result_backward(dz, rows, gated, scale, folded, eps)
    """
    images, height, width, channels = rows.shape
    config = config or configs.lookup("naf_block.result_backward", channels, rows, pixels_of(rows))
    if config is None:
        y, normed, hidden = result_by_products(rows, gated, scale, p, eps)
        first, second = hidden.chunk(2, -1)
        dgate = dz @ trim(p.conv5, channels).t()
        dhidden = torch.cat((dgate * second, dgate * first), -1)
        dnormed = (dhidden @ trim(p.conv4, channels).t()).float()
        dy = (dz.float() + _layer_norm_backward(dnormed, normed.float(), y.float(), eps)).to(rows.dtype)
        sums = torch.cat([t.float().sum((0, 1, 2)) for t in (dy, dhidden, dz)]).view(4, channels)
        return ResultGrads(dy, dy @ trim(p.conv3, channels).t(), normed, first * second, dhidden, sums)
    config = fitting(config, len(p.conv3))
    dy, dattended, normed, gate = (torch.empty_like(rows) for _ in range(4))
    dhidden = rows.new_empty((images, height, width, 2 * channels))
    pixels = height * width
    programs = images * triton.cdiv(pixels, config["BM"])
    partial = torch.empty((programs, 4, channels), dtype=torch.float32, device=rows.device)
    _result_backward[(programs,)](
        dz, rows, gated, scale, p.conv3, p.conv3_bias, p.conv4, p.conv4_bias, p.conv5,
        dy, dattended, normed, gate, dhidden, partial, pixels, eps,
        C=channels, K=len(p.conv3), PRECISION=products.precision(rows), **config,
    )  # fmt: skip
    return ResultGrads(dy, dattended, normed, gate, dhidden, partial.sum(0))


def hidden_backward(
    dhidden: Tensor, rows: Tensor, dy: Tensor, weight: Tensor, eps: float, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `make_hidden` -> the gradient of rows with dy added, norm(rows), float32 sums of dhidden [2C].

    drows, normed, dbias = hidden_backward(dhidden, rows, dy, folded.conv1, eps)
    """
    channels = rows.shape[-1]
    config = config or configs.lookup("naf_block.hidden_backward", channels, rows, pixels_of(rows))
    if config is None:
        normed = F.layer_norm(rows, (channels,), eps=eps)
        dnormed = (dhidden @ trim(weight, channels).t()).float()
        dx = dy.float() + _layer_norm_backward(dnormed, normed.float(), rows.float(), eps)
        return dx.to(rows.dtype), normed, dhidden.float().sum((0, 1, 2))
    config = fitting(config, len(weight))
    dx, normed = torch.empty_like(rows), torch.empty_like(rows)
    pixels = rows[..., 0].numel()
    programs = triton.cdiv(pixels, config["BM"])
    partial = torch.empty((programs, 2 * channels), dtype=torch.float32, device=rows.device)
    _hidden_backward[(programs,)](
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
        PRECISION=products.precision(rows),
        **config,
    )
    return dx, normed, partial.sum(0)


def _layer_norm_backward(dnormed: Tensor, normed: Tensor, wide: Tensor, eps: float) -> Tensor:
    # The gradient of `wide`, float32 [..., C], for the gradient of its norm.
    rstd = torch.rsqrt(wide.var(-1, unbiased=False, keepdim=True) + eps)
    along = (dnormed * normed).mean(-1, keepdim=True)
    return (dnormed - dnormed.mean(-1, keepdim=True) - normed * along) * rstd


def backward(dy: Tensor, x: Tensor, saved: Tensor, params: NAFBlockParams, eps: float) -> tuple[Tensor, NAFBlockParams]:
    """-> dx like x, and the gradients of the parameters, each like its parameter."""
    if not len(x):
        return torch.empty_like(x), NAFBlockParams(*(torch.zeros_like(t) for t in params))
    with torch.cuda.device_of(x):
        drows, grads = _backward(as_rows(dy), as_rows(x), saved, fold(params, x.dtype), eps)
        return as_images(drows, x), unfold(grads, params)


def _backward(dz: Tensor, rows: Tensor, mean: Tensor, p: FoldedParams, eps: float) -> tuple[Tensor, FoldedParams]:
    _, height, width, channels = rows.shape
    hidden = make_hidden(rows, p.conv1, p.conv1_bias, eps)
    gated, _ = depthwise_gate.on_rows(hidden, p.taps, p.conv2_bias)
    sca = p.sca.float()
    scale = torch.addmm(p.sca_bias.float(), mean, sca.t())
    found = result_backward(dz, rows, gated, scale, p, eps)
    dconv5 = products.product(found.gate.view(1, -1, channels), dz.view(1, -1, channels))[0]
    dconv4 = products.product(found.normed.view(1, -1, channels), found.dhidden.view(1, -1, 2 * channels))[0]
    # The attention scales conv3's input image by image: one product an image gives both its gradient and conv3's.
    meeting = products.product(gated.flatten(1, 2), found.dy.flatten(1, 2))
    dscale = (meeting * trim(p.conv3, channels).float()).sum(2)
    dhidden, dtaps, dconv2_bias = depthwise_gate.backward_on_rows(
        found.dattended, scale, dscale @ sca / (height * width), hidden, p.taps, p.conv2_bias
    )
    drows, normed, dconv1_bias = hidden_backward(dhidden, rows, found.dy, p.conv1, eps)
    return drows, FoldedParams(
        conv1=products.product(normed.view(1, -1, channels), dhidden.view(1, -1, 2 * channels))[0],
        conv1_bias=dconv1_bias,
        taps=dtaps,
        conv2_bias=dconv2_bias,
        sca=dscale.t() @ mean,
        sca_bias=dscale.sum(0),
        conv3=(meeting * scale[:, :, None]).sum(0),
        conv3_bias=found.sums[0],
        conv4=dconv4,
        conv4_bias=found.sums[1:3].flatten(),
        conv5=dconv5,
        conv5_bias=found.sums[3],
    )
