"""Two processes train a swapped model as one process trains the model: DDP and FSDP2, on the operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import r2r_kernels
from r2r_kernels import functional
from tests.r2r_kernels.test_swap import NAFBlock

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NAFBlock(4), NAFBlock(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_()
    return model


def images() -> Tensor:
    return torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (2,))
    for part in (model[1], model[2], model):
        fully_shard(part, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    calls, operator = [], functional.naf_block

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return operator(*args)

    functional.naf_block = counted  # type: ignore[assignment]
    answers: dict[str, Any] = {}
    for name, wrap in WRAPPERS.items():
        model = new_model()
        r2r_kernels.accelerate(model)
        calls.clear()
        wrapped = wrap(model)
        wrapped(images()[rank : rank + 1]).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        whole = [g.full_tensor() if name == "FSDP2" else g for g in gradients]  # type: ignore[union-attr]
        answers[name] = {"calls": len(calls), "gradients": whole}
    model = new_model()
    sharded(model)
    answers["left"] = r2r_kernels.accelerate(model).left
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_and_fsdp2_train_a_swapped_model_as_one_process_trains_the_model(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    model = new_model()
    model(images()).square().sum().div(2).backward()  # both average over the processes
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in ("DDP", "FSDP2"):
            assert got[name]["calls"] == 2
            for gradient, parameter in zip(got[name]["gradients"], model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)
        assert "FSDP does not support deepcopy" in got["left"]["1"]  # sharded first: named, and left
