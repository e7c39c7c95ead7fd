"""Which retrieval retrieves? Small models, real photos, one table (see docs/notes/retrieval.md).

    python benchmarks/retrieval_study.py --train PHOTOS --test OTHER_PHOTOS --out study.json

Every variant trains on the same crops in the same order and is tested on the same held-out crops, five synthesised
degradations. Told: the true task is given. No figure here says anything about the size of the published model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r.data.dataset import TrainingPairs
from r2r.data.sources import build_source
from r2r.fast import R2R
from r2r.losses import LossWeights, classification, restoration_loss
from r2r_kernels.nn import BankRetrieval
from r2r_kernels.reference import task_mask

TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight")
BATCH = 10  # restored; as many build the bank
SIZES: dict[str, Any] = {"width": 8, "encoder_blocks": (1, 1, 1, 4), "memory_blocks": (1, 1, 1, 2), "capacity": 20}


class Dot(BankRetrieval):
    """Dot product / sqrt(Ck h w)."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        similarity = torch.einsum("nd,tsd->nts", query.flatten(1), keys.flatten(2)) / math.sqrt(query[0].numel())
        return mix(similarity, values, task)


class Centred(BankRetrieval):
    """Cosine of what differs from the mean over all slots, times the learnt scale."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        mean = keys.mean((0, 1))
        return super().forward(query - mean, keys - mean, values, counts, task)


class Pooled(BankRetrieval):
    """Keys and query averaged over space: what the image is degraded by, not where."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        unit_query, unit_keys = F.normalize(query.mean((2, 3)), dim=1), F.normalize(keys.mean((3, 4)), dim=2)
        return mix(torch.einsum("nd,tsd->nts", unit_query, unit_keys) * self.scale(query), values, task)


class Positions(BankRetrieval):
    """A query for each position: every position of every image weighs the slots on its own."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        scale = self.scale(query)
        similarity = scale * torch.einsum("nchw,tschw->ntshw", F.normalize(query, dim=1), F.normalize(keys, dim=2))
        scores = similarity.mean((2, 3, 4))
        part = task_mask(scores, task, "hard")[:, :, None, None, None]
        weights = similarity.masked_fill(~part, -torch.inf).flatten(1, 2).softmax(1)
        return torch.einsum("nmhw,mchw->nchw", weights, values.flatten(0, 1)), scores


class TaskMean(BankRetrieval):
    """The default's scores, but the plain mean of the chosen task's values: what the slots add is missing."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        _, scores = super().forward(query, keys, values, counts, task)
        return torch.einsum("nt,tchw->nchw", task_mask(scores, task, "hard").to(values), values.mean(1)), scores


class OwnChoice(BankRetrieval):
    """In training, half of the samples follow the model's own choice, so that the decoder meets wrong ones too."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        if self.training:
            with torch.no_grad():
                own = super().forward(query, keys, values, counts)[1].argmax(1)
            task = torch.where(torch.rand(len(task)) < 0.5, own, task)
        return super().forward(query, keys, values, counts, task)


class Soft(BankRetrieval):
    """No choice at all: the softmax runs over the slots of all tasks, in training and after."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        self.mode = "soft"
        return super().forward(query, keys, values, counts, None if self.training else task)


class Embeddings(BankRetrieval):
    """Control: a linear classifier of the query and one learnt embedding a task instead of a bank."""

    def __init__(self, key_channels: int, values: Tensor) -> None:
        super().__init__()
        self.classify = nn.Linear(key_channels, len(values))
        self.embedding = nn.Parameter(0.1 * torch.randn(values.shape[0], *values.shape[2:]))

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        scores = self.classify(query.mean((2, 3)))
        chosen = task_mask(scores, task, "hard").to(values)
        return torch.einsum("nt,tchw->nchw", chosen, self.embedding), scores


class NoBank(BankRetrieval):
    """Control: nothing is retrieved, the decoder sees D_V twice."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, task: Any = None) -> Any:
        return values.new_zeros(len(query), *values.shape[2:]), query.new_zeros(len(query), len(keys))


def mix(similarity: Tensor, values: Tensor, task: Any) -> tuple[Tensor, Tensor]:
    scores = similarity.mean(2)
    part = task_mask(scores, task, "hard")[:, :, None]
    weights = similarity.masked_fill(~part, -torch.inf).flatten(1).softmax(1)
    return torch.einsum("nm,mchw->nchw", weights, values.flatten(0, 1)), scores


VARIANTS = ("cosine", "published", "dot", "centred", "pooled", "positions", "contrastive", "own-choice", "soft",
            "task-mean", "embeddings", "no-bank")  # fmt: skip


def build(variant: str, seed: int, size: int) -> R2R:
    torch.manual_seed(seed)
    similarity: Any = "published" if variant == "published" else "cosine"
    model = R2R(tasks=TASKS, bank_size=size // 16, similarity=similarity, **SIZES)
    kinds = {"dot": Dot, "centred": Centred, "pooled": Pooled, "positions": Positions, "task-mean": TaskMean,
             "own-choice": OwnChoice, "soft": Soft, "no-bank": NoBank}  # fmt: skip
    if variant in kinds:
        model.retrieval = kinds[variant]()
    if variant == "embeddings":
        model.retrieval = Embeddings(model.bank.keys.shape[2], model.bank.values)
    return model


def contrast(model: R2R) -> Any:
    """Keeps the keys of the last bank with their graph, for a loss that pulls a task's slots together."""
    kept: list[Tensor] = []
    assert model.amalgamator is not None
    model.amalgamator.key_slots.register_forward_hook(lambda *args: kept.append(args[2]))

    def loss() -> Tensor:
        keys = F.normalize(kept.pop().flatten(2), dim=2)
        flat = keys.flatten(0, 1)
        labels = torch.arange(len(keys)).repeat_interleave(keys.shape[1])
        logits = 10 * flat @ F.normalize(keys.mean(1), dim=1).T
        return 0.1 * classification(logits, labels, 0.0)

    return loss


def crops(folder: Path, size: int, number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`number` crops with their tasks in turn, as uint8: lq, hq [number, 3, size, size], labels."""
    sources = [build_source({"task": task, "clean": str(folder)}, TASKS) for task in TASKS]
    pairs = TrainingPairs(sources, size, len(TASKS), seed)
    rng = np.random.default_rng(seed)
    got = []
    for index in range(number):
        source = index % len(TASKS)
        got.append(pairs[(source, int(rng.integers(len(sources[source].pairs))), int(rng.integers(2**62)))])
    lq, hq, labels = (torch.stack(part) for part in zip(*got, strict=True))
    return (lq * 255).round().byte(), (hq * 255).round().byte(), labels


def batches(pool: tuple[Tensor, Tensor, Tensor], steps: int, seed: int) -> Iterator[list[Tensor]]:
    """2 * BATCH crops a step, every task equally often in each half."""
    generator = torch.Generator().manual_seed(seed)
    lq, hq, labels = pool
    by_task = [torch.where(labels == task)[0] for task in range(len(TASKS))]
    for _ in range(steps):
        halves = []
        for _ in range(2):
            halves += [rows[torch.randint(len(rows), (BATCH // len(TASKS),), generator=generator)] for rows in by_task]
        rows = torch.cat(halves)
        yield [lq[rows].float() / 255, hq[rows].float() / 255, labels[rows]]


def train(model: R2R, variant: str, pool: tuple[Tensor, Tensor, Tensor], steps: int, seed: int) -> None:
    weights = LossWeights(match=0.0 if variant == "no-bank" else 0.1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    extra = contrast(model) if variant == "contrastive" else None
    model.train()
    for step, (lq, hq, labels) in enumerate(batches(pool, steps, seed)):
        out = model(lq[:BATCH], labels[:BATCH], reference=(lq[BATCH:], hq[BATCH:], labels[BATCH:]),
                    stage=int(step >= steps // 2))  # fmt: skip
        loss = restoration_loss(out, hq[:BATCH], labels[:BATCH], labels[BATCH:], weights)["total"]
        if extra is not None:
            loss = loss + extra()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        schedule.step()


@torch.inference_mode()
def test(model: R2R, pool: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """PSNR over all crops blind, told, and told a wrong task; PSNR of the input; share matched; PSNR by task, blind."""
    model.eval()
    lq, hq, labels = pool[0].float() / 255, pool[1].float() / 255, pool[2]
    wrong = (labels + 1) % len(TASKS)

    def psnr(images: Tensor) -> Tensor:
        return -10 * (images.clamp(0, 1) - hq).square().mean((1, 2, 3)).clamp(min=1e-10).log10()

    blind, told, misled, right = [], [], [], []
    for rows in torch.arange(len(lq)).split(50):
        result = model.restore(lq[rows])
        blind.append(result.image)
        right.append(result.task == labels[rows])
        told.append(model.restore(lq[rows], labels[rows]).image)
        misled.append(model.restore(lq[rows], wrong[rows]).image)
    values = psnr(torch.cat(blind))
    return {
        "blind": values.mean().item(),
        "told": psnr(torch.cat(told)).mean().item(),
        "misled": psnr(torch.cat(misled)).mean().item(),
        "input": psnr(lq).mean().item(),
        "accuracy": torch.cat(right).float().mean().item(),
        "by_task": {task: values[labels == index].mean().item() for index, task in enumerate(TASKS)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--crop", type=int, default=64)
    options = parser.parse_args()
    pool = crops(options.train, options.crop, 4000, seed=1)
    held_out = {size: crops(options.test, size, 300, seed=2) for size in (options.crop, 2 * options.crop)}
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for seed in options.seeds:
        for variant in options.variants:
            model = build(variant, seed, options.crop)
            started = time.perf_counter()
            train(model, variant, pool, options.steps, seed)
            minutes = (time.perf_counter() - started) / 60
            for size, crops_of_size in held_out.items():
                rows.append({"variant": variant, "seed": seed, "steps": options.steps, "size": size,
                             "minutes": minutes, **test(model, crops_of_size)})  # fmt: skip
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
