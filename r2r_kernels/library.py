"""Registers the operators with PyTorch, once, in the namespace `r2r`: what each takes and returns, what runs it on
which tensors, its shapes for tracing, its gradient, its dtypes under autocast, its FLOPs.

Which implementation runs is chosen by the tensors: Triton on a GPU, C++ for float32 and bfloat16 on a CPU, plain
PyTorch for all else. The environment variable R2R_KERNELS=reference|native|triton forces one, for debugging; what it
cannot run is then an error. Every result has the memory format of the operator's first argument.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from r2r_kernels import backward, extension, reference, triton
from r2r_kernels.reference import NAFBlockParams
from r2r_kernels.triton.layout import is_channels_last as _channels_last
from r2r_kernels.triton.layout import memory_format as _format

_LIBRARY = torch.library.Library("r2r", "DEF")
_OPS = torch.ops.r2r
_NATIVE = torch.ops.r2r_native  # filled when the extension is loaded
IMPLEMENTATIONS = ("reference", "native", "triton")
_BACKWARD_VALUES = 1 << 20  # that the native backward of a NAF block keeps of some images: they should fit a cache
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Choice of the implementation


@cache
def triton_reason() -> str | None:
    """Why the Triton kernels cannot run here, in one line; None where they can."""
    return triton.reason() or None


@cache
def _triton(operator: str) -> ModuleType:
    return importlib.import_module(f"r2r_kernels.triton.{operator}")  # imports Triton itself: only when it is needed


def implementation(x: Tensor) -> str:
    """Which of IMPLEMENTATIONS runs the operators on x.

    R2R_KERNELS=triton with TRITON_INTERPRET=1 runs the Triton kernels on the CPU, in Triton's interpreter. Raises
    ValueError for an unknown R2R_KERNELS, RuntimeError where the forced one cannot run on x.
    """
    forced = os.environ.get("R2R_KERNELS")
    if forced and forced not in IMPLEMENTATIONS:
        raise ValueError(f"R2R_KERNELS must be one of {', '.join(IMPLEMENTATIONS)}, got {forced!r}")
    if forced == "reference" or x.numel() == 0:
        return "reference"
    interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    on_device = x.device.type == "cuda" or interpreted
    if on_device and forced != "native" and x.dtype in _TRITON_DTYPES and triton_reason() is None:
        return "triton"
    if x.device.type == "cpu" and forced != "triton" and x.dtype in _NATIVE_DTYPES and extension.available():
        return "native"
    if forced:
        reason = extension.reason() if forced == "native" else triton_reason()
        raise RuntimeError(f"R2R_KERNELS={forced} cannot run {x.dtype} on {x.device}: {reason or 'not covered'}")
    return "reference"


# Memory formats


def _dense(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous(memory_format=_format(like))


def _empty(like: Tensor, channels: int) -> Tensor:
    n, _, h, w = like.shape
    return torch.empty((n, channels, h, w), dtype=like.dtype, device=like.device, memory_format=_format(like))


def _statistics(x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.new_empty((n, h, w), dtype=torch.promote_types(x.dtype, torch.float32))


# The operators


def _layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    chosen = implementation(x)
    if chosen == "triton":
        y, mean, rstd = _triton("layer_norm_2d").forward(x, weight.contiguous(), bias.contiguous(), eps)
        return _dense(y, x), mean, rstd
    if chosen == "native":
        y, mean, rstd = _layer_norm_2d_fake(x, weight, bias, eps)
        dense = _dense(x, x)
        _NATIVE.layer_norm_2d(dense, weight.contiguous(), bias.contiguous(), eps, _channels_last(x), y, mean, rstd)
        return y, mean, rstd
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(1)
    rstd = torch.rsqrt((wide - mean[:, None]).square().mean(1) + eps)
    y = reference.layer_norm_2d(x, weight, bias, eps)
    return _dense(y, x), mean.contiguous(), rstd.contiguous()


def _layer_norm_2d_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, x.shape[1]), _statistics(x), _statistics(x)


def _layer_norm_2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = implementation(x)
    if chosen == "triton":
        dx, dweight, dbias = _triton("layer_norm_2d").backward(dy, x, weight.contiguous(), mean, rstd)
        return _dense(dx, x), dweight, dbias
    if chosen == "native":
        dx = _empty(x, x.shape[1])
        dweight, dbias = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(weight, dtype=torch.float32)
        _NATIVE.layer_norm_2d_backward(
            _dense(dy, x), _dense(x, x), weight.contiguous(), mean, rstd, _channels_last(x), dx, dweight, dbias
        )
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
    dx, dweight, dbias = backward.layer_norm_2d(dy, x, weight, mean, rstd)
    return _dense(dx, x), dweight, dbias


def _layer_norm_2d_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, x.shape[1]), torch.empty_like(weight), torch.empty_like(weight)


def _simple_gate(x: Tensor) -> Tensor:
    chosen = implementation(x)
    if chosen == "triton":
        return _dense(_triton("simple_gate").forward(x), x)
    if chosen == "native":
        y = _simple_gate_fake(x)
        _NATIVE.simple_gate(_dense(x, x), _channels_last(x), y)
        return y
    return _dense(reference.simple_gate(x), x)


def _simple_gate_fake(x: Tensor) -> Tensor:
    return _empty(x, x.shape[1] // 2)


def _simple_gate_backward(dy: Tensor, x: Tensor) -> Tensor:
    chosen = implementation(x)
    if chosen == "triton":
        return _dense(_triton("simple_gate").backward(dy, x), x)
    if chosen == "native":
        dx = _simple_gate_backward_fake(dy, x)
        _NATIVE.simple_gate_backward(_dense(dy, x), _dense(x, x), _channels_last(x), dx)
        return dx
    return _dense(backward.simple_gate(dy, x), x)


def _simple_gate_backward_fake(dy: Tensor, x: Tensor) -> Tensor:
    return _empty(x, x.shape[1])


def _depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    chosen = implementation(x)
    if chosen == "triton":
        gated, mean = _triton("depthwise_gate").forward(x, weight.contiguous(), bias.contiguous())
        return _dense(gated, x), mean
    if chosen == "native":
        gated = _empty(x, x.shape[1] // 2)
        mean = x.new_empty((*gated.shape[:2], 1, 1), dtype=torch.float32)
        _NATIVE.depthwise_gate(_dense(x, x), weight.contiguous(), bias.contiguous(), _channels_last(x), gated, mean)
        return gated, mean.to(x.dtype)
    gated, mean = reference.depthwise_gate(x, weight, bias)
    return _dense(gated, x), mean.contiguous()


def _depthwise_gate_fake(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    gated = _empty(x, x.shape[1] // 2)
    return gated, x.new_empty((*gated.shape[:2], 1, 1))


def _depthwise_gate_backward(
    dgated: Tensor, dmean: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = implementation(x)
    if chosen == "triton":
        dx, dweight, dbias = _triton("depthwise_gate").backward(
            dgated, dmean, x, weight.contiguous(), bias.contiguous()
        )
    elif chosen == "native":
        dx = _empty(x, x.shape[1])
        dweight, dbias = (torch.empty(p.shape, dtype=torch.float32) for p in (weight, bias))
        images = (_dense(dgated, x), dmean.contiguous(), _dense(x, x))
        parameters = (weight.contiguous(), bias.contiguous())
        _NATIVE.depthwise_gate_backward(*images, *parameters, _channels_last(x), dx, dweight, dbias)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)
    else:
        dx, dweight, dbias = backward.depthwise_gate(_dense(dgated, x), dmean, _dense(x, x), weight, bias)
    return _dense(dx, x), dweight.contiguous(), dbias


def _depthwise_gate_backward_fake(
    dgated: Tensor, dmean: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, x.shape[1]), weight.new_empty(weight.shape), torch.empty_like(bias)


def _naf_block(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    chosen = implementation(x)
    if chosen == "triton":  # parameters of any dtype
        return _dense(_triton("naf_block").forward(x, NAFBlockParams(*(p.contiguous() for p in params)), eps), x)
    params = _like(params, x)
    if chosen == "native":
        y = _empty(x, x.shape[1])
        gated = x.new_empty(x.shape) if _channels_last(x) else y  # the result takes its place pixel by pixel
        _NATIVE.naf_block(_dense(x, x), [p.contiguous() for p in params], eps, _channels_last(x), gated, y)
        return y
    return _dense(reference.naf_block(x, NAFBlockParams(*params), eps), x)


def _like(params: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Parameters in the dtype of x: under autocast on a GPU they come as they are."""
    return [p.to(x.dtype) for p in params]


def _naf_block_fake(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    return _empty(x, x.shape[1])


# A block whose attention pools over windows: fused in C++, else put together from the other operators, as for
# gradients.


def _local_naf_block(x: Tensor, params: Sequence[Tensor], eps: float, window: Sequence[int]) -> Tensor:
    if window[0] >= x.shape[2] and window[1] >= x.shape[3]:
        return _naf_block(x, params, eps)
    chosen = implementation(x)
    if chosen == "native":
        y, gated, pooled = _naf_block_fake(x, params, eps), x.new_empty(x.shape), x.new_empty(x.shape)
        contiguous = [p.contiguous() for p in params]
        _NATIVE.local_naf_block(
            _dense(x, x), contiguous, eps, window[0], window[1], _channels_last(x), gated, pooled, y
        )
        return y
    if chosen == "triton":
        return _dense(_local_naf_block_composed(x, params, eps, window), x)
    return _dense(reference.naf_block(x, NAFBlockParams(*params), eps, window), x)


def _local_naf_block_fake(x: Tensor, params: Sequence[Tensor], eps: float, window: Sequence[int]) -> Tensor:
    return _empty(x, x.shape[1])


def _local_naf_block_composed(x: Tensor, params: Sequence[Tensor], eps: float, window: Sequence[int]) -> Tensor:
    p, conv = NAFBlockParams(*params), torch.nn.functional.conv2d
    hidden = conv(_OPS.layer_norm_2d(x, p.norm1_weight, p.norm1_bias, eps)[0], p.conv1_weight, p.conv1_bias)
    gated = _OPS.depthwise_gate(hidden, p.conv2_weight, p.conv2_bias)[0]
    attended = gated * conv(_OPS.local_mean_2d(gated, window), p.sca_weight, p.sca_bias)
    y = torch.addcmul(x, conv(attended, p.conv3_weight, p.conv3_bias), p.beta)
    hidden = conv(_OPS.layer_norm_2d(y, p.norm2_weight, p.norm2_bias, eps)[0], p.conv4_weight, p.conv4_bias)
    return torch.addcmul(y, conv(_OPS.simple_gate(hidden), p.conv5_weight, p.conv5_bias), p.gamma)


# For a frozen model on a GPU: what `naf_block` does with parameters that were folded beforehand, one launch less.


@torch.no_grad()
def fold_naf_block(params: NAFBlockParams, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What `naf_block_folded` takes, in its order, for activations of that dtype on the parameters' device; None where
    the implementation there reads parameters as they are."""
    if implementation(params.norm1_weight.to(dtype)) != "triton":
        return None
    folded = _triton("naf_block").fold(params, dtype)._asdict()
    return {**folded, "sca": folded["sca"].to(dtype)}


def _naf_block_folded(x: Tensor, folded: Sequence[Tensor], eps: float) -> Tensor:
    if implementation(x) == "triton":
        kernels = _triton("naf_block")
        return _dense(kernels.forward(x, kernels.FoldedParams(*folded), eps), x)
    if x.numel():
        raise RuntimeError(f"folded parameters are for Triton's kernels, x is on {x.device}; freeze the model there")
    return torch.empty_like(x)


def _naf_block_folded_fake(x: Tensor, folded: Sequence[Tensor], eps: float) -> Tensor:
    return _empty(x, x.shape[1])


# The forward for training also returns what the backward needs besides x: of Triton's the mean of the gated features,
# else nothing.


def _naf_block_training(x: Tensor, params: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    if implementation(x) == "triton":
        contiguous = NAFBlockParams(*(p.contiguous() for p in params))
        y, mean = _triton("naf_block").forward_training(x, contiguous, eps)
        return _dense(y, x), mean
    return _naf_block(x, params, eps), x.new_empty((0, x.shape[1]), dtype=torch.float32)


def _naf_block_training_fake(x: Tensor, params: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    kept = x.shape[0] if implementation(x) == "triton" else 0
    return _empty(x, x.shape[1]), x.new_empty((kept, x.shape[1]), dtype=torch.float32)


def _naf_block_backward(dy: Tensor, x: Tensor, mean: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    chosen = implementation(x)
    if chosen == "triton":
        contiguous = NAFBlockParams(*(p.contiguous() for p in params))
        dx, gradients = _triton("naf_block").backward(dy, x, mean, contiguous, eps)
        return [_dense(dx, x), *gradients]
    dtypes, params = [p.dtype for p in params], _like(params, x)
    if chosen == "native":
        n, c, h, w = x.shape
        work = x.new_empty((max(1, min(n, _BACKWARD_VALUES // (6 * c * h * w))), 6 * c, h, w))
        dx, gradients = _empty(x, c), [torch.empty(p.shape, dtype=torch.float32) for p in params]
        images, parameters = (_dense(dy, x), _dense(x, x)), [p.contiguous() for p in params]
        _NATIVE.naf_block_backward(*images, parameters, eps, _channels_last(x), work, dx, gradients)
        return [dx, *(g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))]
    else:
        dx, *gradients = backward.naf_block(_dense(dy, x), _dense(x, x), params, eps)
    return [_dense(dx, x), *(g.to(dtype).contiguous() for g, dtype in zip(gradients, dtypes, strict=True))]


def _naf_block_backward_fake(dy: Tensor, x: Tensor, mean: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [_empty(x, x.shape[1]), *(p.new_empty(p.shape) for p in params)]


def _upsample_add_pays(x: Tensor) -> bool:
    """Whether the C++ kernel beats convolution, shuffle and addition; measured in docs/kernels/cpu.md."""
    return x.shape[1] <= 128 and (x.dtype == torch.float32 or not _channels_last(x))


def _upsample_add(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    chosen = implementation(x)
    if chosen == "triton":
        return _dense(_triton("upsample_add").forward(x, weight.contiguous(), skip), x)
    if chosen == "native" and _upsample_add_pays(x):
        y = _upsample_add_fake(x, weight, skip)
        _NATIVE.upsample_add(_dense(x, x), weight.contiguous(), _dense(skip, x), _channels_last(x), y)
        return y
    return _dense(reference.upsample_add(x, weight, skip), x)


def _upsample_add_fake(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    return torch.empty(skip.shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _upsample_add_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():  # PyTorch's pixel_unshuffle answers another shape
        return torch.zeros_like(x), torch.zeros_like(weight)
    if implementation(x) == "triton":
        dx, dweight, _ = _triton("upsample_add").backward(dy, x, weight.contiguous())
    else:
        dx, dweight = backward.upsample_add(_dense(dy, x), _dense(x, x), weight)
    return _dense(dx, x), dweight.contiguous()


def _upsample_add_backward_fake(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[1]), weight.new_empty(weight.shape)


def _local_mean_2d(x: Tensor, window: Sequence[int]) -> Tensor:
    chosen = implementation(x)
    if chosen == "triton":
        return _dense(_triton("local_mean_2d").forward(x, tuple(window)), x)
    if chosen == "native":
        y = _local_mean_2d_fake(x, window)
        _NATIVE.local_mean_2d(_dense(x, x), window[0], window[1], False, _channels_last(x), y)
        return y
    return _dense(reference.local_mean_2d(x, window), x)


def _local_mean_2d_fake(x: Tensor, window: Sequence[int]) -> Tensor:
    return _empty(x, x.shape[1])


def _local_mean_2d_backward(dy: Tensor, window: Sequence[int]) -> Tensor:
    chosen = implementation(dy)
    if chosen == "triton":
        return _dense(_triton("local_mean_2d").backward(dy, tuple(window)), dy)
    if chosen == "native":
        dx = _local_mean_2d_fake(dy, window)
        _NATIVE.local_mean_2d(_dense(dy, dy), window[0], window[1], True, _channels_last(dy), dx)
        return dx
    return _dense(backward.local_mean_2d(dy, window), dy)


def _gated_conv_native(x: Tensor) -> bool:
    """Whether the C++ or CUDA kernel runs on x; there is none in Triton."""
    forced = os.environ.get("R2R_KERNELS")
    on_gpu = x.device.type == "cuda" and forced != "reference" and x.numel() and x.dtype in _TRITON_DTYPES
    if on_gpu and torch.version.hip is None and extension.runs_on(torch.cuda.get_device_capability(x.device)):
        return True
    return forced != "triton" and implementation(x) == "native"


def _gated_conv(x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _gated_conv_native(x):
        y = _empty(x, x.shape[1])
        _NATIVE.gated_conv(_dense(x, x), _dense(prior, x), weight.contiguous(), bias.contiguous(), _channels_last(x), y)
        return y
    return _dense(reference.gated_conv(x, prior, weight, bias), x)


def _gated_conv_fake(x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty(x, x.shape[1])


def _gated_conv_backward(
    dy: Tensor, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    resized = prior
    if prior.shape[2:] != x.shape[2:]:
        down, across = (reference.averaging(prior.shape[dim], x.shape[dim], prior) for dim in (2, 3))
        resized = backward.average(prior, down, across)
    if _gated_conv_native(x):
        weight, bias = weight.contiguous(), bias.contiguous()
        dx, dprior = _empty(x, x.shape[1]), _empty(x, x.shape[1])
        dweight, dbias = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(bias, dtype=torch.float32)
        _NATIVE.gated_conv_backward(
            _dense(dy, x), _dense(x, x), _dense(resized, x), weight, bias, _channels_last(x), dx, dprior, dweight, dbias
        )
    else:
        dx, dprior, dweight, dbias = backward.gated_conv(dy, x, resized, weight, bias)
    if resized is not prior:
        dprior = backward.average(dprior, down.T, across.T)
    return _dense(dx, x), _dense(dprior, x), dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype)


def _gated_conv_backward_fake(
    dy: Tensor, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dprior = torch.empty(prior.shape, dtype=x.dtype, device=x.device, memory_format=_format(x))
    return _empty(x, x.shape[1]), dprior, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _slot_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    chosen = implementation(x)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    if not x.numel():
        return _slot_conv_fake(x, weight, bias)
    if chosen == "triton":
        return _triton("slot_conv").forward(x, weight, bias)
    if chosen == "native":
        y = _slot_conv_fake(x, weight, bias)
        _NATIVE.slot_conv(x, weight, bias, y)
        return y
    return reference.slot_conv(x, weight, bias).contiguous()


def _slot_conv_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] - weight.shape[2] + 1, *x.shape[2:]))


def _slot_conv_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen = implementation(x)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[:2])
    if chosen == "triton":
        return _triton("slot_conv").backward(dy, x, weight)
    if chosen == "native":
        dx, dweight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
        dbias = weight.new_empty(weight.shape[:2], dtype=torch.float32)
        _NATIVE.slot_conv_backward(dy, x, weight, dx, dweight, dbias)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
    dx, dweight, dbias = backward.slot_conv(dy, x, weight)
    return dx.contiguous(), dweight.contiguous(), dbias.contiguous()


def _slot_conv_backward_fake(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _require(condition: Tensor, message: str) -> None:
    """ValueError on a CPU; on a GPU the device stops with an assertion, because the host must not wait to find out."""
    if condition.device.type == "cpu":
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def _told_mask(task: Tensor, query: Tensor, counts: Tensor) -> Tensor:
    """Told tasks (indices, one or [N], or a mask [T] or [N, T]) as a mask [N, T]."""
    shape = (query.shape[0], counts.shape[0])
    if task.dtype == torch.bool:
        return task.expand(shape).contiguous()
    _require(((task >= 0) & (task < shape[1])).all(), f"told tasks must be 0 to {shape[1] - 1}")
    return task.expand(shape[0])[:, None] == torch.arange(shape[1], device=task.device)


def _bank_retrieve(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: Tensor, task: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = implementation(query)
    told = None if task is None else _told_mask(task, query, counts)
    _check_slots_in_use(counts, keys.shape[1], told, query.shape[0])
    if chosen != "reference" and keys.numel() and values.numel():
        query, keys, values, counts = (t.contiguous() for t in (query, keys, values, counts))
        if chosen == "triton":
            return _triton("bank_retrieve").forward(query, keys, values, counts, scale, told, mode)
        readout, scores, weights = _bank_retrieve_fake(query, keys, values, counts, scale, task, mode)
        taking = torch.empty(scores.shape, dtype=torch.bool) if told is None else told
        number = ("hard", "multi", "soft").index(mode)
        _NATIVE.bank_retrieve(
            query, keys, values, counts, scale.item(), told is not None, number, taking, readout, scores, weights
        )
        return readout, scores, weights
    return _bank_retrieve_plain(query, keys, values, counts, scale, told, mode)


def _check_slots_in_use(counts: Tensor, slots: int, told: Tensor | None, images: int) -> None:
    empty = "a task that takes part holds no slots in the bank"
    if counts.device.type == "cpu":  # on a GPU the kernels hold counts below the number of slots
        numbers = counts.tolist()  # compared in Python, as small tensor operations took 5 % of a retrieval
        if not all(0 <= number <= slots for number in numbers):
            raise ValueError(f"counts must be 0 to {slots}")
        if told is None:
            if images and not any(numbers):
                raise ValueError(empty)
            return
    if images:
        part = counts > 0 if told is None else told & (counts > 0)
        _require(part.any(-1).all(), empty)


def _bank_retrieve_plain(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: Tensor, told: Tensor | None, mode: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # The identity as values reads out the weights.
    tasks, slots = keys.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    slot = torch.eye(tasks * slots, dtype=wide, device=keys.device).view(tasks, slots, tasks * slots, 1, 1)
    weights, scores = reference.bank_retrieve(query, keys, slot, counts, scale, told, mode)
    readout = weights.flatten(1) @ values.to(wide).flatten(0, 1).flatten(1)
    shape = (query.shape[0], *values.shape[2:])
    return readout.view(shape).to(values.dtype), scores, weights.reshape(-1, tasks, slots)


def _bank_retrieve_fake(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: Tensor, task: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, (tasks, slots) = query.shape[0], keys.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    readout = values.new_empty((n, *values.shape[2:]))
    return readout, query.new_empty((n, tasks), dtype=wide), query.new_empty((n, tasks, slots), dtype=wide)


def _bank_retrieve_backward(
    dreadout: Tensor,
    dscores: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = backward.bank_retrieve(dreadout, dscores, query, keys, values, counts, scale, weights)
    dquery, dkeys, dvalues, dscale = (g.contiguous() for g in gradients)
    return dquery, dkeys, dvalues, dscale


def _bank_retrieve_backward_fake(
    dreadout: Tensor,
    dscores: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dquery, dkeys, dvalues = (t.new_empty(t.shape) for t in (query, keys, values))
    return dquery, dkeys, dvalues, scale.new_empty(())


_DEFINITIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "layer_norm_2d(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)": (
        _layer_norm_2d,
        _layer_norm_2d_fake,
    ),
    "layer_norm_2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)": (
        _layer_norm_2d_backward,
        _layer_norm_2d_backward_fake,
    ),
    "simple_gate(Tensor x) -> Tensor": (_simple_gate, _simple_gate_fake),
    "simple_gate_backward(Tensor dy, Tensor x) -> Tensor": (_simple_gate_backward, _simple_gate_backward_fake),
    "depthwise_gate(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)": (
        _depthwise_gate,
        _depthwise_gate_fake,
    ),
    "depthwise_gate_backward(Tensor dgated, Tensor dmean, Tensor x, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor)": (_depthwise_gate_backward, _depthwise_gate_backward_fake),
    "naf_block(Tensor x, Tensor[] params, float eps) -> Tensor": (_naf_block, _naf_block_fake),
    "local_naf_block(Tensor x, Tensor[] params, float eps, int[] window) -> Tensor": (
        _local_naf_block,
        _local_naf_block_fake,
    ),
    "naf_block_folded(Tensor x, Tensor[] folded, float eps) -> Tensor": (_naf_block_folded, _naf_block_folded_fake),
    "naf_block_training(Tensor x, Tensor[] params, float eps) -> (Tensor, Tensor)": (
        _naf_block_training,
        _naf_block_training_fake,
    ),
    "naf_block_backward(Tensor dy, Tensor x, Tensor mean, Tensor[] params, float eps) -> Tensor[]": (
        _naf_block_backward,
        _naf_block_backward_fake,
    ),
    "upsample_add(Tensor x, Tensor weight, Tensor skip) -> Tensor": (_upsample_add, _upsample_add_fake),
    "upsample_add_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)": (
        _upsample_add_backward,
        _upsample_add_backward_fake,
    ),
    "local_mean_2d(Tensor x, int[] window) -> Tensor": (_local_mean_2d, _local_mean_2d_fake),
    "local_mean_2d_backward(Tensor dy, int[] window) -> Tensor": (_local_mean_2d_backward, _local_mean_2d_fake),
    "gated_conv(Tensor x, Tensor prior, Tensor weight, Tensor bias) -> Tensor": (_gated_conv, _gated_conv_fake),
    "gated_conv_backward(Tensor dy, Tensor x, Tensor prior, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)": (_gated_conv_backward, _gated_conv_backward_fake),
    "slot_conv(Tensor x, Tensor weight, Tensor bias) -> Tensor": (_slot_conv, _slot_conv_fake),
    "slot_conv_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)": (
        _slot_conv_backward,
        _slot_conv_backward_fake,
    ),
    "bank_retrieve(Tensor query, Tensor keys, Tensor values, Tensor counts, Tensor scale, Tensor? task, str mode)"
    " -> (Tensor, Tensor, Tensor)": (_bank_retrieve, _bank_retrieve_fake),
    "bank_retrieve_backward(Tensor dreadout, Tensor dscores, Tensor query, Tensor keys, Tensor values, Tensor counts,"
    " Tensor scale, Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)": (
        _bank_retrieve_backward,
        _bank_retrieve_backward_fake,
    ),
}

for _schema, (_kernel, _fake) in _DEFINITIONS.items():
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"r2r::{_name}", _fake, lib=_LIBRARY)


# Gradients


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that cannot be differentiated: with create_graph=True its gradients raise where they are.

    PyTorch's `once_differentiable` leaves them constants where the incoming gradients are, as in the gradient of a sum:
    a gradient penalty would then be wrong without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        try:
            with torch.no_grad():
                results = backward(ctx, *gradients)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "what a fused operator keeps for its backward pass, its input or a parameter, was changed in place "
                "after the forward: write y = x + z instead of x += z, or take plain PyTorch there (eager=True, "
                f"r2r_kernels.decelerate). {error}"
            ) from error
        if not torch.is_grad_enabled():
            return results
        several = results if isinstance(results, tuple) else (results,)
        raising = torch._C._functions.DelayedError(
            b"r2r_kernels has no second derivatives: take plain PyTorch for them (eager=True, r2r_kernels.reference, "
            b"or r2r_kernels.decelerate)",
            len(several),
        )
        marked: Any = raising(*(None if r is None else r.detach().requires_grad_() for r in several))  # type: ignore[arg-type]
        return marked if isinstance(results, tuple) else marked[0] if isinstance(marked, (tuple, list)) else marked

    return wrapper


def _refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """A tangent (forward-mode AD, torch.func.jvp) would be lost below autograd, and the answer's be zero."""
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "r2r_kernels has no forward-mode derivatives (jvp): take plain PyTorch for them (eager=True, "
            "r2r_kernels.reference, or r2r_kernels.decelerate)"
        )


class _LayerNorm2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = _OPS.layer_norm_2d(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*_OPS.layer_norm_2d_backward(dy, *ctx.saved_tensors), None)


class _SimpleGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.simple_gate(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _OPS.simple_gate_backward(dy, *ctx.saved_tensors)


class _DepthwiseGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.depthwise_gate(x, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dgated: Tensor, dmean: Tensor) -> tuple[Tensor, ...]:
        return _OPS.depthwise_gate_backward(dgated, dmean, *ctx.saved_tensors)


class _NAFBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *params: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean = _OPS.naf_block_training(x, params, eps)
        ctx.save_for_backward(x, mean, *params)
        ctx.eps = eps
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, *params = ctx.saved_tensors
        dx, *gradients = _OPS.naf_block_backward(dy, x, mean, params, ctx.eps)
        return (dx, None, *gradients)


class _UpsampleAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.upsample_add(x, weight, skip)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return (*_OPS.upsample_add_backward(dy, *ctx.saved_tensors), dy)


class _LocalMean2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Sequence[int]) -> Tensor:
        ctx.window = window
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.local_mean_2d(x, window)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _OPS.local_mean_2d_backward(dy, ctx.window), None


class _GatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prior: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, prior, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.gated_conv(x, prior, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return _OPS.gated_conv_backward(dy, *ctx.saved_tensors)


class _SlotConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.slot_conv(x, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return _OPS.slot_conv_backward(dy, *ctx.saved_tensors)


class _BankRetrieve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            readout, scores, weights = _OPS.bank_retrieve(*args)
        ctx.save_for_backward(*args[:5], weights)
        ctx.mark_non_differentiable(weights)
        return readout, scores, weights

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dreadout: Tensor, dscores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dquery, dkeys, dvalues, dscale = _OPS.bank_retrieve_backward(dreadout, dscores, *ctx.saved_tensors)
        return dquery, dkeys, dvalues, None, dscale, None, None


def _differentiable(name: str, apply: Callable[..., Any]) -> None:
    operator = getattr(_OPS, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if forward_ad._current_level >= 0:
            _refuse_tangents(tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


_differentiable("layer_norm_2d", _LayerNorm2d.apply)
_differentiable("simple_gate", _SimpleGate.apply)
_differentiable("upsample_add", _UpsampleAdd.apply)
_differentiable("local_mean_2d", _LocalMean2d.apply)
_differentiable("gated_conv", _GatedConv.apply)
_differentiable("slot_conv", _SlotConv.apply)
_differentiable("bank_retrieve", _BankRetrieve.apply)
_differentiable("depthwise_gate", _DepthwiseGate.apply)
_differentiable("naf_block", lambda x, params, eps: _NAFBlock.apply(x, eps, *params))
_differentiable("local_naf_block", _local_naf_block_composed)


# Autocast: convolutions run in autocast's dtype, a norm and a mean in that of their input.


def _autocast(name: str, norm: bool = False, mixed: bool = False) -> None:
    """mixed: on a GPU parameters stay as they are: its kernels read any dtype, and casts are launches of their own."""
    operator = getattr(_OPS, name).default

    def register(device: str, key: str) -> None:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any) -> Any:
            dtype = args[0].dtype if norm else torch.get_autocast_dtype(device)

            def cast(value: Any) -> Any:
                if isinstance(value, (list, tuple)):
                    return value if mixed and device == "cuda" else [cast(v) for v in value]
                narrowable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
                return value.to(dtype) if narrowable else value

            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(*map(cast, args))

        _LIBRARY.impl(name, kernel, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


_autocast("layer_norm_2d", norm=True)
_autocast("depthwise_gate")
_autocast("upsample_add")
_autocast("local_mean_2d", norm=True)
_autocast("gated_conv")
_autocast("slot_conv")
_autocast("naf_block", mixed=True)
_autocast("local_naf_block")


# FLOPs of the convolutions, as PyTorch counts them: two for a multiplication and an addition.


@register_flop_formula(_OPS.depthwise_gate)
def _depthwise_gate_flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * c * h * w * 9


@register_flop_formula(_OPS.upsample_add)
def _upsample_add_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


@register_flop_formula(_OPS.upsample_add_backward)
def _upsample_add_backward_flops(dy: Any, x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _upsample_add_flops(x, weight)


@register_flop_formula(_OPS.gated_conv)
def _gated_conv_flops(x: Sequence[int], prior: Any, weight: Sequence[int], *_: Any, **__: Any) -> int:
    n, _c, h, w = x
    return 2 * n * h * w * math.prod(weight)


@register_flop_formula(_OPS.gated_conv_backward)
def _gated_conv_backward_flops(dy: Any, x: Sequence[int], prior: Any, weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 3 * _gated_conv_flops(x, prior, weight)


@register_flop_formula(_OPS.slot_conv)
def _slot_conv_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    _t, slots, _c, h, w = x
    return 2 * (slots - weight[2] + 1) * h * w * math.prod(weight)


@register_flop_formula(_OPS.slot_conv_backward)
def _slot_conv_backward_flops(dy: Any, x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _slot_conv_flops(x, weight)


@register_flop_formula(_OPS.bank_retrieve)
def _bank_retrieve_flops(query: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any) -> int:
    """As if one task took part for each sample."""
    return 2 * query[0] * (math.prod(keys) + math.prod(values[1:]))


@register_flop_formula(_OPS.bank_retrieve_backward)
def _bank_retrieve_backward_flops(
    dreadout: Any, dscores: Any, query: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * query[0] * (3 * math.prod(keys) + 2 * math.prod(values))


@register_flop_formula(_OPS.depthwise_gate_backward)
def _depthwise_gate_backward_flops(dgated: Any, dmean: Any, x: Sequence[int], *_: Any, **__: Any) -> int:
    return 3 * _depthwise_gate_flops(x)


@register_flop_formula([_OPS.naf_block, _OPS.naf_block_folded, _OPS.naf_block_training])
def _naf_block_flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * c * (h * w * (6 * c + 18) + c)


@register_flop_formula(_OPS.local_naf_block)
def _local_naf_block_flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * c * h * w * (7 * c + 18)


@register_flop_formula(_OPS.naf_block_backward)
def _naf_block_backward_flops(dy: Any, x: Sequence[int], *_: Any, **__: Any) -> int:
    return 3 * _naf_block_flops(x) - 2 * x[0] * x[1] * x[1] * x[2] * x[3]  # conv5 is not computed again
