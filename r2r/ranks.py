"""Several processes that train one model, as torchrun starts them: each takes its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(minutes=10)  # with processes that do the same work
_patient: dist.ProcessGroup | None = None  # for waiting until one process has done what only one does


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
    global _patient
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # torchrun ends all where one fails
    try:
        yield device
    finally:
        _patient = None
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here, however long the first one takes to validate."""
    if number() > 1:
        dist.barrier(group=_patient)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does what is in the block, then the others do."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def gathered(value: T) -> list[T]:
    """The values of all processes, in order of rank."""
    values: list[Any] = [value]
    if number() > 1:
        values *= number()
        dist.all_gather_object(values, value, group=_patient)
    return values


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
