"""Who decides what is wrong with a photo? Designs of the decision at equal cost, one table (see docs/blind.md).

    python benchmarks/blind_study.py --out study.json [--model MODEL]

The backbone of a trained model stays as it is. Each design trains a query convolution and keys of its own on the same
features of the same crops, with three seeds, and decides for the test photos; the model then restores them so. Photos
are those of configs/default_weights.yaml, calibrate_default.yaml, evaluate_default.yaml and evaluate_blind_study.yaml.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2r.calibration import Observations, fit
from r2r.config import load_config
from r2r.data.dataset import TrainingPairs
from r2r.data.sampler import EpochSampler
from r2r.data.sources import build_source
from r2r.evaluation import EvaluationSet, load_sets
from r2r.fast import R2R
from r2r.model import area_resize
from r2r_kernels.nn import BankRetrieval

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {64: (48, 0.25), 96: (24, 0.15), 128: (16, 0.2), 176: (8, 0.1), 256: (6, 0.3)}
"""Sides of training crops: how many a batch, and the share of the time that is spent on them."""
SIDE, PHOTOS = 256, 10  # of the test photos' middle, and of each set
EPOCHS, RATE = 14, 2e-3
CAMERA = ("denoise", "dejpeg")  # either is right for camera noise: its photos were saved as JPEG 75
SEVERAL, UNKNOWN, NOTHING = "several faults", "unknown faults", "nothing wrong"
Batches = list[tuple[Tensor, Tensor]]
Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Design:
    """classes: "task" for a softmax over the tasks, "task or clean" with one more class, "each" for a score a task.
    clean: photos with nothing wrong are trained on. threshold: what is less certain than 95 % of the clean photos that
    it is calibrated on is left alone. passes: over a photo."""

    classes: str
    clean: bool = True
    threshold: bool = False
    passes: int = 1


DESIGNS = {
    "single-label": Design("task", clean=False),
    "single-label, threshold": Design("task", clean=False, threshold=True),
    'single-label, class "clean"': Design("task or clean"),
    'single-label, class "clean", threshold': Design("task or clean", threshold=True),
    "multi-label": Design("each"),
    "multi-label, trained without clean photos": Design("each", clean=False),
    "multi-label, two passes": Design("each", passes=2),
}


@dataclass(frozen=True)
class Photo:
    kind: str
    lq: Tensor
    hq: Tensor
    labels: Tensor
    deep: Tensor


class Head(nn.Module):
    """Query convolution and keys as a model has them; [N, C, h, w] -> scores [N, classes]."""

    def __init__(self, model: R2R, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        _, slots, channels, size, _ = model.bank.keys.shape
        self.query = nn.Conv2d(model.query_key.in_channels, channels, 3, padding=1)
        self.keys = nn.Parameter(0.1 * torch.randn(classes, slots, channels, size, size))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.retrieval = BankRetrieval()
        self.register_buffer("counts", torch.full((classes,), slots))

    def forward(self, deep: Tensor) -> Tensor:
        size = self.keys.shape[-1]
        query = area_resize(self.query(deep), size, size).flatten(1)[:, None]
        return self.retrieval.scores(query, self.keys, self.get_buffer("counts")).mean(1) + self.bias


def training_features(model: R2R, seconds: float) -> Batches:
    """Deep features of training crops of all sizes, with their labels."""
    config = load_config(CONFIGS / "default_weights.yaml")
    sources = [build_source(entry, config.tasks) for entry in config.data]
    batches = []
    for side, (number, share) in SIZES.items():
        fitting = [one for one in sources if side <= 176 or one.name != "blurred pairs"]  # those are 320 x 180
        pairs = TrainingPairs(fitting, side, len(config.tasks), 7, True, 2**30)
        started = time.monotonic()
        for indices in EpochSampler(fitting, number, len(config.tasks), 7 + side, steps=10**6, bank=False):
            lq, _, labels = (torch.stack(part) for part in zip(*(pairs[index] for index in indices), strict=True))
            batches.append((model.encode(_last(lq)).deep.half(), labels))
            if time.monotonic() - started > share * seconds:
                break
    return batches


def test_photos(model: R2R) -> list[Photo]:
    photos, clean = [], []
    files = [CONFIGS / name for name in ("evaluate_default.yaml", "evaluate_blind_study.yaml")]
    for one in [one for file in files for one in load_sets(file, model.tasks, True)]:
        step = max(1, len(one.pairs) // PHOTOS)
        for index in range(min(PHOTOS, len(one.pairs))):
            pair = one.pairs[index * step]
            lq, hq = (_last(_middle(image)[None]) for image in (pair.lq, pair.hq))
            labels = _labels(model, one)
            kind = SEVERAL if len(one.labels) > 1 else one.name if one.labels else NOTHING
            if one.name == "snow":
                kind, labels = UNKNOWN, torch.zeros_like(labels)
            photos.append(Photo(kind, lq, hq, labels, model.encode(lq).deep))
            if one.name == "clean":
                clean.append(hq)
    for hq in clean:
        striped = (hq + 0.12 * torch.sin(torch.arange(SIDE) * 2 * math.pi / 5)).clamp(0, 1)
        photos.append(Photo(UNKNOWN, striped, hq, torch.zeros(len(model.tasks)), model.encode(striped).deep))
    return photos


def _labels(model: R2R, one: EvaluationSet) -> Tensor:
    labels = torch.zeros(len(model.tasks))
    labels[list(one.labels)], labels[list(one.optional)] = 1, 0.5
    return labels


def train(model: R2R, design: Design, batches: Batches, seed: int) -> Head:
    tasks = len(model.tasks)
    head = Head(model, tasks + (design.classes == "task or clean"), seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE)
    steps, shuffle = EPOCHS * len(batches), random.Random(seed).shuffle
    order, step = list(range(len(batches))), count()
    with torch.enable_grad():
        for _ in range(EPOCHS):
            shuffle(order)
            for index in order:
                deep, labels = batches[index]
                kept = torch.full((len(labels),), True) if design.clean else (labels > 0).any(1)
                deep, labels = deep[kept].float(), labels[kept].float()
                optimizer.param_groups[0]["lr"] = RATE * (1 - next(step) / steps)
                scores = head(deep)
                if design.classes == "each":
                    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none") * (labels != 0.5)
                    loss = losses.sum(1).mean()
                else:  # of several faults, the first
                    classes = (labels == 1).float().argmax(1)
                    loss = F.cross_entropy(scores, torch.where((labels > 0).any(1), classes, tasks))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return head.eval()


def decision(
    model: R2R, design: Design, head: Head, calibration: Sequence[tuple[Tensor, Tensor, float]]
) -> Callable[[Tensor], Mask]:
    """Deep features [1, C, h, w] -> which tasks take part. calibration: features, labels and weights of its photos."""
    seen = torch.cat([head(deep.float()) for deep, _, _ in calibration])
    labels = torch.stack([one for _, one, _ in calibration])
    if design.classes == "each":
        gain, offset = fit(Observations(seen, labels, torch.tensor([weight for _, _, weight in calibration])))
        return lambda deep: tuple((head(deep)[0] * gain + offset > 0).tolist())
    tasks, least = len(model.tasks), 0.0
    if design.threshold:
        certainty = seen.softmax(1)[:, :tasks].amax(1)[~(labels > 0).any(1)]
        least = certainty.quantile(0.95).item()

    def decide(deep: Tensor) -> Mask:
        shares = head(deep)[0].softmax(0)
        chosen = int(shares.argmax())
        taken = chosen < tasks and shares[chosen] > least
        return tuple(bool(taken and task == chosen) for task in range(tasks))

    return decide


def measure(model: R2R, photos: list[Photo], decide: Callable[[Tensor], Mask], passes: int) -> dict[str, float]:
    """In per cent: matched, left alone, harmed (more than 1 dB below the input). In dB: what was gained."""
    rows: dict[str, list[tuple[bool, bool, float]]] = {}
    for photo in photos:
        image, found = photo.lq, decide(photo.deep)
        for again in range(passes):
            now = decide(model.encode(image).deep) if again else found
            if any(now):
                image = model.restore(image, torch.tensor([now])).image.clamp(0, 1)
        gained = _psnr(image, photo.hq) - _psnr(photo.lq, photo.hq) if any(found) else 0.0
        mask = torch.tensor(found)
        right = bool(((mask == (photo.labels == 1)) | (photo.labels == 0.5)).all())
        if photo.kind == "camera noise":
            right = {name for name, one in zip(model.tasks, found, strict=True) if one}.issubset(CAMERA) and any(found)
        rows.setdefault(photo.kind, []).append((right, not any(found), gained))
    single = [rows[kind] for kind in rows if kind not in (SEVERAL, UNKNOWN, NOTHING)]
    mean = statistics.fmean
    faults = [row for kind in rows if kind != NOTHING for row in rows[kind]]
    return {
        "matched": 100 * mean(mean(right for right, _, _ in kind) for kind in single),
        "gained": mean(mean(gained for _, _, gained in kind) for kind in single),
        "gained, several": mean(gained for _, _, gained in rows[SEVERAL]),
        "left alone, nothing wrong": 100 * mean(left for _, left, _ in rows[NOTHING]),
        "left alone, unknown": 100 * mean(left for _, left, _ in rows[UNKNOWN]),
        "gained, unknown": mean(gained for _, _, gained in rows[UNKNOWN]),
        "harmed": 100 * mean(gained < -1 for _, _, gained in faults),
    }


@torch.no_grad()
def study(model: R2R, seconds: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    model.eval()
    batches, photos = training_features(model, seconds), test_photos(model)
    calibration = [
        (model.encode(_last(one.pairs[index].lq[None])).deep, _labels(model, one), one.share / len(one.pairs))
        for one in load_sets(CONFIGS / "calibrate_default.yaml", model.tasks, True)
        for index in range(len(one.pairs))
    ]
    results = []
    for seed in seeds:
        heads: dict[tuple[str, bool], Head] = {}
        for name, design in DESIGNS.items():
            kind = design.classes, design.clean
            if kind not in heads:
                heads[kind] = train(model, design, batches, seed)
            decide = decision(model, design, heads[kind], calibration)
            results.append({"design": name, "seed": seed, **measure(model, photos, decide, design.passes)})
            print(results[-1], flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    columns = [key for key in results[0] if key not in ("design", "seed")]
    lines = ["| design | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(row["design"] for row in results):
        values = [[row[key] for row in results if row["design"] == name] for key in columns]
        cells = [f"{statistics.fmean(v):.2f} ± {statistics.stdev(v):.2f}" for v in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _psnr(image: Tensor, clean: Tensor) -> float:
    return min(100.0, -10 * math.log10(max(1e-10, float((image - clean).square().mean()))))


def _middle(image: Tensor) -> Tensor:
    top, left = ((length - SIDE) // 2 for length in image.shape[1:])
    return image[:, top : top + SIDE, left : left + SIDE]


def _last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="by default the weights of the package")
    parser.add_argument("--seconds", type=float, default=260, help="that are spent on training features")
    given = parser.parse_args()
    loaded = R2R.from_pretrained(given.model) if given.model else R2R.from_pretrained()
    assert isinstance(loaded, R2R)
    results = study(loaded, given.seconds, (0, 1, 2))
    given.out.write_text(json.dumps(results, indent=1))
    print(table(results))
