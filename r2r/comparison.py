"""Several methods on the same sets, in one table: quality and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from r2r import complexity
from r2r.complexity import Complexity, measure_apart
from r2r.data.dataset import EvaluationPair, EvaluationPairs
from r2r.device import synchronise
from r2r.errors import InputError
from r2r.evaluation import EvaluationSet, check_size, finite
from r2r.methods import Method, RestoredImages, checked, save_restored
from r2r.metrics import Measures, centre_crop, mean_measures, measure_cells

INPUT = "input"
"""The name of the first row: the degraded images as they are."""

Restored = tuple[Tensor, float | None]
"""An image [3, H, W], and the seconds it took; None where nothing ran."""


@dataclass(frozen=True)
class MeasuredImage:
    """One image of a set as one method restored it: `measures` by name (`r2r.metrics.Measures`); seconds: None where
    nothing ran."""

    set: str
    name: str
    measures: dict[str, float]
    seconds: float | None


@dataclass(frozen=True)
class MethodResult:
    """All images of all sets by one method. complexity: None where nothing runs."""

    name: str
    images: tuple[MeasuredImage, ...]
    complexity: Complexity | None

    def means(self, name: str) -> dict[str, float]:
        """The means over the images of a set."""
        return mean_measures([image.measures for image in self.images if image.set == name])


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: the degraded images themselves, then the methods in their order. averaged: the sets over
    which there is a mean, those in which something is wrong."""

    sets: tuple[str, ...]
    methods: tuple[MethodResult, ...]
    averaged: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One for each image and method, for a CSV file."""
        return [
            {"method": method.name, "set": image.set, "image": image.name, **image.measures, "seconds": image.seconds}
            for method in self.methods
            for image in method.images
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; what is not finite becomes None."""
        methods = [
            {**asdict(method), "means": {name: method.means(name) for name in self.sets}} for method in self.methods
        ]
        return finite({"sets": self.sets, "methods": methods})

    def render(self, console: Console) -> None:
        """Print a table for each set and one of what the methods cost."""
        names = list(self.methods[0].images[0].measures)
        for one in self.sets:
            quality = Table("method", *names, title=one, box=SIMPLE, collapse_padding=True)
            for method in self.methods:
                quality.add_row(method.name, *measure_cells(method.means(one)))
            console.print(quality)
        if len(self.averaged) > 1:
            quality = Table("method", *names, title="mean over sets", box=SIMPLE, collapse_padding=True)
            for method in self.methods:
                means = [method.means(one) for one in self.averaged]
                quality.add_row(method.name, *measure_cells(mean_measures(means)))
            console.print(quality)
        if any(method.complexity for method in self.methods):
            console.print(complexity.table([(one.name, one.complexity) for one in self.methods[1:]]))


@torch.inference_mode()
def compare(
    methods: Sequence[Method],
    sets: Sequence[EvaluationSet],
    device: torch.device,
    measures: Measures,
    save: Path | None = None,
    progress: Callable[[], object] | None = None,
) -> Comparison:
    """Restore every image of every set with every method, one image and one method at a time, never tiled.

    Images are cropped to multiples of 16 first, as the published protocol does; what a folder of images holds is
    cropped likewise. save: a folder for `METHOD/SET/NAME.png`, 8 bits, the degraded images under `input`. progress:
    called after each image, `(len(methods) + 1)` times for each. Raises InputError, before anything is restored where
    that can be seen.
    """
    if not sets:
        raise InputError("nothing to evaluate: no set was given")
    names = [INPUT, *(method.name for method in methods)]
    for kind, given in (("methods", names), ("sets", [one.name for one in sets])):
        double = next((name for name in given if given.count(name) > 1), None)
        if double is not None:
            raise InputError(f"two {kind} are called {double!r}; name them, e.g. NAME=...")
    folders = {method.name: _Folders(method, sets) for method in methods if not method.runs}
    costs = {method.name: measure_apart(method, device) for method in methods if method.runs}

    def result(name: str, restore: Callable[[EvaluationSet, EvaluationPair], Restored]) -> MethodResult:
        images = []
        for one in sets:
            for index in range(len(one.pairs)):
                pair = one.pairs[index]
                check_size(pair)
                image, seconds = restore(one, pair)
                if save is not None:
                    save_restored(image, save, pair.name, name, one.name)
                images.append(MeasuredImage(one.name, pair.name, measures(image, centre_crop(pair.hq)), seconds))
                if progress is not None:
                    progress()
        return MethodResult(name, tuple(images), costs.get(name))

    results = [result(INPUT, lambda _, pair: (centre_crop(pair.lq), None))]
    for method in methods:  # one at a time in memory
        restore = _Running(method, device) if method.runs else folders[method.name]
        results.append(result(method.name, restore))
    wrong = tuple(one.name for one in sets if one.labels)
    return Comparison(tuple(one.name for one in sets), tuple(results), wrong)


class _Running:
    """A method at work."""

    def __init__(self, method: Method, device: torch.device) -> None:
        self.name, self.device = method.name, device
        self.run = method.load(device)

    def __call__(self, _: EvaluationSet, pair: EvaluationPair) -> Restored:
        lq = centre_crop(pair.lq)[None].to(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        image = checked(self.name, self.run(lq), lq)
        synchronise(self.device)
        return image[0].float().cpu(), time.perf_counter() - start


class _Folders:
    """What a method has made of all sets. Raises InputError where an image of a source is missing."""

    def __init__(self, method: Method, sets: Sequence[EvaluationSet]) -> None:
        self.sets = {one.name: RestoredImages(Path(method.where), one.name, len(sets) == 1) for one in sets}
        for one in sets:
            for pair in one.pairs.source.pairs if isinstance(one.pairs, EvaluationPairs) else ():
                self.sets[one.name][pair.name]

    def __call__(self, one: EvaluationSet, pair: EvaluationPair) -> Restored:
        return self.sets[one.name].read(pair.name, pair.lq), None
