"""Registers `bank_retrieve`: from a bank of keys and values the readout that fits a query.

The operator also returns the weights of the slots, which its backward reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels import reference
from r2r_kernels.operators import implementation
from r2r_kernels.operators.registry import first_derivative_only, register
from r2r_kernels.reference import require

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: Tensor, task: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.bank_retrieve`, with scale and task as tensors -> readout, scores, weights [N, T, S]."""
    chosen = implementation.of(query)
    told = None if task is None else _told_mask(task, query, counts)
    _check_slots_in_use(counts, keys.shape[1], told, query.shape[0])
    if chosen != "reference" and keys.numel() and values.numel():
        query, keys, values, counts = (t.contiguous() for t in (query, keys, values, counts))
        if chosen == "triton":
            kernels = implementation.triton_kernels("bank_retrieve")
            return kernels.forward(query, keys, values, counts, scale, told, mode)
        readout, scores, weights = _forward_fake(query, keys, values, counts, scale, task, mode)
        taking = torch.empty(scores.shape, dtype=torch.bool) if told is None else told
        number = ("hard", "multi", "soft").index(mode)
        implementation.NATIVE.bank_retrieve(
            query, keys, values, counts, scale.item(), told is not None, number, taking, readout, scores, weights
        )
        return readout, scores, weights
    return _plain_forward(query, keys, values, counts, scale, told, mode)


def _told_mask(task: Tensor, query: Tensor, counts: Tensor) -> Tensor:
    """Told tasks (indices, one or [N], or a mask [T] or [N, T]) as a mask [N, T]."""
    shape = (query.shape[0], counts.shape[0])
    if task.dtype == torch.bool:
        return task.expand(shape).contiguous()
    require(((task >= 0) & (task < shape[1])).all(), f"told tasks must be 0 to {shape[1] - 1}")
    return task.expand(shape[0])[:, None] == torch.arange(shape[1], device=task.device)


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
        require(part.any(-1).all(), empty)


def _plain_forward(
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


def _forward_fake(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: Tensor, task: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, (tasks, slots) = query.shape[0], keys.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    readout = values.new_empty((n, *values.shape[2:]))
    return readout, query.new_empty((n, tasks), dtype=wide), query.new_empty((n, tasks, slots), dtype=wide)


def backward(
    dreadout: Tensor,
    dscores: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    weights: Tensor,
) -> _Four:
    """The gradients of query, keys, values and scale; weights [N, T, S] are the forward's.

    They are matrix products of fixed order: what a kernel could save is small beside these.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    tasks, slots = weights.shape[1:]
    flat_query, flat_keys = query.to(wide).flatten(1), keys.to(wide).reshape(tasks * slots, -1)
    unit_query, unit_keys = F.normalize(flat_query, dim=1), F.normalize(flat_keys, dim=1)
    cosine = (unit_query @ unit_keys.T).view(weights.shape)

    used = torch.arange(slots, device=counts.device) < counts[:, None]
    dsimilarity = torch.where(used, (dscores / counts.clamp(min=1))[:, :, None], 0)

    dflat, dweights, dvalues = dreadout.to(wide).flatten(1), torch.zeros_like(weights), values.new_zeros(values.shape)
    for images, part in _readings(weights):
        rows, drows = (x[part].flatten(0, 1).flatten(1) for x in (values, dvalues))
        of_rows, of_images = weights[images, part].flatten(1), dflat[images]
        dweights[images, part] = (of_images @ rows.to(wide).T).unflatten(1, (-1, slots))
        drows.copy_(of_rows.T @ of_images)
    through = weights * (dweights - (weights * dweights).sum((1, 2), keepdim=True))
    dsimilarity = (dsimilarity + through).flatten(1)

    dcosine = dsimilarity * scale
    dquery = _normalise_backward(dcosine @ unit_keys, unit_query, flat_query).view(query.shape)
    dkeys = _normalise_backward(dcosine.T @ unit_query, unit_keys, flat_keys).view(keys.shape)
    # Its terms have either sign, and their sum is small beside them.
    precise = wide if query.device.type == "mps" else torch.float64
    dscale = (dsimilarity.to(precise) * cosine.flatten(1).to(precise)).sum()
    dquery, dkeys, dscale = dquery.to(query.dtype), dkeys.to(keys.dtype), dscale.to(scale.dtype)
    return dquery.contiguous(), dkeys.contiguous(), dvalues.contiguous(), dscale


def _readings(weights: Tensor) -> list[tuple[Tensor | slice, slice]]:
    """Which images read which tasks, by their weights [N, T, S]: on a GPU all, as it would have to tell the host."""
    if weights.device.type != "cpu":
        return [(slice(None), slice(None))]
    read = weights.any(2)
    return [(read[:, t].nonzero().flatten(), slice(t, t + 1)) for t in range(read.shape[1]) if read[:, t].any()]


def _normalise_backward(dunit: Tensor, unit: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, where unit = x / max(|x|, 1e-12) along the last dimension."""
    norm = x.norm(dim=-1, keepdim=True)
    along = torch.where(norm > 1e-12, (dunit * unit).sum(-1, keepdim=True), 0)
    return (dunit - unit * along) / norm.clamp(min=1e-12)


def _backward_fake(
    dreadout: Tensor,
    dscores: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    scale: Tensor,
    weights: Tensor,
) -> _Four:
    dquery, dkeys, dvalues = (t.new_empty(t.shape) for t in (query, keys, values))
    return dquery, dkeys, dvalues, scale.new_empty(())


class _BankRetrieve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            readout, scores, weights = torch.ops.r2r.bank_retrieve(*args)
        ctx.save_for_backward(*args[:5], weights)
        ctx.mark_non_differentiable(weights)
        return readout, scores, weights

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dreadout: Tensor, dscores: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dquery, dkeys, dvalues, dscale = torch.ops.r2r.bank_retrieve_backward(dreadout, dscores, *ctx.saved_tensors)
        return dquery, dkeys, dvalues, None, dscale, None, None


def _flops(query: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any) -> int:
    """As if one task took part for each sample."""
    return 2 * query[0] * (math.prod(keys) + math.prod(values[1:]))


def _backward_flops(
    dreadout: Any, dscores: Any, query: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any
) -> int:
    """The similarities again, and all gradients, those of weights and values as if every task took part."""
    return 2 * query[0] * (3 * math.prod(keys) + 2 * math.prod(values))


register(
    "bank_retrieve(Tensor query, Tensor keys, Tensor values, Tensor counts, Tensor scale, Tensor? task, str mode)"
    " -> (Tensor, Tensor, Tensor)",
    forward,
    _forward_fake,
    autograd=_BankRetrieve.apply,
    flops=_flops,
)
register(
    "bank_retrieve_backward(Tensor dreadout, Tensor dscores, Tensor query, Tensor keys, Tensor values, Tensor counts,"
    " Tensor scale, Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    flops=_backward_flops,
)
