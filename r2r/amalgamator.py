"""The amalgamator distils a batch of pairs into the bank; it exists during training only (R2R, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from r2r import ranks
from r2r.backbone import Encoder
from r2r.bank import Slots
from r2r_kernels.nn import SlotConv3d

Residual = Literal["mean", "full"]


def recomputing() -> bool:
    """Whether activation checkpointing runs a forward pass again, inside the backward pass: it must see the state that
    the first run saw, and must not change it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class TaskBatchNorm(nn.Module):
    """BatchNorm over slots and space of [T, S, C, h, w], with statistics and an affine of its own for each task.

    In training, only the running statistics of tasks that are `present` (bool [T]) move.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, tasks: int, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(tasks, channels))
        self.bias = nn.Parameter(torch.zeros(tasks, channels))
        self.register_buffer("running_mean", torch.zeros(tasks, channels))
        self.register_buffer("running_var", torch.ones(tasks, channels))
        self.eps = eps
        self.momentum = momentum

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        if self.training:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            var, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0)
            if not recomputing():
                self._move_statistics(mean, var, x.shape[1] * x.shape[3] * x.shape[4], present)
        else:
            mean, var = self.running_mean, self.running_var
        gain = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * gain
        return (x * gain[:, None, :, None, None] + shift[:, None, :, None, None]).to(x.dtype)

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, var: Tensor, samples: int, present: Tensor) -> None:
        step = (self.momentum * present[:, None]).to(self.running_mean)
        self.running_mean.lerp_(mean.to(self.running_mean), step)
        self.running_var.lerp_((var * (samples / max(samples - 1, 1))).to(self.running_var), step)


class SlotAggregator(nn.Module):
    """Aggregates M slots into M - k + 1: depthwise (k, 3, 3) and pointwise convolution, BatchNorm, ReLU, by task."""

    def __init__(self, tasks: int, channels: int, kernel: int, eager: bool) -> None:
        super().__init__()
        self.depthwise = SlotConv3d(tasks, channels, kernel, eager)
        bound = channels**-0.5
        self.pointwise_weight = nn.Parameter(torch.empty(tasks, channels, channels).uniform_(-bound, bound))
        self.pointwise_bias = nn.Parameter(torch.empty(tasks, channels).uniform_(-bound, bound))
        self.norm = TaskBatchNorm(tasks, channels)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """[T, M, C, h, w] -> [T, M - k + 1, C, h, w], never negative."""
        x = self.depthwise(x)
        # One product for each task: a weight broadcast over the slots would be copied, and its gradient made, for each.
        mixed = torch.bmm(self.pointwise_weight, x.transpose(1, 2).flatten(2)) + self.pointwise_bias[:, :, None]
        mixed = mixed.unflatten(2, (x.shape[1], *x.shape[3:])).transpose(1, 2)
        return F.relu(self.norm(mixed, present))


class Amalgamator(nn.Module):
    """From clean images and residuals to the bank's slots, and to the logits of a degradation classifier.

    residual "mean": the residual LQ - HQ averaged over the colour channels is appended to HQ (the published code);
    "full": all three channels of it (the paper).
    """

    def __init__(
        self,
        tasks: int,
        width: int,
        blocks: Sequence[int],
        capacity: int,
        key_channels: int,
        value_channels: int,
        residual: Residual,
        eager: bool,
    ) -> None:
        super().__init__()
        if residual not in ("mean", "full"):
            raise ValueError(f'residual must be "mean" or "full", got {residual!r}')
        self.residual = residual
        self.capacity = capacity
        self.shuffle = True
        self.intro = nn.Conv2d(4 if residual == "mean" else 6, width, 3, padding=1)
        self.encoder = Encoder(width, blocks, middle=1, eager=eager)
        deepest = width << len(blocks)
        self.classifier = nn.Linear(deepest // 2, tasks)
        self.key = nn.Conv2d(deepest, key_channels, 3, padding=1)
        self.value = nn.Conv2d(deepest, value_channels, 3, padding=1)
        self.key_slots = SlotAggregator(tasks, key_channels, capacity // 5, eager)
        self.value_slots = SlotAggregator(tasks, value_channels, capacity // 5, eager)

    def forward(
        self, lq: Tensor, hq: Tensor, labels: Tensor, held: Slots, stage: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Degraded and clean images [N, 3, H, W], labels (int64 [N] or a mask [N, T]) and what the bank holds -> keys
        [T, S, Ck, h, w], values [T, S, Cv, h, w], which tasks are present (bool [T]), logits [N, T].

        Several ranks (torch.distributed), each with as many pairs, build one bank from the pairs of all.
        Stage 0 fills the M slots of a task with its samples; stage 1 with the slots the bank holds, detached, and then
        samples. A task without samples keeps what the bank holds.
        """
        residual = lq - hq
        if self.residual == "mean":
            residual = residual.mean(1, keepdim=True)
        deep, _, downsampled = self.encoder(self.intro(torch.cat((hq, residual), dim=1)))
        logits = self.classifier(F.relu(downsampled[-2]).mean((2, 3)))

        size, tasks = (held.keys.shape[3], held.keys.shape[4]), len(held.counts)
        key, value = (F.adaptive_avg_pool2d(project(deep), size) for project in (self.key, self.value))
        member = labels.bool() if labels.dim() == 2 else F.one_hot(labels, tasks).bool()
        key, value, member = _gather(key), _gather(value), _gather(member)
        present = member.any(0)
        order = self._slot_order(tasks, lq.device)
        keys = self.key_slots(_fill(key, held.keys, member, held.counts, self.capacity, stage, order), present)
        values = self.value_slots(_fill(value, held.values, member, held.counts, self.capacity, stage, order), present)
        absent = ~present[:, None, None, None, None]
        keys = torch.where(absent, held.keys.to(keys), keys)
        values = torch.where(absent, held.values.to(values), values)
        return keys, values, present, logits

    def _slot_order(self, tasks: int, device: torch.device) -> Tensor:
        """[T, M]: a random order of each task's slots, the same for keys and values and on all ranks."""
        if not self.shuffle:
            return torch.arange(self.capacity, device=device).expand(tasks, -1)
        order = torch.rand(tasks, self.capacity, device=device).argsort(1)
        if ranks.number() > 1:
            dist.broadcast(order, src=0)
        return order


def _gather(x: Tensor) -> Tensor:
    """The rows of all ranks, so that they build one bank and share its BatchNorm statistics; gradients flow back."""
    return _Gather.apply(x) if ranks.number() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.number())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(ranks.number())[ranks.rank()]


def _fill(
    samples: Tensor, held: Tensor, member: Tensor, counts: Tensor, capacity: int, stage: int, order: Tensor
) -> Tensor:
    """[T, M, C, h, w]: the slots of each task before they are aggregated, without asking the device anything."""
    cycle = torch.arange(capacity, device=samples.device)
    own = member.T.to(torch.uint8).argsort(
        dim=1, descending=True, stable=True
    )  # a task's samples first, in their order
    filled = samples[own.gather(1, cycle % member.sum(0).clamp(min=1)[:, None])]
    if stage == 1:
        kept = held.shape[1]
        appended = torch.cat((held.to(filled), filled[:, : capacity - kept]), dim=1)
        filled = torch.where((counts == kept)[:, None, None, None, None], appended, filled)
    return filled[torch.arange(len(order), device=order.device)[:, None], order]
