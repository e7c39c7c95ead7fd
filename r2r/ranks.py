"""Several processes that train one model, as torchrun starts them: each takes its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def number() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if number() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join what torchrun has started (nothing, without it); gives the device of this process: a GPU each, for "auto"
    and "cuda" where there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # The others wait while the first validates, however long that takes; torchrun ends them where one fails.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=7))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a sequence that can be divided evenly; those of all, in order of rank, are the whole."""
    each = len(items) // number()
    return items[rank() * each : (rank() + 1) * each]


def highest(x: int, device: torch.device) -> int:
    """Of all processes."""
    if number() == 1:
        return x
    most = torch.tensor(x, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def mean(x: Tensor) -> Tensor:
    """Over all processes."""
    if number() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / number()
