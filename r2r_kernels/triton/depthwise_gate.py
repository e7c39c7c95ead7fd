"""depthwise_gate: 3x3 depthwise convolution, SimpleGate and the spatial mean of the result, in one pass.

On rows [N, H, W, C]. A program takes a strip of BW columns and BH gate channels (so 2 BH channels of x) and walks down
`rows` rows. Each row of x is loaded once for each of the three taps across (the second and third come from the L1) and
added to the three output rows that it touches, which slide through registers: x is read from memory once, but for the
two rows above and below a strip, and the gated C channels are written once. The pooled sum of each program is stored
on its own and summed in a fixed order.

Backward is two such walks: `_gate_backward` recomputes the convolution and writes its gradient du (2C);
`_depthwise_backward` walks over du and x together and gives dx, and sums dweight and dbias in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.operators.layout import as_images, as_rows
from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

_STRIPS: list[Config] = [
    {"BW": bw, "BH": bh, "rows": rows, "num_warps": warps}
    for bw, bh, warps in ((8, 32, 2), (16, 32, 4), (32, 32, 8), (8, 64, 4), (16, 64, 8), (16, 16, 2), (32, 16, 4))
    for rows in (4, 7, 16)
]
CANDIDATES = {"forward": _STRIPS, "gate_backward": _STRIPS, "depthwise_backward": _STRIPS}


@triton.jit
def _strip(H, W, rows, HALF: tl.constexpr, BW: tl.constexpr, BH: tl.constexpr):
    # Channel groups vary fastest: programs that run together share rows of memory.
    groups: tl.constexpr = (HALF + BH - 1) // BH
    columns = tl.cdiv(W, BW)
    strips = tl.cdiv(H, rows)
    part = tl.program_id(0) // groups
    hid = (tl.program_id(0) % groups) * BH + tl.arange(0, BH)
    w = (part % columns) * BW + tl.arange(0, BW)
    top = (part // columns) % strips * rows
    image = (part // columns // strips).to(tl.int64)
    return part, image, top, w, hid


@triton.jit
def _taps(w_ptr, hid, exists, stride: tl.constexpr, FLIP: tl.constexpr):
    # The nine taps of some channels as (left, middle, right) for the rows below, at and above the one being read.
    step: tl.constexpr = -stride if FLIP else stride
    w = w_ptr + hid + (8 * stride if FLIP else 0)
    return (
        tl.load(w, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 2 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 3 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 4 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 5 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 6 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 7 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(w + 8 * step, mask=exists, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _row(x_ptr, row, end, w, hid, exists, W, stride: tl.constexpr):
    # One row of x, as it is stored, at the columns left of, at and right of each column of the strip; zero outside of
    # the image and from row `end` on.
    line = x_ptr + row.to(tl.int64) * W * stride
    offsets = w[:, None] * stride + hid[None, :]
    here = (row >= 0) & (row < end)
    left = tl.load(line + (offsets - stride), mask=(here & (w > 0) & (w <= W))[:, None] & exists[None, :], other=0.0)
    middle = tl.load(line + offsets, mask=(here & (w < W))[:, None] & exists[None, :], other=0.0)
    right = tl.load(line + (offsets + stride), mask=(here & (w < W - 1))[:, None] & exists[None, :], other=0.0)
    return left, middle, right


@triton.jit
def _middle(x_ptr, row, top, last, w, hid, exists, W, stride: tl.constexpr):
    # One row of x at the columns of the strip, as it is stored; zero outside of rows top to last - 1.
    mask = ((w < W) & (row >= top) & (row < last))[:, None] & exists[None, :]
    return tl.load(x_ptr + row.to(tl.int64) * W * stride + (w[:, None] * stride + hid[None, :]), mask=mask, other=0.0)


@triton.jit
def _add(prev, cur, left, middle, right, t):
    # The row (left, middle, right) completes the output row above it, continues its own and begins the one below.
    left = left.to(tl.float32)
    middle = middle.to(tl.float32)
    right = right.to(tl.float32)
    prev += left * t[6] + middle * t[7] + right * t[8]
    cur += left * t[3] + middle * t[4] + right * t[5]
    return prev, cur, left * t[0] + middle * t[1] + right * t[2]


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _forward(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    pool_ptr,
    H,
    W,
    rows,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    """gated = gate(depthwise3x3(x)): a program walks down a strip of BW columns for BH gate channels.

    x [N, H, W, 2C], w [9, 2K], b [2K] -> y [N, H, W, C]; pool float32 [N, parts, C], sums of y over each strip.
    HALF = C, WIDE = K: the two halves of the gate begin at 0 and C in x, at 0 and K in w and b.
    """
    part, image, top, w, hid = _strip(H, W, rows, HALF, BW, BH)
    exists = hid < HALF
    x_ptr += image * H * W * 2 * HALF
    y_ptr += image * H * W * HALF
    ta = _taps(w_ptr, hid, exists, 2 * WIDE, False)
    tb = _taps(w_ptr + WIDE, hid, exists, 2 * WIDE, False)
    ba = tl.load(b_ptr + hid, mask=exists, other=0.0).to(tl.float32)[None, :]
    bb = tl.load(b_ptr + WIDE + hid, mask=exists, other=0.0).to(tl.float32)[None, :]
    prev_a = tl.zeros((BW, BH), tl.float32)
    prev_b = tl.zeros((BW, BH), tl.float32)
    cur_a = tl.zeros((BW, BH), tl.float32)
    cur_b = tl.zeros((BW, BH), tl.float32)
    pooled = tl.zeros((BW, BH), tl.float32)
    end = tl.minimum(H, top + rows + 1)
    al, am, ar = _row(x_ptr, top - 1, end, w, hid, exists, W, 2 * HALF)
    bl, bm, br = _row(x_ptr + HALF, top - 1, end, w, hid, exists, W, 2 * HALF)
    # Three rows a turn: after three the sliding rows are in their first registers again, and nothing is moved. The next
    # row is loaded before this one is worked on, so that a warp has two rows under way.
    for i in range(0, rows + 2, 3):
        for k in tl.static_range(3):
            row = top + i + k - 1
            a0, a1, a2 = _row(x_ptr, row + 1, end, w, hid, exists, W, 2 * HALF)
            b0, b1, b2 = _row(x_ptr + HALF, row + 1, end, w, hid, exists, W, 2 * HALF)
            prev_a, cur_a, next_a = _add(prev_a, cur_a, al, am, ar, ta)
            prev_b, cur_b, next_b = _add(prev_b, cur_b, bl, bm, br, tb)
            al, am, ar = a0, a1, a2
            bl, bm, br = b0, b1, b2
            done = row - 1
            inside = (w < W) & (done >= top) & (done < tl.minimum(top + rows, H))
            gated = tl.where(inside[:, None], (prev_a + ba) * (prev_b + bb), 0.0)
            out = y_ptr + done.to(tl.int64) * W * HALF + (w[:, None] * HALF + hid[None, :])
            tl.store(out, gated.to(y_ptr.dtype.element_ty), mask=inside[:, None] & exists[None, :])
            pooled += gated
            prev_a = cur_a
            prev_b = cur_b
            cur_a = next_a
            cur_b = next_b
    tl.store(pool_ptr + part.to(tl.int64) * HALF + hid, tl.sum(pooled, 0), mask=exists)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gate_backward(
    dy_ptr,
    scale_ptr,
    shift_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    du_ptr,
    H,
    W,
    rows,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    """du = (g * b, g * a), the gradient of the convolution (a, b), where g = dy * scale + shift is that of a * b.

    dy [N, H, W, C]; scale, shift float32 [N, C]; x [N, H, W, 2C]; w [9, 2K]; b [2K] -> du [N, H, W, 2C].
    """
    _, image, top, w, hid = _strip(H, W, rows, HALF, BW, BH)
    exists = hid < HALF
    x_ptr += image * H * W * 2 * HALF
    du_ptr += image * H * W * 2 * HALF
    dy_ptr += image * H * W * HALF
    scale = tl.load(scale_ptr + image * HALF + hid, mask=exists, other=0.0)[None, :]
    shift = tl.load(shift_ptr + image * HALF + hid, mask=exists, other=0.0)[None, :]
    ta = _taps(w_ptr, hid, exists, 2 * WIDE, False)
    tb = _taps(w_ptr + WIDE, hid, exists, 2 * WIDE, False)
    ba = tl.load(b_ptr + hid, mask=exists, other=0.0).to(tl.float32)[None, :]
    bb = tl.load(b_ptr + WIDE + hid, mask=exists, other=0.0).to(tl.float32)[None, :]
    prev_a = tl.zeros((BW, BH), tl.float32)
    prev_b = tl.zeros((BW, BH), tl.float32)
    cur_a = tl.zeros((BW, BH), tl.float32)
    cur_b = tl.zeros((BW, BH), tl.float32)
    end = tl.minimum(H, top + rows + 1)
    al, am, ar = _row(x_ptr, top - 1, end, w, hid, exists, W, 2 * HALF)
    bl, bm, br = _row(x_ptr + HALF, top - 1, end, w, hid, exists, W, 2 * HALF)
    for i in range(0, rows + 2, 3):
        for k in tl.static_range(3):
            row = top + i + k - 1
            a0, a1, a2 = _row(x_ptr, row + 1, end, w, hid, exists, W, 2 * HALF)
            b0, b1, b2 = _row(x_ptr + HALF, row + 1, end, w, hid, exists, W, 2 * HALF)
            prev_a, cur_a, next_a = _add(prev_a, cur_a, al, am, ar, ta)
            prev_b, cur_b, next_b = _add(prev_b, cur_b, bl, bm, br, tb)
            al, am, ar = a0, a1, a2
            bl, bm, br = b0, b1, b2
            done = row - 1
            inside = (w < W) & (done >= top) & (done < tl.minimum(top + rows, H))
            mask = inside[:, None] & exists[None, :]
            line = done.to(tl.int64) * W * HALF
            dy = tl.load(dy_ptr + line + (w[:, None] * HALF + hid[None, :]), mask=mask, other=0.0).to(tl.float32)
            g = dy * scale + shift
            du = du_ptr + 2 * line + (w[:, None] * 2 * HALF + hid[None, :])
            tl.store(du, (g * (prev_b + bb)).to(du_ptr.dtype.element_ty), mask=mask)
            tl.store(du + HALF, (g * (prev_a + ba)).to(du_ptr.dtype.element_ty), mask=mask)
            prev_a = cur_a
            prev_b = cur_b
            cur_a = next_a
            cur_b = next_b


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _depthwise_backward(
    du_ptr,
    x_ptr,
    w_ptr,
    dx_ptr,
    partial_ptr,
    H,
    W,
    rows,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    """dx = du convolved with the flipped taps; the sums over a strip for dweight and dbias.

    du, x [N, H, W, 2C]; w [9, 2K] -> dx [N, H, W, 2C]; partial float32 [N * parts, 10, 2C], nine taps and the bias.
    A row of du meets the row of x below, at and above it. dweight[ky, kx] = sum du[p] x[p + (ky, kx) - 1] is taken at
    x's pixels, so that only du is needed shifted. The two halves of the channels are alike here: program_id(1) is the
    half.
    """
    part, image, top, w, hid = _strip(H, W, rows, HALF, BW, BH)
    exists = hid < HALF
    half = tl.program_id(1)
    first = image * H * W * 2 * HALF + half * HALF
    du_ptr += first
    x_ptr += first
    dx_ptr += first
    t = _taps(w_ptr + half * WIDE, hid, exists, 2 * WIDE, True)
    zero = tl.zeros((BW, BH), tl.float32)
    prev = zero
    cur = zero
    x_prev = zero
    x_cur = zero
    d0 = zero
    d1 = zero
    d2 = zero
    d3 = zero
    d4 = zero
    d5 = zero
    d6 = zero
    d7 = zero
    d8 = zero
    dbias = zero
    # x at rows of this strip only: each pixel of x is counted by one program.
    last = tl.minimum(H, top + rows)
    end = tl.minimum(H, top + rows + 1)
    dl, dm, dr = _row(du_ptr, top - 1, end, w, hid, exists, W, 2 * HALF)
    x_raw = _middle(x_ptr, top, top, last, w, hid, exists, W, 2 * HALF)
    offsets = w[:, None] * 2 * HALF + hid[None, :]
    for i in range(0, rows + 2, 3):
        for k in tl.static_range(3):
            row = top + i + k - 1
            n0, n1, n2 = _row(du_ptr, row + 1, end, w, hid, exists, W, 2 * HALF)
            x_after = _middle(x_ptr, row + 2, top, last, w, hid, exists, W, 2 * HALF)
            x_next = x_raw.to(tl.float32)
            left = dl.to(tl.float32)
            middle = dm.to(tl.float32)
            right = dr.to(tl.float32)
            # x one row below du is its tap ky = 2, x above it ky = 0; du to the right of x is kx = 0.
            d0 += right * x_prev
            d1 += middle * x_prev
            d2 += left * x_prev
            d3 += right * x_cur
            d4 += middle * x_cur
            d5 += left * x_cur
            d6 += right * x_next
            d7 += middle * x_next
            d8 += left * x_next
            dbias += tl.where((row >= top) & (row < top + rows), middle, 0.0)
            prev, cur, after = _add(prev, cur, left, middle, right, t)
            done = row - 1
            inside = (w < W) & (done >= top) & (done < tl.minimum(top + rows, H))
            out = dx_ptr + done.to(tl.int64) * W * 2 * HALF + offsets
            tl.store(out, prev.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & exists[None, :])
            prev = cur
            cur = after
            x_prev = x_cur
            x_cur = x_next
            x_raw = x_after
            dl, dm, dr = n0, n1, n2
    partial = partial_ptr + part.to(tl.int64) * 20 * HALF + half * HALF + hid
    tl.store(partial, tl.sum(d0, 0), mask=exists)
    tl.store(partial + 2 * HALF, tl.sum(d1, 0), mask=exists)
    tl.store(partial + 4 * HALF, tl.sum(d2, 0), mask=exists)
    tl.store(partial + 6 * HALF, tl.sum(d3, 0), mask=exists)
    tl.store(partial + 8 * HALF, tl.sum(d4, 0), mask=exists)
    tl.store(partial + 10 * HALF, tl.sum(d5, 0), mask=exists)
    tl.store(partial + 12 * HALF, tl.sum(d6, 0), mask=exists)
    tl.store(partial + 14 * HALF, tl.sum(d7, 0), mask=exists)
    tl.store(partial + 16 * HALF, tl.sum(d8, 0), mask=exists)
    tl.store(partial + 18 * HALF, tl.sum(dbias, 0), mask=exists)


def strip_rows(height: int, least: int) -> int:
    """Rows of a strip: a 16th of the image but 64 at most, one more than a multiple of 3 (the loop reads two more)."""
    rows = max(least, min(64, height // 16))
    return rows + (1 - rows) % 3


def _strips(shape: torch.Size, config: Config) -> tuple[int, int, dict[str, int]]:
    _, height, width, _ = shape
    rows = strip_rows(height, config["rows"])
    parts = triton.cdiv(height, rows) * triton.cdiv(width, config["BW"])
    return rows, parts, {key: value for key, value in config.items() if key != "rows"}


def on_rows(rows: Tensor, taps: Tensor, bias: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """rows [N, H, W, 2C]; taps [9, 2K] and bias [2K], K >= C, each half from 0 and from K on -> gated [N, H, W, C],
    partial sums for its mean float32 [N, parts, C]."""
    images, height, width, channels = rows.shape
    half = channels // 2
    config = config or configs.require("depthwise_gate.forward", half, rows, images * height * width)
    strip, parts, tiling = _strips(rows.shape, config)
    gated = rows.new_empty((images, height, width, half))
    pool = torch.empty((images, parts, half), dtype=torch.float32, device=rows.device)
    grid = (images * parts * triton.cdiv(half, config["BH"]),)
    if images:
        with torch.cuda.device_of(rows):
            _forward[grid](
                rows, taps, bias, gated, pool, height, width, strip, HALF=half, WIDE=len(bias) // 2, **tiling
            )
    return gated, pool


def backward_on_rows(
    dgated: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor,
    taps: Tensor,
    bias: Tensor,
    config: Config | None = None,
    config_depthwise: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `on_rows` for the gradient dgated * scale + shift of its first result; scale, shift float32 [N, C].

    -> drows, and float32 dtaps [9, 2C] and dbias [2C].
    """
    images, height, width, channels = rows.shape
    half = channels // 2
    wide = len(bias) // 2
    config = config or configs.require("depthwise_gate.gate_backward", half, rows, images * height * width)
    config_depthwise = config_depthwise or configs.require(
        "depthwise_gate.depthwise_backward", half, rows, images * height * width
    )
    du = torch.empty_like(rows)
    drows = torch.empty_like(rows)
    strip, parts, tiling = _strips(rows.shape, config)
    grid = (images * parts * triton.cdiv(half, config["BH"]),)
    if images:
        with torch.cuda.device_of(rows):
            _gate_backward[grid](
                dgated, scale, shift, rows, taps, bias, du, height, width, strip, HALF=half, WIDE=wide, **tiling
            )
    strip, parts, tiling = _strips(rows.shape, config_depthwise)
    programs = images * parts * triton.cdiv(half, config_depthwise["BH"])
    partial = torch.empty((images * parts, 10, channels), dtype=torch.float32, device=rows.device)
    if images:
        with torch.cuda.device_of(rows):
            _depthwise_backward[(programs, 2)](
                du, rows, taps, drows, partial, height, width, strip, HALF=half, WIDE=wide, **tiling
            )
    total = partial.sum(0)
    return drows, total[:9], total[9]


def _as_taps(weight: Tensor) -> Tensor:
    return weight.flatten(1).t().contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """x [N, 2C, H, W], weight [2C, 1, 3, 3], bias [2C] -> gated [N, C, H, W] and its mean [N, C, 1, 1]."""
    gated, pool = on_rows(as_rows(x), _as_taps(weight), bias, config)
    mean = (pool.sum(1) / (x.shape[2] * x.shape[3])).to(x.dtype)
    return as_images(gated, x), mean[:, :, None, None]


def backward(
    dgated: Tensor,
    dmean: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: Config | None = None,
    config_depthwise: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx like x, dweight like weight, dbias like bias."""
    shift = dmean.flatten(1).float() / (x.shape[2] * x.shape[3])
    drows, dtaps, dbias = backward_on_rows(
        as_rows(dgated),
        torch.ones_like(shift),
        shift,
        as_rows(x),
        _as_taps(weight),
        bias,
        config,
        config_depthwise,
    )
    return as_images(drows, x), dtaps.t().reshape(weight.shape).to(weight.dtype), dbias.to(bias.dtype)
