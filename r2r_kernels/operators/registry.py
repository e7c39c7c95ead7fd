"""Registers operators with PyTorch, in the namespace `r2r`: `register` takes all that PyTorch knows of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

Autocast = Literal["convolution", "norm", "mixed"]

_LIBRARY = torch.library.Library("r2r", "DEF")


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autograd: Callable[..., Any] | None = None,
    autocast: Autocast | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Define `torch.ops.r2r.<name>`.

    schema: the name, the arguments and the results, as `torch.library` writes them.
    forward: runs the operator on a CPU and on a GPU; it chooses the implementation by the tensors.
    fake: makes results of the right shape, dtype and memory format without values, for tracing.
    autograd: runs instead of `forward` where a gradient is wanted; for an operator without one, None.
    autocast: "convolution" casts all tensors to autocast's dtype, "norm" to the dtype of the first argument; "mixed" is
        "convolution", but on a GPU leaves lists of parameters alone: the kernels there read parameters of any dtype,
        and each cast would be a launch.
    flops: the operator's FLOPs from the shapes of its arguments, two for a multiplication and an addition.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, forward, key)
    torch.library.register_fake(f"r2r::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.r2r, name)
    if autograd:
        _LIBRARY.impl(name, _autograd_kernel(operator.default, autograd), "Autograd", with_keyset=True)
    if autocast:
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _LIBRARY.impl(name, _autocast_kernel(operator.default, autocast, device, key), key)
    if flops:
        register_flop_formula(operator)(flops)


def _autograd_kernel(operator: Any, autograd: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if forward_ad._current_level >= 0:
            _refuse_tangents(tensors)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return autograd(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """A tangent (forward-mode AD, torch.func.jvp) would be lost below autograd, and the answer's be zero."""
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "r2r_kernels has no forward-mode derivatives (jvp): take plain PyTorch for them (eager=True, "
            "r2r_kernels.reference, or r2r_kernels.decelerate)"
        )


def _autocast_kernel(operator: Any, autocast: Autocast, device: str, key: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        dtype = args[0].dtype if autocast == "norm" else torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return value if autocast == "mixed" and device == "cuda" else [cast(v) for v in value]
            narrowable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if narrowable else value

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*map(cast, args))

    return kernel


class _Refused(torch.autograd.Function):
    """Gives the first `count` tensors back. A gradient that would pass through them, to any of the tensors, raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "r2r_kernels has no second derivatives: take plain PyTorch for them (eager=True, r2r_kernels.reference, "
            "or r2r_kernels.decelerate)"
        )


class _Read:
    """A context whose saved tensors are unpacked once, as checkpointing asks for."""

    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that cannot be differentiated: with create_graph=True its gradients raise where they are.

    PyTorch's `once_differentiable` leaves them constants where the incoming gradients are, as in the gradient of a sum:
    a gradient penalty would then be wrong without a word. The gradients stay tied to all that they were made of, so
    that this is seen also where only some tensors are asked for (`inputs` of `torch.autograd.backward`).
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        try:
            read = _Read(ctx)
            with torch.no_grad():
                results = backward(read, *gradients)
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
        tied = _Refused.apply(len(several), *several, *gradients, *read.saved_tensors)
        return tied if isinstance(results, tuple) else tied[0]

    return wrapper
