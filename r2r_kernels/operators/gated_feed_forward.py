"""Registers `gated_feed_forward`, the second half of a NAF block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from r2r_kernels import backward, library, reference
from r2r_kernels.library import first_derivative_only, implementation
from r2r_kernels.reference import GatedFeedForwardParams

_LIBRARY = torch.library.Library("r2r", "FRAGMENT")
_OPS = torch.ops.r2r
_NATIVE = torch.ops.r2r_native


def _forward(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    chosen = implementation(x)
    contiguous = [p.contiguous() for p in params]
    if chosen == "triton":
        kernels = library._triton("gated_feed_forward")
        return library._dense(kernels.forward(x, GatedFeedForwardParams(*contiguous), eps), x)
    if chosen == "native":
        y = library._empty(x, x.shape[1])
        _NATIVE.gated_feed_forward(library._dense(x, x), contiguous, eps, library._channels_last(x), y)
        return y
    return library._dense(reference.gated_feed_forward(x, GatedFeedForwardParams(*params), eps), x)


def _forward_fake(x: Tensor, params: Sequence[Tensor], eps: float) -> Tensor:
    return library._empty(x, x.shape[1])


def _backward(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    if implementation(x) == "native":
        dx, gradients = library._empty(x, x.shape[1]), [torch.empty(p.shape, dtype=torch.float32) for p in params]
        images, parameters = (library._dense(dy, x), library._dense(x, x)), [p.contiguous() for p in params]
        _NATIVE.gated_feed_forward_backward(*images, parameters, eps, library._channels_last(x), dx, gradients)
        return [dx, *(g.to(x.dtype) for g in gradients)]
    dx, *gradients = backward.gated_feed_forward(library._dense(dy, x), library._dense(x, x), params, eps)
    return [library._dense(dx, x), *(g.contiguous() for g in gradients)]


def _backward_fake(dy: Tensor, x: Tensor, params: Sequence[Tensor], eps: float) -> list[Tensor]:
    return [library._empty(x, x.shape[1]), *(p.new_empty(p.shape) for p in params)]


class _GatedFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, *params)
        ctx.eps = eps
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.gated_feed_forward(x, params, eps)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        dx, *gradients = _OPS.gated_feed_forward_backward(dy, x, params, ctx.eps)
        return (dx, None, *gradients)


for _name, _arguments, _kernel, _fake in (
    ("gated_feed_forward", "(Tensor x, Tensor[] params, float eps) -> Tensor", _forward, _forward_fake),
    (
        "gated_feed_forward_backward",
        "(Tensor dy, Tensor x, Tensor[] params, float eps) -> Tensor[]",
        _backward,
        _backward_fake,
    ),
):
    _LIBRARY.define(_name + _arguments, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"r2r::{_name}", _fake, lib=_LIBRARY)

library._differentiable("gated_feed_forward", lambda x, params, eps: _GatedFeedForward.apply(x, eps, *params))
library._autocast("gated_feed_forward")


@register_flop_formula(_OPS.gated_feed_forward)
def _flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * h * w * 3 * c * c


@register_flop_formula(_OPS.gated_feed_forward_backward)
def _backward_flops(dy: Any, x: Sequence[int], *_: Any, **__: Any) -> int:
    """The hidden channels again, and of both convolutions the gradients of input and weight."""
    return 2 * x[0] * x[2] * x[3] * 8 * x[1] * x[1]
