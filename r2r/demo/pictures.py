"""The demo's pictures: restored photos, the bank and the training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from r2r.demo.photos import CROPS, TASKS
from r2r.evaluation import EvaluationSet
from r2r.files import atomic_path
from r2r.metrics import psnr
from r2r.model import R2R

COLOURS = dict(zip(TASKS, ("#0072b2", "#009e73", "#7a7a7a", "#cc79a7", "#e69f00"), strict=True))
SHOWN = {"denoise": "chelsea", "derain": "coffee", "dehaze": "motorcycle", "deblur": "motorcycle", "lowlight": "coffee"}


class Shown(NamedTuple):
    """A held-out photo for the contact sheet, images [3, H, W] in [0, 1], and the task that was chosen for it."""

    task: str
    chosen: str
    degraded: Tensor
    restored: Tensor
    clean: Tensor


def restored(model: R2R, one: EvaluationSet) -> Shown:
    pair = next(one.pairs[i] for i in range(len(one.pairs)) if one.pairs[i].name == SHOWN[one.name])
    result = model.restore(pair.lq[None])
    return Shown(one.name, TASKS[int(result.task)], pair.lq, result.image[0].clamp(0, 1), pair.hq)


def draw_sheet(path: Path, rows: Sequence[Shown]) -> None:
    """Degraded, restored and clean side by side, a row for each task; what was chosen and PSNR under each."""
    figure = Figure(figsize=(12, 2.95 * len(rows)), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        right = "right" if row.chosen == row.task else f"wrong, it is {row.task}"
        before, after = (float(psnr(image, row.clean)) for image in (row.degraded, row.restored))
        captions = (
            f"{row.task}: degraded, {before:.2f} dB",
            f"restored blind as {row.chosen} ({right}), {after:.2f} dB",
            "clean",
        )
        for axis, image, caption in zip(axes, (row.degraded, row.restored, row.clean), captions, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_axis_off()
            axis.set_title(caption, y=-0.11, fontsize=10)
    _save(figure, path)


def draw_bank(path: Path, model: R2R, crops: Sequence[EvaluationSet]) -> None:
    """The bank's keys and the queries of held-out crops, all of unit length, in their two principal directions."""
    with torch.inference_mode():
        queries = [
            F.adaptive_avg_pool2d(model.query(model.encode(pair.lq[None]).deep)[0], model.bank.size)
            for one in crops
            for pair in (one.pairs[index] for index in range(len(one.pairs)))
        ]
    query = F.normalize(torch.cat(queries).flatten(1), dim=1).numpy()
    keys = F.normalize(model.bank.keys.flatten(2), dim=2).flatten(0, 1).numpy()
    # keys are never negative and queries may be: each cloud around its own mean
    keys, query = (cloud - cloud.mean(0) for cloud in (keys, query))
    spread = PCA(2).fit(np.concatenate((keys, query)))
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axis = figure.subplots()
    slots = model.bank.keys.shape[1]
    for index, task in enumerate(TASKS):
        colour = COLOURS[task]
        own = spread.transform(keys[index * slots : (index + 1) * slots])
        asked = spread.transform(query[index * CROPS : (index + 1) * CROPS])
        axis.scatter(
            own[:, 0],
            own[:, 1],
            color=colour,
            marker="s",
            s=45,
            edgecolors="black",
            linewidths=0.5,
            label=f"{task}: keys",
        )
        axis.scatter(
            asked[:, 0], asked[:, 1], color=colour, marker="o", s=22, alpha=0.55, linewidths=0, label="queries"
        )
    axis.set(xlabel="first principal direction", ylabel="second")
    axis.legend(fontsize=8, ncols=2)
    _save(figure, path)


def draw_losses(path: Path, log: Path) -> None:
    """Loss, PSNR and matching accuracy of the training batches, over the steps; where the phases change."""
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["total"]]
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    titles = {"total": "loss", "psnr": "PSNR in dB", "accuracy": "share matched"}
    for axis, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        axis.plot(steps, [float(row[key]) for row in rows], color="#0072b2", linewidth=1.2)
        for before, after in pairwise(rows):
            if before["phase"] != after["phase"]:
                axis.axvline(int(before["step"]), color="#7a7a7a", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="step (dashed: the bank is frozen, the crops grow)")
        axis.grid(alpha=0.25)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=110)
