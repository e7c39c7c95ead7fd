"""slot_conv: depthwise (k, 3, 3) convolution along the slots, a weight for each task and channel.

x is [T, S, C * h * w]: a program takes BE neighbouring elements, whole or broken channels alike, of BO slots, and adds
k * 9 shifted tiles; they overlap, so that x comes from memory once and from the L1 after. dx is the same walk over dy,
with the weight turned round and k - 1 slots of zeros before. dweight: a program of its own for each task, channel and
slot of the kernel walks over all slots of dy and x, and keeps nine sums in registers; nothing is added across programs,
so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_kernels.triton import configs
from r2r_kernels.triton.configs import Config

CANDIDATES: dict[str, list[Config]] = {
    "forward": [
        {"BO": bo, "BE": be, "num_warps": warps}
        for bo, be, warps in ((4, 128, 2), (4, 256, 4), (8, 128, 4), (8, 256, 4))
    ],
    "weight_gradient": [{"BO": bo, "num_warps": warps} for bo, warps in ((4, 1), (8, 1), (8, 2), (16, 4))],
}


@triton.jit(do_not_specialize=["slots_in", "slots_out", "channels", "H", "W", "area"])
def _along(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    slots_in,
    slots_out,
    channels,
    H,
    W,
    area,
    line,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    BO: tl.constexpr,
    BE: tl.constexpr,
):
    """y = x convolved with weight along the slots, + bias: a program takes BO slots and BE neighbours of [C, h, w].

    x [T, slots_in, C, h, w], weight [T, C, K, 3, 3], bias [T, C] -> y [T, slots_out, C, h, w];
    area = h * w, line = C * area. BACKWARD: x is dy, y is dx, the weight is flipped and the bias is not read.
    """
    blocks = tl.cdiv(line, BE)
    groups = tl.cdiv(slots_out, BO)
    e = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)
    o = (tl.program_id(0) // blocks % groups) * BO + tl.arange(0, BO)
    task = (tl.program_id(0) // blocks // groups).to(tl.int64)
    exists = e < line
    row = e % area // W
    column = e % W
    weight_ptr += (task * channels + e // area) * (K * 9)
    x_ptr += task * slots_in * line
    total = tl.zeros((BO, BE), tl.float32)
    for j in range(K):
        # Backward, slot s of dx is reached from slot s - j of dy; its taps are turned round.
        s = o - j if BACKWARD else o + j
        here = (s >= 0) & (s < slots_in)
        for tap in tl.static_range(9):
            down = (1 - tap // 3) if BACKWARD else (tap // 3 - 1)
            across = (1 - tap % 3) if BACKWARD else (tap % 3 - 1)
            inside = exists & (row + down >= 0) & (row + down < H) & (column + across >= 0) & (column + across < W)
            offsets = s[:, None].to(tl.int64) * line + (e + down * W + across)[None, :]
            x = tl.load(x_ptr + offsets, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + j * 9 + tap, mask=exists, other=0.0).to(tl.float32)
            total += x * weight[None, :]
    if not BACKWARD:
        total += tl.load(bias_ptr + task * channels + e // area, mask=exists, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + (task * slots_out + o[:, None]) * line + e[None, :]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=(o < slots_out)[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["slots_in", "slots_out", "channels", "H", "W"])
def _weight_gradient(
    dy_ptr,
    x_ptr,
    dweight_ptr,
    slots_in,
    slots_out,
    channels,
    H,
    W,
    area,
    line,
    K: tl.constexpr,
    BO: tl.constexpr,
    BP: tl.constexpr,
):
    """dweight of one slot of the kernel, one channel and one task, in one program.

    dy [T, slots_out, C, h, w], x [T, slots_in, C, h, w] -> dweight float32 [T, C, K, 3, 3].
    """
    # area = H * W and line = channels * area come from the host, where they cannot overflow.
    j = tl.program_id(0) % K
    channel = tl.program_id(0) // K % channels
    task = (tl.program_id(0) // K // channels).to(tl.int64)
    dy_ptr += (task * slots_out * channels + channel) * area
    x_ptr += ((task * slots_in + j) * channels + channel) * area
    zero = tl.zeros((BO, BP), tl.float32)
    d0 = zero
    d1 = zero
    d2 = zero
    d3 = zero
    d4 = zero
    d5 = zero
    d6 = zero
    d7 = zero
    d8 = zero
    for first in range(0, area, BP):
        p = first + tl.arange(0, BP)
        row = p // W
        column = p % W
        for slot in range(0, slots_out, BO):
            o = slot + tl.arange(0, BO)
            here = (o < slots_out)[:, None] & (p < area)[None, :]
            base = o[:, None].to(tl.int64) * line + p[None, :]
            dy = tl.load(dy_ptr + base, mask=here, other=0.0).to(tl.float32)
            above = here & (row > 0)[None, :]
            below = here & (row < H - 1)[None, :]
            left = (column > 0)[None, :]
            right = (column < W - 1)[None, :]
            d0 += dy * tl.load(x_ptr + base - W - 1, mask=above & left, other=0.0).to(tl.float32)
            d1 += dy * tl.load(x_ptr + base - W, mask=above, other=0.0).to(tl.float32)
            d2 += dy * tl.load(x_ptr + base - W + 1, mask=above & right, other=0.0).to(tl.float32)
            d3 += dy * tl.load(x_ptr + base - 1, mask=here & left, other=0.0).to(tl.float32)
            d4 += dy * tl.load(x_ptr + base, mask=here, other=0.0).to(tl.float32)
            d5 += dy * tl.load(x_ptr + base + 1, mask=here & right, other=0.0).to(tl.float32)
            d6 += dy * tl.load(x_ptr + base + W - 1, mask=below & left, other=0.0).to(tl.float32)
            d7 += dy * tl.load(x_ptr + base + W, mask=below, other=0.0).to(tl.float32)
            d8 += dy * tl.load(x_ptr + base + W + 1, mask=below & right, other=0.0).to(tl.float32)
    out = dweight_ptr + ((task * channels + channel) * K + j) * 9
    tl.store(out, tl.sum(d0))
    tl.store(out + 1, tl.sum(d1))
    tl.store(out + 2, tl.sum(d2))
    tl.store(out + 3, tl.sum(d3))
    tl.store(out + 4, tl.sum(d4))
    tl.store(out + 5, tl.sum(d5))
    tl.store(out + 6, tl.sum(d6))
    tl.store(out + 7, tl.sum(d7))
    tl.store(out + 8, tl.sum(d8))


def _launch(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, back: bool, config: Config) -> None:
    tasks, slots, channels, height, width = x.shape
    line = channels * height * width
    grid = (tasks * triton.cdiv(y.shape[1], config["BO"]) * triton.cdiv(line, config["BE"]),)
    if y.numel():
        with torch.cuda.device_of(x):
            _along[grid](
                x, weight, bias, y, slots, y.shape[1], channels, height, width, height * width, line,
                K=weight.shape[2], BACKWARD=back, **config,
            )  # fmt: skip


def forward(x: Tensor, weight: Tensor, bias: Tensor, config: Config | None = None) -> Tensor:
    """x [T, S, C, h, w], weight [T, C, k, 3, 3], bias [T, C], all contiguous -> [T, S - k + 1, C, h, w]."""
    config = config or configs.require("slot_conv.forward", x.shape[2], x)
    y = x.new_empty((x.shape[0], x.shape[1] - weight.shape[2] + 1, *x.shape[2:]))
    _launch(x, weight, bias, y, False, config)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, config: Config | None = None, config_weight: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx like x, dweight like weight, dbias [T, C] of the dtype of weight; all tensors contiguous."""
    tasks, slots, channels, height, width = x.shape
    config = config or configs.require("slot_conv.forward", channels, x)
    config_weight = config_weight or configs.require("slot_conv.weight_gradient", channels, x)
    dx = torch.empty_like(x)
    _launch(dy, weight, weight, dx, True, config)
    dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    kernel = weight.shape[2]
    block = min(64, triton.next_power_of_2(max(1, height * width)))
    if weight.numel():
        with torch.cuda.device_of(x):
            _weight_gradient[(tasks * channels * kernel,)](
                dy, x, dweight, slots, dy.shape[1], channels, height, width, height * width, channels * height * width,
                K=kernel, BP=block, **config_weight,
            )  # fmt: skip
    dbias = dy.sum((1, 3, 4), dtype=torch.float32)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
