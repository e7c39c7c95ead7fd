"""Figures of models and runs, as picture files: matplotlib's formats, of which the name's suffix chooses one."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r2r.errors import InputError
from r2r.evaluation import Evaluation, EvaluationSet
from r2r.files import atomic_path
from r2r.metrics import centre_crop
from r2r.model import R2R
from r2r.training import VALIDATION_LOG

Points = tuple[Tensor, list[int]]
"""Vectors [N, D], and of each the index of its task, -1 where nothing is wrong."""


def plot_bank(model: R2R, sets: Sequence[EvaluationSet], path: Path, seed: int = 0) -> None:
    """t-SNE of keys and queries, before and after training, side by side (R2R, figure of the bank).

    Queries are those of the sets' photos; keys those of the bank. Before training: a new model of the same sizes, whose
    bank is built from the photos with an even index and whose queries are those of the others. Both are compared by the
    cosine, as retrieval does. Raises InputError for fewer than ten photos in all and for photos that do not fit.
    """
    from sklearn.manifold import TSNE

    if sum(len(one.pairs) for one in sets) < 10:
        raise InputError("a picture of the bank needs ten photos or more")
    axes, figure = _axes(2, 6, 6)
    for axis, title, (keys, queries) in (
        (axes[0], "before training", _before(model, sets, seed)),
        (axes[1], "after training", (_keys(model), _queries(model, sets))),
    ):
        vectors = F.normalize(torch.cat((keys[0], queries[0])), dim=1).cpu().double().numpy()
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(vectors)
        for points, labels, marker, size in (
            (places[: len(keys[1])], keys[1], "s", 14),
            (places[len(keys[1]) :], queries[1], "o", 40),
        ):
            for task in sorted(set(labels)):
                chosen = points[np.array(labels) == task]
                name = model.tasks[task] if task >= 0 else "nothing wrong"
                colour = "0.6" if task < 0 else f"C{task % 10}"
                edge = "none" if marker == "s" else "black"
                label = f"{name}: {'keys' if marker == 's' else 'queries'}"
                axis.scatter(
                    *chosen.T, s=size, marker=marker, color=colour, edgecolors=edge, linewidths=0.5, label=label
                )
        axis.set(title=title, xticks=[], yticks=[])
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _write(figure, path)


@torch.inference_mode()
def _queries(model: R2R, sets: Sequence[EvaluationSet], part: slice = slice(None)) -> Points:
    device = next(model.parameters()).device
    vectors, labels = [], []
    for one in sets:
        for index in range(len(one.pairs))[part]:
            lq = centre_crop(one.pairs[index].lq)[None].to(device)
            query, _ = model.query(model.encode(lq).deep)
            vectors.append(F.adaptive_avg_pool2d(query, model.bank.size).flatten(1))
            labels.append(one.labels[0] if one.labels else -1)
    return torch.cat(vectors), labels


def _keys(model: R2R) -> Points:
    bank = model.bank
    held = [(task, slot) for task, count in enumerate(bank.counts.tolist()) for slot in range(count)]
    return torch.stack([bank.keys[place].flatten() for place in held]), [task for task, _ in held]


@torch.no_grad()
def _before(model: R2R, sets: Sequence[EvaluationSet], seed: int) -> tuple[Points, Points]:
    """Keys and queries of a new model."""
    torch.manual_seed(seed)
    new = R2R(**{**model.config, "mixtures": False, "amalgamator": True})
    side = new.stride * new.bank.size
    lq: list[Tensor] = []
    hq: list[Tensor] = []
    labels = []
    for one in sets:
        for index in range(len(one.pairs))[::2] if one.labels else ():
            pair = one.pairs[index]
            top, left = ((length - side) // 2 for length in pair.hq.shape[1:])
            if top < 0 or left < 0:
                raise InputError(f"{pair.name} is smaller than the {side} x {side} pixels that a slot was made of")
            for kept, image in ((lq, pair.lq), (hq, pair.hq)):
                kept.append(image[:, top : top + side, left : left + side])
            labels.append(one.labels[0])
    images = torch.stack(lq)
    told = torch.tensor(labels)
    new.train()
    new(images[:1], told[:1], reference=(images, torch.stack(hq), told))
    new.eval()
    return _keys(new), _queries(new, sets, slice(1, None, 2))


def plot_confusion(result: Evaluation, path: Path) -> None:
    """For how many images of each task (rows) which tasks were found (columns), blind."""
    counts = np.array(result.confusion)
    numbers = [sum(len(one.images) for one in result.sets if task in one.tasks) for task in result.tasks]
    rows = [index for index, number in enumerate(numbers) if number]
    if not rows:
        raise InputError("no set has a task: there is no confusion to show")
    shares = counts[rows] / np.array(numbers)[rows, None]
    (axis,), figure = _axes(1, 1.6 + 0.8 * len(result.tasks), 1.2 + 0.6 * len(rows))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, index in enumerate(rows):
        for x in range(len(result.tasks)):
            axis.text(
                x, y, counts[index, x], ha="center", va="center", color="white" if shares[y, x] > 0.5 else "black"
            )
    axis.set_xticks(range(len(result.tasks)), result.tasks, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), [f"{result.tasks[index]} ({numbers[index]})" for index in rows])
    axis.set(xlabel="found", ylabel="is")
    _write(figure, path)


def plot_curves(run: Path, path: Path) -> None:
    """PSNR and SSIM of each validation set over the steps of a run, blind and told the task.

    Raises InputError where the run has not validated yet.
    """
    try:
        with (run / VALIDATION_LOG).open(newline="") as file:
            rows = list(csv.DictReader(file))
        curves: dict[str, list[dict[str, float]]] = defaultdict(list)
        for row in rows:
            numbers = {key: float(row[key]) for key in ("step", "psnr", "ssim", "told_psnr", "told_ssim") if row[key]}
            curves[row["set"]].append(numbers)
    except FileNotFoundError:
        raise InputError(f"{run / VALIDATION_LOG} is not there: the run has validated nothing yet") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run / VALIDATION_LOG} cannot be read: {error}") from error
    if not curves:
        raise InputError(f"{run / VALIDATION_LOG} is empty: the run has validated nothing yet")
    axes, figure = _axes(2, 6, 4)
    for axis, key, label in ((axes[0], "psnr", "PSNR in dB"), (axes[1], "ssim", "SSIM")):
        for index, (name, points) in enumerate(curves.items()):
            for prefix, style in (("", "-"), ("told_", "--")):
                shown = [(one["step"], one[prefix + key]) for one in points if prefix + key in one]
                if shown:
                    axis.plot(*zip(*shown, strict=True), style, marker=".", color=f"C{index % 10}",
                              label=f"{name}{', told' if prefix else ', blind'}")  # fmt: skip
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _write(figure, path)


def _axes(number: int, width: float, height: float) -> tuple[Sequence[Any], Any]:
    """Without a display, and without touching what a notebook shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(number * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots(1, number, squeeze=False)[0], figure


def _write(figure: Any, path: Path) -> None:
    accepted = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in accepted:
        raise InputError(
            f"{path}: a picture as {path.suffix or 'a file without suffix'}; accepted: {', '.join(accepted)}"
        )
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=150)
