"""How well a model restores and matches: blind, and told the task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from r2r import complexity
from r2r.data.dataset import EvaluationPair, EvaluationPairs, Source
from r2r.data.sources import anchor, build_source
from r2r.device import device_name, device_of, peak_memory, synchronise
from r2r.errors import InputError
from r2r.methods import save_restored
from r2r.metrics import (
    MAX_PSNR,
    SSIM_WINDOW,
    Measures,
    centre_crop,
    expected_calibration_error,
    mean_measures,
    measure_cells,
    psnr,
    ssim,
)
from r2r.model import R2R

_STYLE: dict[str, Any] = {"box": SIMPLE, "collapse_padding": True}  # fits into 80 columns


class Pairs(Protocol):
    """Anything indexed from 0 that gives pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EvaluationPair: ...


@dataclass(frozen=True)
class EvaluationSet:
    """Pairs that share their tasks: `labels`, indices of the model's tasks, one but for mixtures, none where nothing
    is wrong; `optional` ones may be found as well. share: how common such photos are, for calibration."""

    name: str
    labels: tuple[int, ...]
    pairs: Pairs
    optional: tuple[int, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Quality:
    """PSNR in dB, at most 100 so that a perfect image does not make a mean infinite, and SSIM (`r2r.metrics`)."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class ImageResult:
    """One image: the tasks chosen blind and how likely each task is, the quality of the degraded image and of the
    restored ones; misled: told one task that it does not have. untouched: it came out as it went in, bit for bit.
    measures: more of the image restored blind, by name, where `evaluate` was given any."""

    name: str
    chosen: tuple[str, ...]
    probabilities: tuple[float, ...]
    untouched: bool
    input: Quality
    blind: Quality
    told: Quality | None
    misled: Quality | None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SetResult:
    """The images of one set and their means. `accuracy` is the share of images whose tasks were chosen exactly, but for
    `optional` ones; `untouched` that of images which came out as they went in."""

    name: str
    tasks: tuple[str, ...]
    optional: tuple[str, ...]
    images: tuple[ImageResult, ...]
    input: Quality
    blind: Quality
    told: Quality | None
    misled: Quality | None
    accuracy: float
    untouched: float


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    parameters: those of inference, without the amalgamator and the bank. gmacs: 10^9 multiply-accumulates for an image
    of 224 x 224. seconds: for an image, blind, on average. peak_memory: bytes; on a GPU the most that was allocated
    during the evaluation, on a CPU the most that the process ever held.
    """

    tasks: tuple[str, ...]
    sets: tuple[SetResult, ...]
    parameters: int
    gmacs: float
    seconds: float
    peak_memory: int
    device: str

    @property
    def psnr(self) -> float:
        """Blind, the mean of the sets' means, as papers average over tasks; sets with nothing wrong do not count."""
        return _mean([one.blind for one in self.sets if one.tasks] or [one.blind for one in self.sets]).psnr

    @property
    def accuracy(self) -> float:
        """The mean of the sets' accuracies."""
        return sum(one.accuracy for one in self.sets) / len(self.sets)

    @property
    def calibration_error(self) -> float:
        """How far the probabilities of tasks lie from how often they are right (`expected_calibration_error`)."""
        shown = [(one, image) for one in self.sets for image in one.images]
        labels = [[_label(name, one) for name in self.tasks] for one, _ in shown]
        return expected_calibration_error(
            torch.tensor([image.probabilities for _, image in shown]), torch.tensor(labels)
        )

    @property
    def confusion(self) -> list[list[int]]:
        """For how many images that have a task (rows, in the order of `tasks`) each task was chosen (columns)."""
        return [
            [sum(column in chosen for true, chosen in self._choices() if row in true) for column in self.tasks]
            for row in self.tasks
        ]

    @property
    def task_accuracy(self) -> dict[str, float]:
        """For each task the share of all images for which it was rightly chosen, or rightly left out."""
        choices = self._choices()
        return {name: sum((name in a) == (name in b) for a, b in choices) / len(choices) for name in self.tasks}

    def _choices(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """True and chosen tasks of every image."""
        return [(one.tasks, image.chosen) for one in self.sets for image in one.images]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; what is not finite becomes None."""
        means = {"psnr": self.psnr, "accuracy": self.accuracy, "calibration_error": self.calibration_error}
        return finite({**asdict(self), **means, "confusion": self.confusion, "task_accuracy": self.task_accuracy})

    def rows(self) -> list[dict[str, Any]]:
        """One for each image, for a CSV file."""
        return [
            {
                "set": one.name,
                "image": image.name,
                "tasks": "+".join(one.tasks),
                "chosen": "+".join(image.chosen),
                "untouched": image.untouched,
                **_named("input", image.input),
                **_named("blind", image.blind),
                **_named("told", image.told),
                **_named("misled", image.misled),
                **{name: value for name, value in image.measures.items() if name not in ("psnr", "ssim")},
            }
            for one in self.sets
            for image in one.images
        ]

    def render(self, console: Console) -> None:
        """Print the tables."""
        columns = ("set", "images", "input", "blind", "told", "misled", "matched", "untouched")
        quality = Table(*columns, title="PSNR in dB / SSIM", **_STYLE)
        for one in self.sets:
            cells = map(_cell, (one.input, one.blind, one.told, one.misled))
            quality.add_row(one.name, str(len(one.images)), *cells, f"{one.accuracy:.1%}", f"{one.untouched:.0%}")
        degraded = [one for one in self.sets if one.tasks]
        if len(degraded) > 1:
            kinds = zip(*((one.input, one.blind, one.told, one.misled) for one in degraded), strict=True)
            means = [_mean([one for one in kind if one]) if any(kind) else None for kind in kinds]
            quality.add_section()
            quality.add_row("mean", "", *map(_cell, means), f"{self.accuracy:.1%}", "")
        console.print(quality)

        if self.sets[0].images[0].measures:
            more = Table("set", *self.sets[0].images[0].measures, title="Restored blind", **_STYLE)
            for one in self.sets:
                more.add_row(one.name, *measure_cells(mean_measures([image.measures for image in one.images])))
            console.print(more)

        mixtures = any(len(one.tasks) != 1 for one in self.sets)
        right = ["right"] if mixtures else []
        confusion = Table("is \\ matched as", *self.tasks, "found", *right, title="Matching, blind", **_STYLE)
        for index, name in enumerate(self.tasks):
            number = sum(name in true for true, _ in self._choices())
            if number:
                row = self.confusion[index]
                right = [f"{self.task_accuracy[name]:.1%}"] if mixtures else []
                confusion.add_row(name, *map(str, row), f"{row[index] / number:.1%}", *right)
        console.print(confusion)
        console.print(
            f"probabilities of tasks are off by {self.calibration_error:.1%} on average (expected calibration error)",
            highlight=False,
        )
        console.print(
            f"{self.parameters / 1e6:.2f} M parameters, {self.gmacs:.2f} GMAC at 224 x 224; on {self.device} "
            f"{self.seconds:.3f} s an image, peak memory {self.peak_memory / 2**20:.0f} MiB",
            highlight=False,
        )


def evaluation_set(source: Source, num_tasks: int, mixtures: bool = False, seed: int = 0) -> EvaluationSet:
    """The photos of a source, whole; what is synthesised depends on the seed and the photo's place alone."""
    pairs = EvaluationPairs(source, num_tasks, seed, mixtures)
    share = 1.0 if source.share is None else source.share
    return EvaluationSet(source.name, source.labels, pairs, source.optional, share)


def load_sets(
    path: str | Path, tasks: Sequence[str] | None, mixtures: bool = False, partly: bool = False
) -> list[EvaluationSet]:
    """The sets of a YAML file, `sets: [{name: ..., task: ..., pairs: DIR}, {task: ..., clean: DIR, sigma: 25}, ...]`.

    The keys of a set are those of `r2r.data.sources.build_source`; relative folders start at the file's.
    `seed` beside `sets` seeds what is synthesised. tasks: those of a model; None takes all that the file
    names. partly: sets with a task that is not among them are left out. Raises InputError, naming the file, for
    anything else.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("sets"), list) or not content["sets"]:
        raise InputError(f"{path}: accepted: a list `sets` of one or more")
    unknown = sorted(map(str, content.keys() - {"sets", "seed"}))
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0]!r}; accepted: sets, seed")
    seed = content.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"{path}: seed {seed!r}; accepted: 0 or more")
    sets: list[EvaluationSet] = []
    if tasks is None:
        tasks = _tasks_of(content["sets"])
    for number, entry in enumerate(content["sets"], start=1):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: set {number} is {entry!r}; accepted: keys and values, such as `task: denoise`")
        anchor(entry, Path(path).parent)
        if partly and not set(_tasks_of([entry])) <= set(tasks):
            continue
        try:
            sets.append(evaluation_set(build_source(entry, tasks), len(tasks), mixtures, seed))
        except InputError as error:
            raise InputError(f"{path}: set {number}: {error}") from error
    return sets


def _tasks_of(entries: Sequence[Any]) -> list[str]:
    found: dict[str, None] = {}
    for entry in entries:
        for key in ("task", "optional"):
            named = entry.get(key) if isinstance(entry, dict) else None
            found.update(dict.fromkeys([named] if isinstance(named, str) else named or []))
    return list(found)


@torch.inference_mode()
def evaluate(
    model: R2R,
    sets: Sequence[EvaluationSet],
    device: torch.device | str | None = None,
    told: bool = True,
    progress: Callable[[EvaluationSet, ImageResult], object] | None = None,
    measures: Measures | None = None,
    save: Path | None = None,
    misled: bool = True,
) -> Evaluation:
    """Restore every image of every set blind, one at a time and never tiled; with `told` also told its tasks, and with
    `misled` too, told one that it does not have, another for each image.

    Images are cropped to multiples of 16 before they are restored, as the published protocol does (`r2r.metrics`). The
    model is put in eval mode and moved to `device`, if one is given. progress: called after each image. measures: more
    to measure of what is restored blind. save: a folder for it, `SET/NAME.png`.
    Raises InputError for no image, an empty bank, a task the bank holds nothing of, images below 7 x 7, and files that
    cannot be read.
    """
    model.eval()
    if device is not None:
        model.to(device)
    where = device_of(model)
    _check(model, sets, told)
    parameters, gmacs = _size(model)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    results, seconds = [], 0.0
    for one in sets:
        images = []
        for index in range(len(one.pairs)):
            labels = one.labels if told else None
            pair, wrong = one.pairs[index], _wrong(model, one, index) if misled else None
            result, image, elapsed = _evaluate_image(model, pair, labels, wrong, where)
            if measures is not None:
                result = replace(result, measures=measures(image, centre_crop(pair.hq)))
            if save is not None:
                save_restored(image, save, pair.name, one.name)
            images.append(result)
            seconds += elapsed
            if progress is not None:
                progress(one, result)
        results.append(_set_result(one, model.tasks, images))
    number = sum(len(one.images) for one in results)
    return Evaluation(
        model.tasks, tuple(results), parameters, gmacs, seconds / number, peak_memory(where), device_name(where)
    )


def _check(model: R2R, sets: Sequence[EvaluationSet], told: bool) -> None:
    if not sets:
        raise InputError("nothing to evaluate: no set was given")
    if model.bank.empty:
        raise InputError("the bank is empty: train the model, or load one that was trained")
    counts = model.bank.counts.tolist()
    for one in sets:
        if not len(one.pairs):
            raise InputError(f"{one.name}: no image")
        lacking = [model.tasks[label] for label in one.labels if not counts[label]]
        if told and lacking:
            raise InputError(f"{one.name}: the model's bank holds nothing for {', '.join(lacking)}")


def _wrong(model: R2R, one: EvaluationSet, index: int) -> int | None:
    """A task that the images of the set do not have, in turns; None where the model has no other, or it is empty."""
    own = {*one.labels, *one.optional}
    others = [task for task, count in enumerate(model.bank.counts.tolist()) if count and task not in own]
    return others[index % len(others)] if others else None


def _evaluate_image(
    model: R2R, pair: EvaluationPair, labels: tuple[int, ...] | None, wrong: int | None, device: torch.device
) -> tuple[ImageResult, Tensor, float]:
    """labels: the tasks to tell, or None, then nothing is told. Also returns the image restored blind [3, H, W] and the
    seconds that took."""
    check_size(pair)
    lq, hq = centre_crop(pair.lq)[None].to(device), centre_crop(pair.hq)
    synchronise(device)
    start = time.perf_counter()
    cleared = model.clear(lq)
    features = cleared.features or model.encode(cleared.exposed)
    query, value = model.query(features.deep)
    match = model.match(query, None, cleared.overview)
    image = model.finish(cleared.image, features, value, match)
    synchronise(device)
    elapsed = time.perf_counter() - start

    def telling(tasks: tuple[int, ...]) -> Quality:
        told = _told(model, tasks, device)
        other = model.clear(lq, told)
        if not torch.equal(other.exposed, cleared.exposed):
            return _quality(model._restored(lq, told).image, hq)
        if torch.equal(told, match.task):
            return blind
        return _quality(model.finish(cleared.image, features, value, model.match(query, told, other.overview)), hq)

    blind = _quality(image, hq)
    taken = match.task[0].tolist()
    chosen = tuple(n for index, n in enumerate(model.tasks) if (taken[index] if model.mixtures else taken == index))
    result = ImageResult(
        name=pair.name,
        chosen=chosen,
        probabilities=tuple(model.probabilities(match.scores)[0].tolist()),
        untouched=torch.equal(image, lq),
        input=_quality(lq, hq),
        blind=blind,
        told=telling(labels) if labels else None,
        misled=telling((wrong,)) if labels is not None and wrong is not None else None,
    )
    return result, image[0].cpu(), elapsed


def check_size(pair: EvaluationPair) -> None:
    """Raises InputError for an image that is too small to be measured."""
    height, width = centre_crop(pair.hq).shape[1:]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(f"{pair.name}: {width} x {height}; at least 7 x 7 pixels are accepted")


def _told(model: R2R, labels: tuple[int, ...], device: torch.device) -> Tensor:
    if not model.mixtures:
        return torch.tensor(labels, device=device)
    return torch.tensor([[index in labels for index in range(len(model.tasks))]], device=device)


def _quality(image: Tensor, hq: Tensor) -> Quality:
    restored = image[0].cpu()
    return Quality(min(float(psnr(restored, hq)), MAX_PSNR), ssim(restored, hq))


def _mean(qualities: Sequence[Quality]) -> Quality:
    number = len(qualities)
    return Quality(sum(one.psnr for one in qualities) / number, sum(one.ssim for one in qualities) / number)


def _named(kind: str, quality: Quality | None) -> dict[str, float | None]:
    return {f"{kind}_psnr": quality.psnr if quality else None, f"{kind}_ssim": quality.ssim if quality else None}


def _cell(quality: Quality | None) -> str:
    return f"{quality.psnr:.2f} / {quality.ssim:.3f}" if quality else "-"


def _set_result(one: EvaluationSet, tasks: Sequence[str], images: Sequence[ImageResult]) -> SetResult:
    own, optional = (tuple(tasks[label] for label in sorted(labels)) for labels in (one.labels, one.optional))
    told, misled = ([quality for quality in qualities if quality is not None] for qualities in
                    ([image.told for image in images], [image.misled for image in images]))  # fmt: skip
    return SetResult(
        one.name,
        own,
        optional,
        tuple(images),
        _mean([image.input for image in images]),
        _mean([image.blind for image in images]),
        _mean(told) if told else None,
        _mean(misled) if misled else None,
        sum(set(own) <= set(image.chosen) <= {*own, *optional} for image in images) / len(images),
        sum(image.untouched for image in images) / len(images),
    )


def _label(task: str, one: SetResult) -> float:
    return 1.0 if task in one.tasks else 0.5 if task in one.optional else 0.0


def _size(model: R2R) -> tuple[int, float]:
    """Parameters at inference, and GMACs of one forward at 224 x 224, of the same image as in `r2r.complexity`: what a
    model does may depend on it."""
    training_only = 0 if model.amalgamator is None else sum(p.numel() for p in model.amalgamator.parameters())
    with FlopCounterMode(display=False) as counter:
        model(complexity.image(device_of(model)))
    return sum(p.numel() for p in model.parameters()) - training_only, counter.get_total_flops() / 2e9


def finite(value: Any) -> Any:
    """Lists and dictionaries with None for what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
