"""What must be done, and what the machine can do: a small analytic model beside measured limits.

`Work` counts bytes that must move (each input read once, each output written once; where an operator cannot start its
second part before the first is whole, what lies between goes out and in) and floating-point operations that must be
done, two for a multiplication and an addition, convolutions and matrix products only: the rule of PyTorch's FLOP
counter, which the formulas registered in `r2r_kernels.operators` follow. `backward=True` counts forward and backward
together; NAF operators compute again what they do not keep.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Work:
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __sub__(self, other: Work) -> Work:
        return Work(self.bytes - other.bytes, self.flops - other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)


# -- operators: x is [n, c, h, w]; itemsize in bytes --------------------------------------------------------------


def layer_norm_2d(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """x in, y out; backward: x and dy in, dx out."""
    passes = 5 if backward else 2
    return Work((passes * n * c * h * w + (6 if backward else 2) * c) * itemsize)


def simple_gate(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """c: channels of x, twice those of the result. x in, y out; backward: x and dy in, dx out."""
    halves = 3 + 5 if backward else 3
    return Work(halves * n * (c // 2) * h * w * itemsize)


def depthwise_gate(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """c: channels of x, twice those of the result. Passes as `simple_gate`; backward convolves once more to have the
    gate's factors, and then for dx and for the weights."""
    halves = 3 + 5 if backward else 3
    parameters = (3 if backward else 1) * 10 * c
    return Work(
        (halves * n * (c // 2) * h * w + parameters) * itemsize, (1 + 3 if backward else 1) * 2 * n * c * h * w * 9
    )


def naf_block(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """Forward, 5 passes: x in, gated features out, and, once their mean is known, both in and the result out.

    Backward, 9 passes: the gated features once more (x in, gated out); the feed-forward branch (x, gated and the
    result's gradient in, the gradient of the branch's input out); once the attention's gradient is known, the attention
    branch (x and that gradient in, dx out). Only the last convolution need not be computed again.
    """
    image, weights = n * c * h * w, 6 * c * c + 32 * c
    forward = Work((5 * image + weights) * itemsize, 2 * n * c * (h * w * (6 * c + 18) + c))
    if not backward:
        return forward
    again = 3 * forward.flops - 2 * n * c * c * h * w
    return forward + Work((9 * image + 2 * weights) * itemsize, again)


def gated_feed_forward(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """x in, y out; backward: x and dy in, dx out, the hidden channels computed again."""
    image, weights = n * c * h * w, 3 * c * c + 6 * c
    forward = Work((2 * image + weights) * itemsize, 6 * image * c)
    return forward + Work((3 * image + 2 * weights) * itemsize, 2 * forward.flops + 4 * image * c) * int(backward)


def conv2d(
    n: int, inputs: int, outputs: int, h: int, w: int, kernel: int, itemsize: int, stride: int = 1,
    backward: bool = False,
) -> Work:  # fmt: skip
    """h, w: of the result."""
    x, y, weights = n * inputs * h * w * stride * stride, n * outputs * h * w, inputs * outputs * kernel * kernel
    forward = Work((x + y + weights) * itemsize, 2 * y * inputs * kernel * kernel)
    return forward + Work(2 * x * itemsize + y * itemsize + 2 * weights * itemsize, 2 * forward.flops) * int(backward)


def upsample_add(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """Sizes of the result. x (half of an image) and skip in, y out; backward: x and dy in, dx out."""
    image, weights = n * c * h * w, 8 * c * c
    forward = Work((5 * image // 2 + weights) * itemsize, 4 * image * c)
    return forward + Work((2 * image + 2 * weights) * itemsize, 2 * forward.flops) * int(backward)


def local_mean_2d(n: int, c: int, h: int, w: int, itemsize: int, backward: bool = False) -> Work:
    """x in, y out; backward: dy in, dx out."""
    return Work((4 if backward else 2) * n * c * h * w * itemsize)


def bank_retrieve(
    n: int, tasks: int, slots: int, key: int, value: int, itemsize: int, chosen: int = 1, backward: bool = False
) -> Work:
    """key, value: elements of one key and of one value. All keys are read, the values of the `chosen` tasks only."""
    keys, values, ends = tasks * slots * key, chosen * slots * value, n * (key + value)
    forward = Work((keys + values + ends) * itemsize, 2 * n * slots * (tasks * key + value))
    return forward + Work((2 * keys + 2 * values + ends) * itemsize, 2 * forward.flops) * int(backward)


def slot_conv(
    tasks: int, slots: int, c: int, kernel: int, h: int, w: int, itemsize: int, backward: bool = False
) -> Work:
    """Depthwise (kernel, 3, 3) over the slots; backward: x and dy in, dx out, and the weights' gradient."""
    kept = slots - kernel + 1
    x, y, weights = tasks * slots * c * h * w, tasks * kept * c * h * w, tasks * c * (9 * kernel + 1)
    forward = Work((x + y + weights) * itemsize, 2 * y * 9 * kernel)
    return forward + Work((2 * x + y + 2 * weights) * itemsize, 2 * forward.flops) * int(backward)


def gated_conv(
    n: int, c: int, h: int, w: int, kernel: int, itemsize: int, prior: int = 0, backward: bool = False
) -> Work:
    """prior: elements of the prior where it is smaller than x. x and prior in, y out; backward: x, prior, dy in, dx
    and the prior's gradient out."""
    image, weights = n * c * h * w, c * (2 * kernel * kernel + 1)
    small = prior or image
    forward = Work((2 * image + small + weights) * itemsize, 2 * image * 2 * kernel * kernel)
    return forward + Work((3 * image + 2 * small + 2 * weights) * itemsize, 2 * forward.flops) * int(backward)


# -- the whole model ----------------------------------------------------------------------------------------------


def encoder(
    n: int, h: int, w: int, width: int, blocks: Sequence[int], middle: int, itemsize: int, backward: bool = False
) -> dict[str, Work]:
    """NAF blocks on each level, 2x2 stride-2 convolutions between them. h, w: multiples of 2^levels."""
    naf, convs = Work(), Work()
    c = width
    for number in blocks:
        naf += naf_block(n, c, h, w, itemsize, backward) * number
        h, w = h // 2, w // 2
        convs += conv2d(n, c, 2 * c, h, w, 2, itemsize, stride=2, backward=backward)
        c *= 2
    naf += naf_block(n, c, h, w, itemsize, backward) * middle
    return {"naf_block": naf, "conv2d": convs}


def backbone(n: int, h: int, w: int, itemsize: int, sizes: dict[str, Any], backward: bool = False) -> dict[str, Work]:
    """By operator: a NAFNet, without the addition of its input. h, w: multiples of its stride."""
    width, levels = sizes["width"], len(sizes["encoder_blocks"])
    work = encoder(n, h, w, width, sizes["encoder_blocks"], sizes["middle_blocks"], itemsize, backward)
    work["conv2d"] += conv2d(n, 3, width, h, w, 3, itemsize, backward=backward)
    work["conv2d"] += conv2d(n, width, 3, h, w, 3, itemsize, backward=backward)
    work["upsample_add"] = Work()
    for level, number in zip(reversed(range(levels)), sizes["decoder_blocks"], strict=True):
        c, high, wide = width << level, h >> level, w >> level
        work["upsample_add"] += upsample_add(n, c, high, wide, itemsize, backward)
        work["naf_block"] += naf_block(n, c, high, wide, itemsize, backward) * number
    return work


def model(
    n: int, h: int, w: int, itemsize: int, sizes: dict[str, Any], tasks: int, backward: bool = False
) -> dict[str, Work]:
    """By operator, for images [n, 3, h, w]; sizes: a preset of `r2r.presets`. The tasks' slots are all in use."""
    width, levels = sizes["width"], len(sizes["encoder_blocks"])
    stride, deepest = 1 << levels, width << levels
    h, w = h + -h % stride, w + -w % stride
    bank, capacity = sizes["bank_size"] ** 2, sizes["capacity"]
    work = backbone(n, h, w, itemsize, sizes, backward)
    work["conv2d"] += conv2d(n, deepest, 2 * width + deepest, h // stride, w // stride, 3, itemsize, backward=backward)
    work["bank_retrieve"] = bank_retrieve(
        n, tasks, capacity - capacity // 5 + 1, 2 * width * bank, deepest * bank, itemsize, backward=backward
    )
    work["gated_conv"] = gated_conv(
        n, deepest, h // stride, w // stride, 1, itemsize, prior=n * deepest * bank, backward=backward
    )
    return work


def amalgamator(
    n: int, h: int, w: int, itemsize: int, sizes: dict[str, Any], tasks: int, backward: bool = False
) -> dict[str, Work]:
    """By operator, for n pairs of images [3, h, w], the mean residual."""
    width, levels, capacity = sizes["width"], len(sizes["memory_blocks"]), sizes["capacity"]
    stride, deepest, bank, kernel = 1 << levels, width << levels, sizes["bank_size"], capacity // 5
    work = encoder(n, h, w, width, sizes["memory_blocks"], 1, itemsize, backward)
    work["conv2d"] += conv2d(n, 4, width, h, w, 3, itemsize, backward=backward)
    work["slot_conv"] = Work()
    for channels in (2 * width, deepest):
        work["conv2d"] += conv2d(n, deepest, channels, h // stride, w // stride, 3, itemsize, backward=backward)
        work["slot_conv"] += slot_conv(tasks, capacity, channels, kernel, bank, bank, itemsize, backward)
        for _ in range(tasks):
            slots = capacity - kernel + 1
            work["conv2d"] += conv2d(slots, channels, channels, bank, bank, 1, itemsize, backward=backward)
    return work


def total(parts: dict[str, Work]) -> Work:
    return sum(parts.values(), Work())


def adam(parameters: int) -> Work:
    """float32: parameter, gradient and two moments in; parameter and moments out."""
    return Work(7 * 4 * parameters)


# -- limits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """`copy`: bytes read and written together by a copy -> bytes a second. `gemm`: dtype -> operations a second of a
    large matrix product."""

    copy: dict[int, float]
    gemm: dict[str, float]

    def best(self, other: Limits) -> Limits:
        """Of two measurements of one machine."""
        copy = {size: max(rate, other.copy[size]) for size, rate in self.copy.items()}
        return Limits(copy, {dtype: max(rate, other.gemm[dtype]) for dtype, rate in self.gemm.items()})

    def bandwidth(self, size: int) -> float:
        """Of the copy nearest in size: on a CPU small data come from the caches, for a copy as well."""
        return self.copy[min(self.copy, key=lambda measured: abs(math.log(measured / max(size, 1))))]

    def floor(self, work: Work, dtype: str) -> tuple[float, str]:
        """The least seconds for `work`, and what they are bound by: "memory" or "arithmetic"."""
        memory = work.bytes / self.bandwidth(work.bytes)
        arithmetic = work.flops / self.gemm[dtype]
        return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def measure_limits(device: torch.device) -> Limits:
    """The best of a few large copies and matrix products, measured here and now, with the threads and precision
    settings of this process. On a GPU float32 means the faster of IEEE and TF32 products, as convolutions use TF32; on
    a CPU the faster of PyTorch's and NumPy's: PyTorch's library halves its vectors on some processors."""
    gpu = device.type == "cuda"
    copies = [2**32] if gpu else [2**20, 2**22, 2**24, 2**26, 2**28]
    copy = {}
    for size in copies:
        x = torch.rand(size // 8, device=device)
        y = torch.empty_like(x)
        copy[size] = size / _best(lambda x=x, y=y: y.copy_(x), device)
        del x, y
    side = 8192 if gpu else 1024
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _best(lambda a=a, b=b: a @ b, device)
        if gpu and dtype == torch.float32:
            matmul: Any = torch.backends.cuda.matmul
            before = matmul.fp32_precision
            matmul.fp32_precision = "tf32"
            seconds = min(seconds, _best(lambda a=a, b=b: a @ b, device))
            matmul.fp32_precision = before
        if not gpu and dtype == torch.float32:
            seconds = min(seconds, _best(functools.partial(np.matmul, a.numpy(), b.numpy()), device))
        gemm[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
    return Limits(copy, gemm)


def _best(call: Any, device: torch.device, least: int = 5, budget: float = 0.3) -> float:
    """Seconds of the fastest call among those that fit into `budget` seconds, and `least` of them."""
    best, count, begin = float("inf"), 0, time.perf_counter()
    call()
    while count < least or time.perf_counter() - begin < budget:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best
