"""Train R2R in a loop of your own: both stages of pretraining, then finetuning on the frozen bank.

    python examples/train.py PHOTOS MODEL --steps 2000

PHOTOS is a folder of clean photos; noise and low light are made from them. For pairs of your own, a source is
{"task": "denoise", "pairs": "my_pairs"} (docs/training.md). `r2r train` does more, and can be interrupted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from r2r.data.dataset import TrainingPairs, worker_init
from r2r.data.sampler import EpochSampler
from r2r.data.sources import build_source
from r2r.fast import R2R
from r2r.losses import LossWeights, restoration_loss
from r2r.presets import PRESETS

TASKS = ("denoise", "lowlight")


def batches(photos: Path, crop: int, batch_size: int, steps: int, workers: int, bank: bool) -> Iterator[list[Tensor]]:
    """Degraded and clean crops [N, 3, crop, crop] in [0, 1] and labels [N]; bank: every task is in the second half."""
    sources = [build_source({"task": task, "clean": str(photos)}, TASKS) for task in TASKS]
    pairs = TrainingPairs(sources, crop, len(TASKS))
    sampler = EpochSampler(sources, batch_size, len(TASKS), steps=steps, bank=bank)
    yield from DataLoader(pairs, batch_sampler=sampler, num_workers=workers, worker_init_fn=worker_init)


def train(photos: Path, out: Path, preset: str, steps: int, workers: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = R2R(tasks=TASKS, **PRESETS[preset]).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    weights = LossWeights()

    optimiser = torch.optim.Adam(model.parameters(), lr=5e-4)
    for step, batch in enumerate(batches(photos, 64, 16, steps, workers, bank=True)):
        lq, hq, labels = (x.to(device) for x in batch)
        # Half of the pairs are restored. The others build the bank: anew in stage 0, from what it holds in stage 1.
        (lq, ref_lq), (hq, ref_hq), (labels, ref_labels) = lq.chunk(2), hq.chunk(2), labels.chunk(2)
        stage = 0 if step < steps / 2 else 1
        output = model(lq, labels, reference=(ref_lq, ref_hq, ref_labels), stage=stage)
        losses = restoration_loss(output, hq, labels, ref_labels, weights)
        update(model, optimiser, losses["total"], rate=5e-4 * (1 + math.cos(math.pi * step / steps)) / 2)
        report("pretraining", step, losses)

    model.freeze_bank()  # drops the amalgamator, so that the optimiser is a new one
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    for step, batch in enumerate(batches(photos, 128, 4, max(1, steps // 10), workers, bank=False)):
        lq, hq, labels = (x.to(device) for x in batch)
        losses = restoration_loss(model(lq, labels), hq, labels, None, weights)
        update(model, optimiser, losses["total"], rate=1e-4)
        report("finetuning", step, losses)
    model.eval().save_pretrained(out)


def update(model: R2R, optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimiser.step()
    optimiser.zero_grad()


def report(phase: str, step: int, losses: dict[str, Tensor]) -> None:
    if step % 50 == 0:
        print(f"{phase} step {step}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of clean photos, 128 x 128 or larger")
    parser.add_argument("model", type=Path, help="folder for the trained model")
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="sizes of the model")
    parser.add_argument("--steps", type=int, default=2000, help="of pretraining; a tenth more finetunes")
    parser.add_argument("--workers", type=int, default=2, help="processes that read photos")
    given = parser.parse_args()
    train(given.photos, given.model, given.preset, given.steps, given.workers)
