"""Runs the demo in one folder: `photos/`, the training run in `run/`, `model/`, three pictures, and `index.html`."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils.data import ConcatDataset

from r2r.config import LossConfig, PhaseConfig, TrainConfig
from r2r.data.dataset import EvaluationPairs
from r2r.demo.page import HEADINGS, Outcome, page
from r2r.demo.photos import CROP, TASKS, held_out_crops, held_out_sources, write_photos
from r2r.demo.pictures import draw_bank, draw_losses, draw_sheet, restored
from r2r.errors import InputError
from r2r.evaluation import EvaluationSet, evaluate
from r2r.files import atomic_path
from r2r.losses import LossWeights, restoration_loss
from r2r.model import R2R
from r2r.terminal import TrainingDisplay
from r2r.training import Trainer, build_model

FINETUNING = 0.45  # share of the time: it restores the whole batch, at the size of the held-out crops
EPOCHS = 10  # in each phase; the run is saved after each
MOST_STEPS = 250  # in an epoch: what a faster machine could do beyond that gains little
DATA_SHARE = 1.25  # of the time a step takes alone: batches are made in between
DRAWS = 4  # how often each held-out photo is degraded afresh
PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What a demo was started with, and the steps in an epoch of each phase that the machine could do in that time."""

    seed: int
    minutes: float
    pretrain: int = 1
    finetune: int = 1


def run_demo(out: Path, seed: int, minutes: float, console: Console, eager: bool = False) -> None:
    """Write the demo into `out`; train for about `minutes`, at least a few steps. eager: without the kernels.

    Interrupted, the same call goes on where it was; finished, it measures and draws again without training.
    Raises InputError for a negative seed or time, and where `out` holds a demo of another seed or time.
    """
    if seed < 0 or not 0 <= minutes < math.inf:
        raise InputError(f"seed {seed}, minutes {minutes}; accepted: 0 or more of each")
    known = _known_plan(out, seed, minutes)
    console.print(f"photos into {out / 'photos'}", highlight=False)
    write_photos(out / "photos")
    model = _train(out, known or _plan(out, seed, minutes, console, eager), console, eager)

    console.print("measuring on held-out photos, blind", highlight=False)
    sources = held_out_sources(out / "photos")
    photos = [
        EvaluationSet(one.name, one.labels, ConcatDataset([EvaluationPairs(one, len(TASKS), s) for s in range(DRAWS)]))
        for one in sources
    ]
    crops = held_out_crops(sources)
    outcome = Outcome(evaluate(model, photos), evaluate(model, crops, told=False))
    draw_sheet(out / "contact_sheet.png", [restored(model, one) for one in photos])
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
        f"training {EPOCHS * steps[0]} steps of both stages, then {EPOCHS * steps[1]} on the frozen bank: "
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
