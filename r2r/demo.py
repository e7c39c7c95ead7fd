"""The demo: train a small model here, on photos that come with scikit-image and scikit-learn, and look at what it does.

One folder holds it all: `photos/`, the training run in `run/`, the model in `model/`, three pictures, and `index.html`.
"""

from __future__ import annotations

import csv
import html
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from skimage import data
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from torch import Tensor
from torch.utils.data import ConcatDataset

from r2r.cli import TrainingDisplay
from r2r.config import LossConfig, PhaseConfig, TrainConfig
from r2r.data.dataset import EvaluationPair, EvaluationPairs, Source, TrainingPairs
from r2r.data.degradations import TASK_DEGRADATIONS, parse_degradation
from r2r.data.folders import Pair, clean_folder
from r2r.data.images import write_rgb
from r2r.errors import InputError
from r2r.evaluation import Evaluation, EvaluationSet, evaluate
from r2r.files import atomic_path
from r2r.losses import LossWeights, restoration_loss
from r2r.metrics import psnr
from r2r.model import R2R
from r2r.training import Trainer, build_model

TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight")
COLOURS = dict(zip(TASKS, ("#0072b2", "#009e73", "#7a7a7a", "#cc79a7", "#e69f00"), strict=True))
TRAINING_PHOTOS = ("astronaut", "rocket", "camera", "brick", "coins", "grass", "gravel", "page", "immunohistochemistry")
SHOWN = {"denoise": "chelsea", "derain": "coffee", "dehaze": "motorcycle", "deblur": "motorcycle", "lowlight": "coffee"}
HEIGHT, WIDTH = 256, 384  # of the held-out photos, all alike to lie side by side
CROP, CROPS = 128, 24  # of the held-out crops: size, number for each task

# What the default time on two cores is meant to reach.
IMPROVED, MATCHED = 4, 0.8

FINETUNING = 0.45  # share of the time: it restores the whole batch, at the size of the held-out crops
EPOCHS = 10  # in each phase; the run is saved after each
MOST_STEPS = 250  # in an epoch: what a faster machine could do beyond that gains little
DATA_SHARE = 1.25  # of the time a step takes alone: batches are made in between
HELD_OUT_SEED = 7
DRAWS = 4  # how often each held-out photo is degraded afresh
PLAN = "plan.json"
PICTURES = {
    "contact_sheet": "Held-out photos: degraded, restored blind, clean.",
    "bank": "Keys of the bank and queries of held-out crops, each cloud around its own mean.",
    "losses": "Training: loss, PSNR and matching on the batches.",
}


@dataclass(frozen=True)
class Plan:
    """What a demo was started with, and the steps in an epoch of each phase that the machine could do in that time."""

    seed: int
    minutes: float
    pretrain: int = 1
    finetune: int = 1


@dataclass(frozen=True)
class Outcome:
    """Held-out photos restored blind and told, and held-out crops matched."""

    photos: Evaluation
    crops: Evaluation

    @property
    def improved(self) -> int:
        """For how many tasks the photos restored blind are nearer to the clean ones, in PSNR, than the degraded."""
        return sum(one.blind.psnr > one.input.psnr for one in self.photos.sets)

    @property
    def reached(self) -> bool:
        return self.improved >= IMPROVED and self.crops.accuracy >= MATCHED

    def verdict(self) -> str:
        figures = (
            f"improved {self.improved} of {len(TASKS)} tasks, matched {self.crops.accuracy:.0%} of "
            f"{len(TASKS) * CROPS} held-out crops"
        )
        aim = f"at least {IMPROVED} of {len(TASKS)} and {MATCHED:.0%}"
        if self.reached:
            return f"{figures}: the aim of {aim} is reached"
        return f"{figures}: the aim of {aim} is NOT reached; train longer with --minutes, in another --out"

    def rows(self) -> list[tuple[str, ...]]:
        """For each task: its name, PSNR degraded, restored blind, told, the gain blind, and the crops matched."""
        return [
            (
                one.name,
                f"{one.input.psnr:.2f}",
                f"{one.blind.psnr:.2f}",
                f"{one.told.psnr:.2f}" if one.told else "-",
                f"{one.blind.psnr - one.input.psnr:+.2f}",
                f"{crops.accuracy:.0%}",
            )
            for one, crops in zip(self.photos.sets, self.crops.sets, strict=True)
        ]


HEADINGS = ("task", "degraded", "restored blind", "told the task", "gain blind", "matched")


class Shown(NamedTuple):
    """A held-out photo for the contact sheet, images [3, H, W] in [0, 1], and the task that was chosen for it."""

    task: str
    chosen: str
    degraded: Tensor
    restored: Tensor
    clean: Tensor


def run_demo(out: Path, seed: int, minutes: float, console: Console, eager: bool = False) -> None:
    """Write the demo into `out`; train for about `minutes`, at least a few steps. eager: without the kernels.

    Interrupted, the same call goes on where it was; finished, it measures and draws again without training.
    Raises InputError for a negative seed or time, and where `out` holds a demo of another seed or time.
    """
    if seed < 0 or not 0 <= minutes < math.inf:
        raise InputError(f"seed {seed}, minutes {minutes}; accepted: 0 or more of each")
    known = _known_plan(out, seed, minutes)
    console.print(f"[bold]photos[/] into {out / 'photos'}", highlight=False)
    write_photos(out / "photos")
    model = _train(out, known or _plan(out, seed, minutes, console, eager), console, eager)

    console.print("[bold]measuring[/] on held-out photos, blind", highlight=False)
    sources = held_out_sources(out / "photos")
    photos = [
        EvaluationSet(one.name, one.labels, ConcatDataset([EvaluationPairs(one, len(TASKS), s) for s in range(DRAWS)]))
        for one in sources
    ]
    crops = held_out_crops(sources)
    outcome = Outcome(evaluate(model, photos), evaluate(model, crops, told=False))
    draw_sheet(out / "contact_sheet.png", [_restore(model, one) for one in photos])
    draw_bank(out / "bank.png", model, crops)
    draw_losses(out / "losses.png", out / "run" / "log.csv")
    with atomic_path(out / "index.html") as path:
        path.write_text(page(outcome), encoding="utf-8")

    table = Table(*HEADINGS, title="PSNR in dB on held-out photos; crops matched", box=SIMPLE, collapse_padding=True)
    for row in outcome.rows():
        table.add_row(*row)
    console.print(table)
    console.print(outcome.verdict(), style="green" if outcome.reached else "yellow", highlight=False)
    console.print(f"look at it: {out / 'index.html'}", highlight=False)


# -- photos -----------------------------------------------------------------------------------------------------------


def write_photos(folder: Path) -> None:
    """Photos of installed packages, none downloaded, into `train`, `held_out` and, distance in millimetres, `depth`."""
    for name in TRAINING_PHOTOS:
        write_rgb(folder / "train" / f"{name}.png", _scaled(getattr(data, name)()))
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        write_rgb(folder / "train" / f"{name}.png", _rgb(photo))
    motorcycle, _, disparity = data.stereo_motorcycle()  # the other view shows the same scene: it is not used
    for name, photo in (("chelsea", data.chelsea()), ("coffee", data.coffee()), ("motorcycle", motorcycle)):
        write_rgb(folder / "held_out" / f"{name}.png", _cover(_rgb(photo), cv2.INTER_AREA))
    # Baseline and focal length as scikit-image documents them. 0: not measured.
    distance = np.nan_to_num(193.001 * 994.978 / (disparity + 31.086))
    with atomic_path(folder / "depth" / "motorcycle.png") as path:
        cv2.imwrite(str(path), np.rint(_cover(distance, cv2.INTER_NEAREST)).astype(np.uint16))


def _scaled(photo: np.ndarray, longest: int = 512) -> np.ndarray:
    """As RGB in [0, 1], at most `longest` pixels a side."""
    pixels = _rgb(photo)
    factor = longest / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    return cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def _rgb(photo: np.ndarray) -> np.ndarray:
    pixels = np.atleast_3d(photo).astype(np.float32) / 255
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _cover(photo: np.ndarray, interpolation: int) -> np.ndarray:
    """Scaled and cut around the middle to HEIGHT x WIDTH."""
    height, width = photo.shape[:2]
    factor = max(HEIGHT / height, WIDTH / width)
    size = (max(WIDTH, round(width * factor)), max(HEIGHT, round(height * factor)))
    photo = cv2.resize(photo.astype(np.float32), size, interpolation=interpolation)
    top, left = (photo.shape[0] - HEIGHT) // 2, (photo.shape[1] - WIDTH) // 2
    return photo[top : top + HEIGHT, left : left + WIDTH]


def held_out_sources(folder: Path) -> list[Source]:
    """For each task the held-out photos with its degradation; haze uses the depth that was measured."""
    depths = {path.stem: path for path in sorted((folder / "depth").iterdir())}
    pairs = clean_folder(folder / "held_out")
    sources = []
    for index, task in enumerate(TASKS):
        own = [Pair(one.name, one.clean, depth=depths.get(one.name) if task == "dehaze" else None) for one in pairs]
        sources.append(Source(task, (index,), tuple(own), parse_degradation(TASK_DEGRADATIONS[task])))
    return sources


def held_out_crops(sources: Sequence[Source]) -> list[EvaluationSet]:
    """CROPS crops of each source, the photos in turn."""
    cutter = TrainingPairs(sources, CROP, len(TASKS), seed=HELD_OUT_SEED)
    sets = []
    for index, source in enumerate(sources):
        keys = [(index, crop % len(source.pairs), crop) for crop in range(CROPS)]
        crops = [EvaluationPair(f"{source.name} {key[2]}", *cutter[key]) for key in keys]
        sets.append(EvaluationSet(source.name, source.labels, crops))
    return sets


# -- training ---------------------------------------------------------------------------------------------------------


def _known_plan(out: Path, seed: int, minutes: float) -> Plan | None:
    """The plan of the demo that `out` holds, if it holds one."""
    path = out / PLAN
    if not path.exists():
        return None
    try:
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged; give another --out or remove {out}") from error
    if (plan.seed, plan.minutes) != (seed, minutes):
        raise InputError(
            f"{out} holds a demo of seed {plan.seed} and {plan.minutes:g} minutes; give another --out or remove it"
        )
    return plan


def _plan(out: Path, seed: int, minutes: float, console: Console, eager: bool) -> Plan:
    """How many steps the time allows here, found by timing a few."""
    config = _config(out, Plan(seed, minutes), eager)
    seconds = [_seconds_a_step(config, name, minutes) for name in ("pretrain", "finetune")]
    shares = (1 - FINETUNING, FINETUNING)
    steps = [
        max(1, min(MOST_STEPS, int(60 * minutes * share / one / EPOCHS)))
        for share, one in zip(shares, seconds, strict=True)
    ]
    plan = Plan(seed, minutes, *steps)
    with atomic_path(out / PLAN) as path:
        path.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    expected = EPOCHS * sum(number * one for number, one in zip(steps, seconds, strict=True)) / 60
    console.print(
        f"[bold]training[/] {EPOCHS * steps[0]} steps of both stages, then {EPOCHS * steps[1]} on the frozen bank: "
        f"about {expected:.1f} minutes here",
        highlight=False,
    )
    return plan


def _seconds_a_step(config: TrainConfig, phase: str, minutes: float) -> float:
    """Of a throwaway model on noise, for a fiftieth of the time; the faster steps count, as what disturbs the machine
    now may soon be over."""
    settings = config.pretrain if phase == "pretrain" else config.finetune
    model = build_model(config, mixtures=False).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    shape = (settings.batch_size, 3, settings.crop, settings.crop)
    lq, hq = (torch.rand(shape).to(memory_format=torch.channels_last) for _ in range(2))
    labels = torch.arange(settings.batch_size) % len(TASKS)
    half = settings.batch_size // 2 if phase == "pretrain" else settings.batch_size
    pairs = (lq[half:], hq[half:], labels[half:])
    times: list[float] = []
    while len(times) < 5 or sum(times) < 60 * minutes / 50:
        start = time.perf_counter()
        first = phase == "finetune" and not times  # the bank must hold something
        output = model(
            lq[:half], labels[:half], reference=(lq, hq, labels) if first else pairs if half < len(lq) else None
        )
        terms = restoration_loss(output, hq[:half], labels[:half], None, LossWeights())
        terms["total"].backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter() - start)
    return DATA_SHARE * float(np.percentile(times[1:], 20))


def _config(out: Path, plan: Plan, eager: bool) -> TrainConfig:
    folder = str(out / "photos" / "train")
    return TrainConfig(
        out=str(out / "run"),
        tasks=list(TASKS),
        data=[{"task": task, "clean": folder} for task in TASKS],
        preset="tiny",
        pretrain=PhaseConfig(
            epochs=EPOCHS, steps=plan.pretrain, crop=64, batch_size=20, lr=2e-3, final_lr=2e-4, warmup_epochs=1
        ),
        finetune=PhaseConfig(epochs=EPOCHS, steps=plan.finetune, crop=CROP, batch_size=5, lr=1e-3, final_lr=1e-5),
        loss=LossConfig(match=0.2),
        clip_norm=0.5,
        ema=0.99,
        seed=plan.seed,
        device="cpu",
        eager=eager,
        workers=0,  # a worker would take the processors from the steps, which costs more than it gains
        save_every=100,
    )


def _train(out: Path, plan: Plan, console: Console, eager: bool) -> R2R:
    display = TrainingDisplay()
    with display.progress:
        model = Trainer(_config(out, plan, eager), display).run()
    model.save_pretrained(out / "model")
    return model


# -- pictures ---------------------------------------------------------------------------------------------------------


def _restore(model: R2R, one: EvaluationSet) -> Shown:
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


# -- page -------------------------------------------------------------------------------------------------------------


def page(outcome: Outcome) -> str:
    """The HTML page; pictures lie beside it."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in row)}</tr>" for row in outcome.rows())
    figures = "".join(
        f'<figure><img src="{name}.png" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
        for name, caption in PICTURES.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>R2R: demo</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ padding: .25rem .9rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }} tr + tr td {{ border-top: 1px solid #8886 }}
figure {{ margin: 2rem 0 }} img {{ max-width: 100%; background: white }} figcaption {{ opacity: .75 }}
.verdict {{ padding: .6rem 1rem; border-left: 4px solid {"#009e73" if outcome.reached else "#e69f00"} }}
</style>
<h1>One model, five degradations, nothing told</h1>
<p>A model of {outcome.photos.parameters / 1e6:.2f} million parameters, trained on this machine on photos that come with
installed packages. What is shown was never trained on. PSNR in dB, on whole photos; the last column counts crops.</p>
<p class="verdict">{html.escape(outcome.verdict())}</p>
<table><tr>{head}</tr>{body}</table>
{figures}
</html>
"""
