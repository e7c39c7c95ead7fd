"""Training: pretraining in two stages, then finetuning on the frozen bank (R2R, sections 3.5 and 4.1).

A run can be killed at any moment. Everything random follows from the seed and the position in the run, so a run that
goes on from `last.ckpt` ends with the weights it would have had. Several processes (`r2r.ranks`) share each batch; all
hold the same weights and the same bank, and the first one validates and writes.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from r2r import fast, ranks
from r2r.config import FREE, SCHEDULE, PhaseConfig, TrainConfig, anchored
from r2r.data.dataset import EvaluationPairs, Source, TrainingPairs, worker_init
from r2r.data.sampler import EpochSampler
from r2r.data.sizes import read_index, write_index
from r2r.data.sources import PATHS, build_source, named
from r2r.device import pick_device
from r2r.errors import InputError
from r2r.evaluation import evaluate, evaluation_set
from r2r.extras import needed
from r2r.files import atomic_path, remove_temporaries
from r2r.losses import LossWeights, restoration_loss
from r2r.model import R2R
from r2r.muon import Muon
from r2r.presets import PRESETS
from r2r.pretrained import HUB, WEIGHTS

FIELDS = ("phase", "epoch", "step", "lr", "total", "pixel", "fft", "log_error", "degradation", "match", "psnr",
          "accuracy", "images_per_second", "valid_psnr", "valid_accuracy")  # fmt: skip

VALIDATION_FIELDS = ("phase", "epoch", "step", "set", "psnr", "ssim", "told_psnr", "told_ssim", "accuracy")

LOG, VALIDATION_LOG, INDEX = "log.csv", "validation.csv", "sizes.json"
CHECKPOINTS = ("last.ckpt", "previous.ckpt")
"""What a run goes on from: the newest one, and the one before it for when that is damaged."""

Tensors = tuple[Tensor, ...] | list[Tensor]


class Display(Protocol):
    """Where progress is shown; `r2r.terminal` has one for the terminal."""

    def start(self, phase: str, done: int, total: int) -> None: ...
    def update(self, done: int, row: dict[str, float]) -> None: ...
    def say(self, line: str) -> None: ...


class Silent:
    """A display that shows nothing."""

    def start(self, phase: str, done: int, total: int) -> None: ...
    def update(self, done: int, row: dict[str, float]) -> None: ...
    def say(self, line: str) -> None: ...


def learning_rate(phase: PhaseConfig, epoch: float) -> float:
    """The rate after `epoch` (fractional) epochs: linear warm-up, a constant, then a cosine (R2R, section 4.1)."""
    if epoch < phase.warmup_end:
        return phase.warmup_lr + (phase.lr - phase.warmup_lr) * epoch / phase.warmup_end
    start = max(phase.warmup_end, phase.hold)
    progress = max(epoch - start, 0.0) / max(phase.cosine_end - start, 1e-9)
    return phase.final_lr + (phase.lr - phase.final_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def build_model(config: TrainConfig, mixtures: bool) -> R2R:
    """The model a configuration describes, with weights that follow from its seed, or are those of `config.init`."""
    if config.preset not in PRESETS:
        raise InputError(f"unknown preset {config.preset!r}; accepted: {', '.join(PRESETS)}")
    initial = R2R.from_pretrained(config.init) if config.init else None
    sizes = PRESETS[config.preset]
    if initial is not None:
        seen_afar = {
            name: [task for task in initial.config[name] if mixtures and task in config.tasks]
            for name in ("smooth_tasks", "light_tasks")
        }
        strengths = {task: strength for task, strength in initial.bank.strengths.items() if task in config.tasks}
        sizes = {**initial.config, **seen_afar, "strengths": strengths, "amalgamator": True}
    sizes = {**sizes, "mixtures": mixtures, **config.model, "tasks": config.tasks}
    torch.manual_seed(config.seed)
    kind = R2R if config.eager else fast.R2R
    try:
        model = kind(**sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"model: {error}") from error
    if initial is not None:
        _start_from(initial, model, config.init)
    return model


BY_TASK = ("bank.", "amalgamator.classifier.", "amalgamator.key_slots.", "amalgamator.value_slots.")
"""Beginnings of the names of tensors with a row for each task."""


def _start_from(initial: R2R, model: R2R, name: str) -> None:
    """Copy the weights and the bank of `initial`, tasks by name; an amalgamator that it lacks stays as it is."""
    given, state = initial.state_dict(), model.state_dict()
    places = [(model.tasks.index(task), row) for row, task in enumerate(initial.tasks) if task in model.tasks]
    if initial.bank.keys.shape[1] != model.bank.keys.shape[1]:
        raise InputError(
            f"{name} holds {initial.bank.keys.shape[1]} slots a task, which a capacity of another model made"
        )
    for key, own in state.items():
        if key not in given:
            continue
        by_task = key.startswith(BY_TASK)
        if own.shape[by_task:] != given[key].shape[by_task:]:
            raise InputError(f"{name} does not fit: {key} is {[*given[key].shape]}, here {[*own.shape]}")
        if not by_task:
            own.copy_(given[key])
        for place, row in places if by_task else ():
            own[place] = given[key][row]
    model.load_state_dict(state)


class Trainer:
    """One run in one folder: `last.ckpt` to go on from and the one before it, models `last/` and `best/`, `log.csv`,
    TensorBoard files."""

    def __init__(self, config: TrainConfig, display: Display | None = None) -> None:
        """Check everything before any work; go on where `config.out` holds a run of the same settings."""
        self.config = config = anchored(config, Path.cwd())
        self.leads = ranks.rank() == 0
        self.display = display if display and self.leads else Silent()
        self.out = Path(config.out)
        self.device = pick_device(config.device)
        several = any(len(named(entry, "task")) != 1 or named(entry, "optional") for entry in config.data)
        self.mixtures = bool(config.model.get("mixtures", several))
        self.model = build_model(config, self.mixtures).to(self.device)  # before photos, which take their time
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with ranks.first_alone():  # it reads the headers of all photos, the others its index of them
            read_index(self.out / INDEX)
            self.sources = [build_source(entry, config.tasks) for entry in config.data]
            self._check_sources()
            held_out = [build_source(entry, config.tasks) for entry in config.validation]
            self.held_out = [evaluation_set(one, len(config.tasks), self.mixtures, config.seed) for one in held_out]
            self.files = {"data": _files(self.sources), "validation": _files(held_out)}
            self.weights = LossWeights(**asdict(config.loss))
            self.datasets = {
                name: TrainingPairs(
                    self.sources, phase.crop, len(config.tasks), config.seed, self.mixtures, int(config.cache * 2**30)
                )
                for name, phase in self._phases()
                if phase.epochs
            }
            self.ema = self._averaged() if config.ema else None
            self.phase, self.epoch, self.batch, self.step, self.best = "pretrain", 0, 0, 0, -math.inf
            self.stop = StopSignal()
            self.optimiser = self._optimiser()
            self._resume()
            if self.leads:
                self._check_room()
                write_index(self.out / INDEX)
        self._check_together()
        self.network = self._shared()

    # -- the run --------------------------------------------------------------------------------------------------

    def run(self) -> R2R:
        """Train to the end; returns the final model (averaged weights where there are any), in eval mode.

        SIGINT and SIGTERM end the run after the next step, once its state is saved, and then do what they did before.
        """
        if self.leads:
            self._check_validation()
            record = replace(self.config, out=str(self.out.absolute()), accept=[])
            self._write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(record)))
        board: Any = Boards(self.config, self.step) if self.leads else nullcontext()
        with self.stop, board as self.board:
            for name, phase in self._phases():
                if name == "pretrain" and self.phase == "finetune":
                    continue
                if name == "finetune" and self.phase == "pretrain":
                    self._enter_finetuning()
                if self.epoch < phase.epochs:
                    self._run_phase(name, phase)
        final = self.final_model()
        if self.leads:
            final.save_pretrained(self.out / "last")
        return final

    def final_model(self) -> R2R:
        """The model to use: averaged weights where there are any, the bank, and no amalgamator."""
        model = self._shown()
        if not model.bank.empty:
            model.freeze_bank()
        return model

    def _run_phase(self, name: str, phase: PhaseConfig) -> None:
        sampler = EpochSampler(
            self.sources,
            phase.batch_size,
            len(self.config.tasks),
            self.config.seed + (name == "finetune"),
            steps=phase.steps or None,
            bank=name == "pretrain",
        )
        loader: DataLoader[Any] = DataLoader(
            self.datasets[name],
            batch_sampler=sampler,
            num_workers=self.config.workers,
            persistent_workers=self.config.workers > 0,
            worker_init_fn=worker_init,
            pin_memory=self.device.type == "cuda",
        )
        per_epoch = sampler.steps_per_epoch
        if not per_epoch:
            raise InputError(f"{name}: an epoch has fewer images than batch_size {phase.batch_size}")
        self.display.start(name, self.epoch * per_epoch + self.batch, phase.epochs * per_epoch)
        try:
            self._run_epochs(name, phase, loader, sampler)
        finally:
            # What is raised may hold the loader, and a process does not end while it has workers.
            if loader._iterator is not None:
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _run_epochs(self, name: str, phase: PhaseConfig, loader: DataLoader[Any], sampler: EpochSampler) -> None:
        per_epoch = sampler.steps_per_epoch
        skipped = self.datasets[name].skipped
        while self.epoch < phase.epochs:
            self.batch = min(self.batch, per_epoch)  # the epoch was longer where more photos were there
            sampler.set_position(self.epoch, self.batch)
            self._run_epoch(name, phase, loader, per_epoch)
            if self.datasets[name].skipped > skipped:
                skipped = self.datasets[name].skipped
                self.display.say(f"{skipped} training files could not be read and were skipped")
            done = self.epoch + 1
            validates = bool(self.held_out) and (done % self.config.validate_every == 0 or done == phase.epochs)
            if validates:
                self._save()  # before, as validation may fail
            self.epoch, self.batch = done, 0
            if validates:
                self._validate(name)
            self._save()
            if self.leads and not self.model.bank.empty:
                self._shown().save_pretrained(self.out / "last")
            ranks.wait()

    def _run_epoch(self, name: str, phase: PhaseConfig, loader: DataLoader[Any], per_epoch: int) -> None:
        self.model.train()
        stage = 0 if self.epoch < phase.epochs / 2 else 1
        tally = Tally(self.device)
        started, images = time.perf_counter(), 0
        stopping = 0
        for lq, hq, labels in loader:
            rate = learning_rate(phase, self.epoch + (0 if phase.by_epoch else self.batch / per_epoch))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            torch.manual_seed(1_000_003 * self.config.seed + self.step)  # for the order of the bank's slots
            lq, hq = (x.to(self.device, memory_format=torch.channels_last, non_blocking=True) for x in (lq, hq))
            batch = [lq, hq, labels.to(self.device, non_blocking=True)]
            first = self.batch - self.batch % phase.accumulate
            tally.add(self._forward_backward(name, batch, stage, min(phase.accumulate, per_epoch - first)))
            images += len(lq) * ranks.number()
            self.batch += 1
            if self.batch % phase.accumulate == 0 or self.batch == per_epoch:
                self._update()
            self.step += 1
            if self.step % self.config.log_every == 0 or self.batch == per_epoch:
                row = {**tally.take(), "lr": rate, "images_per_second": images / (time.perf_counter() - started)}
                self._check_finite(row)
                self._log(name, row)
                self.display.update(self.epoch * per_epoch + self.batch, row)
                started, images = time.perf_counter(), 0
                stopping = ranks.highest(self.stop.number, self.device)  # all have to stop at the same step
            elif ranks.number() == 1:
                stopping = self.stop.number
            if self.batch % phase.accumulate and self.batch < per_epoch:
                continue
            if stopping or self.step % self.config.save_every == 0:
                self._save()
            if stopping:
                raise Stopped

    def _forward_backward(self, name: str, batch: list[Tensor], stage: int, group: int) -> dict[str, Tensor]:
        lq, hq, labels = batch
        reference = reference_labels = None
        if name == "pretrain":
            half = len(lq) // 2
            reference_labels = labels[half:]
            reference = (lq[half:], self._reference_hq(lq[half:], hq[half:]), self._known(reference_labels))
            lq, hq, labels = lq[:half], hq[:half], labels[:half]
        if self.config.quarters and float(torch.rand(())) < self.config.quarters:
            lq, hq, labels = _quarters(lq), _quarters(hq), labels.repeat_interleave(4, 0)
        told = self._misled(self._known(labels))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.network(lq, told, reference=reference, stage=stage)
        terms = restoration_loss(output, hq, labels, reference_labels, self.weights)
        (terms["total"] / group).backward()
        with torch.no_grad():
            error = (output.restored.float().clamp(0, 1) - hq).square().mean((1, 2, 3)).clamp(min=1e-10)
            if self.mixtures:
                right = (((output.scores > 0) == self._known(labels)) | (labels == 0.5)).all(1)
            else:
                right = output.scores.argmax(1) == labels
            return {
                **{key: value.detach() for key, value in terms.items()},
                "psnr": -10 * error.log10().mean(),
                "accuracy": right.float().mean(),
            }

    def _reference_hq(self, lq: Tensor, hq: Tensor) -> Tensor:
        if self.config.reference_hq == "noise15":
            return hq + 15 / 255 * torch.randn_like(hq)
        return lq if self.config.reference_hq == "lq" else hq

    def _known(self, labels: Tensor) -> Tensor:
        """Labels as the model takes them: of mixtures only what is sure, bool [N, T]."""
        return labels == 1 if self.mixtures else labels

    def _misled(self, labels: Tensor) -> Tensor:
        """`labels` in which a share of the images is told a task drawn at random, or none, which leaves it to the
        model; an image with nothing wrong always is."""
        if not self.mixtures or not self.config.mislead:
            return labels
        number, tasks = labels.shape
        draw = torch.rand(number, device=labels.device)
        draw = torch.where(labels.any(1), draw, draw * self.config.mislead)
        wrong = F.one_hot(torch.randint(tasks, (number,), device=labels.device), tasks).bool()
        misled = torch.where((draw < self.config.mislead)[:, None], wrong, labels)
        return misled & (draw >= self.config.mislead / 2)[:, None]

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _enter_finetuning(self) -> None:
        """Freeze the bank and start with a new optimiser on what is left to train."""
        if self.config.finetune.epochs:
            lacking = [
                t for t, count in zip(self.model.tasks, self.model.bank.counts.tolist(), strict=True) if not count
            ]
            if lacking:
                raise InputError(f"the bank holds nothing for {', '.join(lacking)}; pretrain.epochs above 0 fills it")
            self.model.freeze_bank()
            if self.ema is not None:
                self._averaged_model(self.ema).amalgamator = None
            self.optimiser = self._optimiser()
            self.network = self._shared()
        self.phase, self.epoch, self.batch = "finetune", 0, 0

    def _validate(self, name: str) -> None:
        if not self.leads:
            return
        model = self._shown()
        told = bool(model.bank.counts.all())  # or there is nothing to tell yet
        result = evaluate(model, self.held_out, self.device, told, misled=False)
        for one in result.sets:
            told_by_name = {} if one.told is None else {"told_psnr": one.told.psnr, "told_ssim": one.told.ssim}
            measured = {"psnr": one.blind.psnr, "ssim": one.blind.ssim, **told_by_name, "accuracy": one.accuracy}
            self._append(VALIDATION_LOG, VALIDATION_FIELDS, {**self._place(name), "set": one.name, **measured})
            self.board.add({f"valid/{one.name}/{key}": value for key, value in measured.items()}, self.step)
        self._log(name, {"valid_psnr": result.psnr, "valid_accuracy": result.accuracy})
        self.display.say(
            f"{name} epoch {self.epoch}: held-out PSNR {result.psnr:.2f} dB, {result.accuracy:.0%} matched"
        )
        if result.psnr > self.best:
            self.best = result.psnr
            self._shown().save_pretrained(self.out / "best")

    # -- parts ----------------------------------------------------------------------------------------------------

    def _phases(self) -> list[tuple[str, PhaseConfig]]:
        return [("pretrain", self.config.pretrain), ("finetune", self.config.finetune)]

    def _optimiser(self) -> torch.optim.Optimizer:
        if self.config.optimizer == "muon":
            return Muon(self.model.parameters(), lr=0.0)
        return torch.optim.Adam(self.model.parameters(), lr=0.0, betas=(0.9, 0.999), fused=True)

    def _shared(self) -> nn.Module:
        """The model, or with several processes the one that averages its gradients over them."""
        if ranks.number() == 1:
            return self.model
        # Every process makes the same buffers: the bank and BatchNorm see the pairs of all.
        unused = self.weights.degradation == 0
        return DistributedDataParallel(self.model, broadcast_buffers=False, find_unused_parameters=unused)

    def _averaged(self) -> AveragedModel:
        def average(averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
            # short runs must not be held back by the random weights they started from
            torch._foreach_lerp_(averaged, current, max(1 - self.config.ema, 9 / (10 + self.step)))

        return AveragedModel(self.model, multi_avg_fn=average)

    @staticmethod
    def _averaged_model(ema: AveragedModel) -> R2R:
        assert isinstance(ema.module, R2R)
        return ema.module

    def _shown(self) -> R2R:
        """A copy of the model as it would be used: averaged weights, the current bank, eval mode."""
        model = copy.deepcopy(self.model if self.ema is None else self._averaged_model(self.ema))
        model.bank.load_state_dict(self.model.bank.state_dict())
        return model.eval()

    def _check_sources(self) -> None:
        lacking = [
            task
            for index, task in enumerate(self.config.tasks)
            if not any(index in source.labels for source in self.sources)
        ]
        if lacking:
            raise InputError(f"no data source for the task {lacking[0]!r}")
        for name, phase in self._phases():
            multiple = ranks.number() * (2 if name == "pretrain" and ranks.number() > 1 else 1)
            below = phase.batch_size // multiple * multiple
            if phase.epochs and phase.batch_size != below:
                nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
                raise InputError(
                    f"{name}.batch_size is {phase.batch_size}, which {ranks.number()} processes cannot share; "
                    f"accepted: multiples of {multiple} such as {nearest}, or another number of processes"
                )

    def _check_validation(self) -> None:
        """Read every photo of the validation sets whole, as a header does not show that a file was cut short."""
        for one in self.held_out:
            if isinstance(one.pairs, EvaluationPairs):
                one.pairs.check()

    def _check_room(self) -> None:
        """Raises InputError where the disk cannot take the checkpoints and models that the run will write."""
        state = _size(self.model.state_dict().values())
        moments = 2 * _size(self.model.parameters())  # Adam's
        checkpoint = state * (1 if self.ema is None else 2) + moments
        kinds = [(checkpoint, [self.out / name for name in CHECKPOINTS])]
        kinds.append((state, [self.out / name / WEIGHTS for name in ("last", "best")]))
        needed = sum(  # each kind once more, as the new one is written beside
            max(0, size * (len(paths) + 1) - sum(path.stat().st_size for path in paths if path.exists()))
            for size, paths in kinds
        )
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise InputError(
                f"{self.out}: the run's checkpoints and models need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )

    def _check_together(self) -> None:
        """Raises InputError where processes see different folders: they would wait for each other."""
        places = ranks.gathered([self.phase, self.epoch, self.batch, self.step])
        files = ranks.gathered(self.files)
        for other, (place, seen) in enumerate(zip(places, files, strict=True)):
            if place != places[0]:
                raise InputError(
                    f"process {other} would start at step {place[-1]}, process 0 at {places[0][-1]}: {self.out} has to "
                    "be one folder that all of them see"
                )
            if seen != files[0]:
                raise InputError(f"process {other} sees other photos than process 0; all need the same files")

    def _check_finite(self, row: dict[str, float]) -> None:
        if not math.isfinite(row["total"]):
            raise InputError(
                f"the loss is not finite at step {self.step}; {self.out / 'last.ckpt'} is from before. "
                "Lower the learning rate or train in fp32"
            )

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _log(self, phase: str, row: dict[str, float]) -> None:
        if not self.leads:
            return
        self.board.add({f"{'valid' if key.startswith('valid') else 'train'}/{key}": row[key] for key in row}, self.step)
        self._append(LOG, FIELDS, {**self._place(phase), **row})

    def _place(self, phase: str) -> dict[str, Any]:
        return {"phase": phase, "epoch": self.epoch, "step": self.step}

    def _append(self, name: str, names: Sequence[str], row: dict[str, Any]) -> None:
        path = self.out / name
        try:
            fresh = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, names)
                if fresh:
                    writer.writeheader()
                writer.writerow({key: _short(value) for key, value in row.items()})
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error

    def _save(self) -> None:
        """Write `last.ckpt`; what had this name becomes `previous.ckpt`. A state with NaN in it is refused."""
        last, previous = (self.out / name for name in CHECKPOINTS)
        if not all(bool(x.isfinite().all()) for x in self.model.parameters()):
            raise InputError(f"the weights are not finite at step {self.step}; {last} is from before")
        if not self.leads:
            return
        state = {
            **self._description(),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "position": [self.phase, self.epoch, self.batch, self.step, self.best],
        }
        with atomic_path(last) as path, path.open("wb") as file:
            _write(state, file)
            if last.exists():
                os.replace(last, previous)

    def _description(self) -> dict[str, Any]:
        return {"config": _container(self.config), "files": self.files}

    @staticmethod
    def _sets(state: dict[str, Any]) -> tuple[Any, Any]:
        return _settings(state["config"])["validation"], state["files"]["validation"]

    def _resume(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.leads:
                for folder in (self.out, self.out / "last", self.out / "best"):
                    remove_temporaries(folder)
        except OSError as error:
            raise InputError(f"cannot write in {self.out}: {error.strerror}") from error
        state = self._newest()
        if state is None:
            made = [self.out / name for name in ("last", "best") if (self.out / name / WEIGHTS).exists()]
            if made:
                raise InputError(
                    f"{self.out} holds no checkpoint to go on from, and a new run would replace the model {made[0]}; "
                    "use another out folder, or move it away"
                )
            if self.leads:
                for name in (LOG, VALIDATION_LOG):
                    (self.out / name).unlink(missing_ok=True)
            return
        self._check_unchanged(state)
        self.phase, self.epoch, self.batch, self.step, self.best = state["position"]
        if "files" in state and self._sets(state) != self._sets(self._description()):
            self.best = -math.inf
            self.display.say("the validation sets have changed: the best model so far counts no more")
        if self.phase == "finetune" and self.config.finetune.epochs:
            self.model.amalgamator = None
            if self.ema is not None:
                self._averaged_model(self.ema).amalgamator = None
            self.optimiser = self._optimiser()
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:  # settings were accepted
            raise InputError(f"the state in {self.out} does not fit these settings: {_first_line(error)}") from error
        if self.leads:
            self._cut_logs()
        self.display.say(f"going on with {self.out} at {self.phase} epoch {self.epoch}, step {self.step}")

    def _newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read; None where there is none at all."""
        damaged: dict[Path, str] = {}
        for path in (self.out / name for name in CHECKPOINTS):
            if not path.exists():
                continue
            try:
                state = _read(path, self.device)
            except Exception as error:
                damaged[path] = f"{path} cannot be read: {_first_line(error)}"
                continue
            for bad, line in damaged.items():
                self.display.say(f"{line}; going on from {path}")
                if self.leads:  # out of the way of the next one, which would keep it in the good one's place
                    os.replace(bad, bad.with_suffix(".damaged"))
            return state
        if damaged:
            raise InputError("; ".join(damaged.values()))
        return None

    def _check_unchanged(self, state: dict[str, Any]) -> None:
        """Raises InputError where the run in `out` was made with other settings or on other photos."""
        ours, theirs = _settings(_container(self.config)), _settings(state["config"])
        longer = []
        for key, value in ours.items():
            group, _, name = key.partition(".")
            if value == theirs.get(key, value) or {key, group} & {*FREE, *self.config.accept}:
                continue
            if group == "finetune" and state["position"][0] == "pretrain":
                continue  # has not begun
            if name in SCHEDULE:
                longer.append(f"{key} was {theirs[key]:g}, is {value:g}")
                continue
            raise InputError(
                f"{self.out} holds a run with {key} = {theirs[key]}, now it is {value}; use another out folder, the "
                f"same settings, or accept=[{key}]"
            )
        if longer:
            self.display.say("; ".join(longer))
        if "data" in self.config.accept or "files" not in state:
            return
        for (name, number, digest), then in zip(self.files["data"], state["files"]["data"], strict=True):
            if [name, number, digest] != then:
                raise InputError(
                    f"{self.out} holds a run on other photos for {name}: {then[1]} then, {number} now; bring the "
                    "former ones back, or go on with accept=[data]"
                )

    def _cut_logs(self) -> None:
        """Drop the rows of the logs that the run will write again, and what was not written to its end."""
        for name, names in ((LOG, FIELDS), (VALIDATION_LOG, VALIDATION_FIELDS)):
            path = self.out / name
            if not path.exists():
                continue
            whole, _, _ = path.read_text(errors="replace").rpartition("\n")
            kept = []
            for row in csv.DictReader(whole.splitlines()):
                step = row.get("step") or ""
                if None in row.values() or None in row or not step.isdecimal() or int(step) > self.step:
                    continue
                validates = name == VALIDATION_LOG or row["valid_psnr"]
                if not (validates and int(step) == self.step and self.batch):  # that epoch is validated again
                    kept.append(row)
            with atomic_path(path) as beside, beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(kept)

    def _write_text(self, name: str, text: str) -> None:
        with atomic_path(self.out / name) as path:
            path.write_text(text)


class Boards:
    """TensorBoard files in `out`, and a run of Weights & Biases where the configuration names a project.

    Raises InputError where a project is named and the package is not there.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        self._files = SummaryWriter(str(Path(config.out, "tensorboard")), purge_step=step)
        self._run: Any = None
        if config.wandb:
            try:
                import wandb
            except ImportError as error:
                raise needed(str(error.name), f"wandb={config.wandb}", "'r2r-restore[wandb]'") from error
            name = hashlib.sha256(os.path.realpath(config.out).encode()).hexdigest()[:16]
            self._run = wandb.init(
                project=config.wandb, id=name, resume="allow", name=Path(config.out).name, dir=config.out,
                config=_container(config),
            )  # fmt: skip

    def add(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._files.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def __enter__(self) -> Boards:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
        if self._run is not None:
            self._run.finish(exit_code=int(error[0] is not None))


class Tally:
    """Running means of scalars, over all processes, that stay on the device until they are taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.number = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0) + value
        self.number += 1

    def take(self) -> dict[str, float]:
        means = {key: float(ranks.mean(value)) / self.number for key, value in self.sums.items()}
        self.sums, self.number = {}, 0
        return means


class Stopped(Exception):
    """The run ends here: it was asked to, and its state is saved."""


class StopSignal:
    """Within the block SIGINT and SIGTERM only set `number`. `Stopped`, raised in the block, sends what came again when
    the block is left. The second signal ends a single process at once; torchrun always sends a second one."""

    def __init__(self) -> None:
        self.number = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._former = {one: signal.signal(one, self._note) for one in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()
        if isinstance(error, Stopped):
            signal.raise_signal(self.number or signal.SIGTERM)  # another process may have got it

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        if ranks.number() == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def _quarters(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [4 N, C, H / 2, W / 2], those of one image beside each other."""
    parts = images.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5)
    return parts.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    """A checkpoint, until it is on the disk. Raises OSError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # which hides what the file system said
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(_first_line(error)) from None
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint. Raises all sorts of exceptions where it is damaged."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch does not compare the checksums
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:  # whose words advise to execute it
        raise ValueError("it holds more than tensors and plain values, which is not read") from error
    if not {"config", "model", "optimiser", "ema", "position"} <= state.keys():
        raise ValueError("it is no checkpoint of a run")
    return state


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _files(sources: Sequence[Source]) -> list[list[Any]]:
    """Of each source its name, how many photos it has, and their fingerprint."""
    return [[source.name, len(source.pairs), source.fingerprint()] for source in sources]


def _container(config: TrainConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, in a form in which equal ones compare equal: paths resolved, `None` filled in.

    Those that `config` lacks, as checkpoints of earlier versions do, stay out.
    """
    settings: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(config, default=str)).items():  # which makes lists of tuples
        if key in ("data", "validation"):
            settings[key] = [{k: _resolved(v) if k in PATHS else v for k, v in entry.items()} for entry in value]
        elif key == "init" and value and not value.startswith(HUB):
            settings[key] = _resolved(value)
        elif key in ("pretrain", "finetune"):
            phase = PhaseConfig(**value)
            filled = {**value, "warmup_epochs": phase.warmup_end, "horizon": phase.cosine_end}
            settings |= {f"{key}.{name}": filled[name] for name in value}
        elif key == "loss":
            settings |= {f"loss.{name}": one for name, one in value.items()}
        else:
            settings[key] = value
    return settings


def _resolved(paths: Any) -> Any:
    return [_resolved(one) for one in paths] if isinstance(paths, list) else os.path.realpath(paths)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
