"""Two processes build one bank, and with DDP learn what one process learns from both halves of the batch."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from skimage import data
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from r2r import R2R
from r2r.data.images import write_rgb
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


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """`r2r train` by torchrun: the same weights and bank, and one log; both phases, both stages, averaged weights."""
    for name, photo in (("astronaut", data.astronaut()), ("coffee", data.coffee())):
        write_rgb(tmp_path / "photos" / f"{name}.png", photo[:96, :96].astype("float32") / 255)
    (tmp_path / "config.yaml").write_text(
        "tasks: [denoise, lowlight]\n"
        "data: [{task: denoise, clean: photos}, {task: lowlight, clean: photos}]\n"
        "validation: [{task: denoise, clean: photos, sigma: 25}]\n"
        f"preset: tiny\nmodel: {json.dumps(TINY)}\n"
        "pretrain: {epochs: 2, steps: 3, crop: 32, batch_size: 8, accumulate: 2, lr: 1.0e-4}\n"
        "finetune: {epochs: 1, steps: 2, crop: 32, batch_size: 4, lr: 1.0e-4}\n"
        "workers: 0\nlog_every: 1\ndevice: cpu\n"
    )
    command = [Path(sys.executable).with_name("r2r"), "train", tmp_path / "config.yaml"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for start, out in (([], "one"), (torchrun, "two")):
        arguments = [str(part) for part in [*start, *command, f"out={tmp_path / out}"]]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (R2R.from_pretrained(tmp_path / out / "last").state_dict() for out in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
    logs = []
    for out in ("one", "two"):
        with (tmp_path / out / "log.csv").open(newline="") as file:
            logs.append(list(csv.DictReader(file)))
    assert [(row["phase"], row["step"]) for row in logs[0]] == [(row["phase"], row["step"]) for row in logs[1]]
    assert len(logs[0]) == 11
    for ours, theirs in zip(*logs, strict=True):
        for key in ("total", "psnr", "accuracy", "valid_psnr"):
            assert float(ours[key] or 0) == pytest.approx(float(theirs[key] or 0), rel=1e-3)


def test_a_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [str(Path(sys.executable).with_name("r2r")), "train", "tasks=[denoise]", f"out={tmp_path / 'run'}"]
    write_rgb(tmp_path / "photos" / "astronaut.png", data.astronaut()[:96, :96].astype("float32") / 255)
    command += [f"data=[{{task: denoise, clean: {tmp_path / 'photos'}}}]", "preset=tiny", "device=cpu"]
    done = subprocess.run([*command, "pretrain.batch_size=6"], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: pretrain.batch_size is 6, which 2 processes cannot share; accepted: multiples of 4" in done.stderr
    assert "such as 4 or 8, or another number of processes" in done.stderr


def torchrun(*command: str | Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, *(str(part) for part in command)]


def small_run(folder: Path) -> Path:
    for name, photo in (("astronaut", data.astronaut()), ("coffee", data.coffee())):
        write_rgb(folder / "photos" / f"{name}.png", photo[:96, :96].astype("float32") / 255)
    path = folder / "config.yaml"
    path.write_text(
        "tasks: [denoise, lowlight]\n"
        "data: [{task: denoise, clean: photos}, {task: lowlight, clean: photos}]\n"
        f"preset: tiny\nmodel: {json.dumps(TINY)}\n"
        "pretrain: {epochs: 2, steps: 2000, crop: 32, batch_size: 8, lr: 1.0e-3}\n"
        "finetune: {epochs: 0}\n"
        "workers: 1\nlog_every: 2\nsave_every: 10000\ndevice: cpu\n"
    )
    return path


def test_a_signal_to_torchrun_saves_the_run(tmp_path: Path) -> None:
    config, out = small_run(tmp_path), tmp_path / "run"
    command = torchrun("--no-python", Path(sys.executable).with_name("r2r"), "train", config, f"out={out}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while process.poll() is None and not (
            (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") > 3
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert "interrupted; what was done so far is kept" in errors
    with (out / "log.csv").open(newline="") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file)]
    state = torch.load(out / "last.ckpt", weights_only=True)
    assert state["position"][3] == logged[-1] >= 6


def test_processes_that_see_other_folders_are_told(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import datetime\n"
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "import torch.distributed as dist\n"
        "from r2r import ranks\n"
        "from r2r.config import load_config\n"
        "from r2r.training import Trainer\n"
        "with ranks.joined('cpu'):\n"
        "    patience = dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout\n"
        "    assert patience == datetime.timedelta(minutes=10), patience\n"
        "    one = load_config(Path(sys.argv[1]), [f'out={sys.argv[1]}.run{ranks.rank()}'])\n"
        "    trainer = Trainer(one)\n"
        "    assert trainer.step == 0\n"
        "    if ranks.rank() == 0:\n"
        "        trainer.step, trainer.batch = 7, 7\n"
        "        trainer._save()\n"
        "    ranks.wait()\n"
        "    Trainer(one)\n"
    )
    command = torchrun(script, config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0
    assert "process 1 would start at step 0, process 0 at 7" in done.stderr, done.stderr
