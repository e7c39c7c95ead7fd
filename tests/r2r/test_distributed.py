"""Two processes build one bank, and with DDP learn what one process learns from both halves of the batch."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from r2r import R2R
from r2r.losses import LossWeights, restoration_loss
from tests.conftest import TINY

Batch = tuple[Tensor, Tensor, Tensor]


def batches() -> tuple[Batch, Batch]:
    generator = torch.Generator().manual_seed(1)
    lq, hq, ref_lq, ref_hq = torch.rand(4, 4, 3, 32, 32, generator=generator)
    return (lq, hq, torch.tensor([0, 1, 1, 0])), (ref_lq, ref_hq, torch.tensor([0, 0, 1, 1]))


def new_model() -> R2R:
    torch.manual_seed(0)
    model = R2R(tasks=("a", "b"), **TINY).train()
    assert model.amalgamator is not None
    model.amalgamator.shuffle = False
    return model


def step(model: torch.nn.Module, batch: Batch, reference: Batch) -> None:
    out = model(batch[0], batch[2], reference=reference, stage=0)
    restoration_loss(out, batch[1], batch[2], reference[2], LossWeights())["total"].backward()


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batch, reference = ([x[2 * rank : 2 * rank + 2] for x in part] for part in batches())
    model = new_model()
    step(DistributedDataParallel(model), tuple(batch), tuple(reference))  # type: ignore[arg-type]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"bank": model.bank.state_dict(), "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    model = new_model()
    step(model, *batches())
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, buffer in model.bank.state_dict().items():
            torch.testing.assert_close(got["bank"][name], buffer)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-5)
