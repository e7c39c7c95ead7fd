"""Pairs for training (crops, augmented) and for evaluation (whole photos), from one kind of source.

Nothing random is kept between samples: the key of a sample seeds everything about it. So the tensors do not depend on
the number of workers, and training resumes exactly by asking for the same keys.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from r2r.data.degradations import Degradation
from r2r.data.depth import DEPTH_ENCODINGS, plausible_depth, read_depth
from r2r.data.folders import Pair, some
from r2r.data.images import map_rgb, read_photo, read_rgb, to_float
from r2r.data.sizes import known_size
from r2r.errors import InputError

logger = logging.getLogger(__name__)

Key = tuple[int, int, int]
"""A training sample: index of its source, of the pair in it, and a draw from 0 to 2**63 - 1 that seeds the rest."""


@dataclass(frozen=True)
class Source:
    """Photos that share what is wrong with them.

    labels: indices of the tasks that restore them, several for a mixture, none where nothing is wrong: such photos are
    to come out as they went in, compressed or not. optional: tasks that may be found as well; nobody is sure about
    them. degradation: how degraded photos are made where the pairs have none. repeat: how often an epoch shows each
    pair. share: how often training draws from this source, relative to the others (`EpochSampler`). reduce: photos are
    reduced to a size between these factors before anything else is done with them. depth_encoding: see
    `r2r.data.depth`.
    Raises InputError for no photo, a repeat below 1, a share or a factor outside its range, labels that are optional
    too, or degraded photos and a degradation at once.
    """

    name: str
    labels: tuple[int, ...]
    pairs: tuple[Pair, ...]
    degradation: Degradation | None = None
    repeat: int = 1
    depth_encoding: str = "distance"
    optional: tuple[int, ...] = ()
    share: float | None = None
    reduce: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not self.pairs:
            raise InputError(f"{self.name}: no photo; accepted: at least one")
        tasks = (*self.labels, *self.optional)
        if len(set(tasks)) < len(tasks) or min(tasks, default=0) < 0:
            raise InputError(
                f"{self.name}: labels {self.labels}, optional {self.optional}; accepted: different indices"
            )
        if self.repeat < 1:
            raise InputError(f"{self.name}: repeat {self.repeat}; accepted: 1 or more")
        if self.share is not None and not self.share > 0:
            raise InputError(f"{self.name}: share {self.share}; accepted: numbers above 0")
        if not 0 < self.reduce[0] <= self.reduce[1] <= 1:
            raise InputError(f"{self.name}: reduce {self.reduce}; accepted: low..high within 0 and 1")
        if self.depth_encoding not in DEPTH_ENCODINGS:
            accepted = ", ".join(DEPTH_ENCODINGS)
            raise InputError(f"{self.name}: depth encoding {self.depth_encoding!r} is unknown; accepted: {accepted}")
        if any((pair.degraded is None) == (self.degradation is None) for pair in self.pairs):
            raise InputError(f"{self.name}: accepted: either degraded photos for all, or a degradation to make them")

    def fingerprint(self) -> str:
        """Of the names and the sizes in bytes of the files, wherever they lie."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(os.fsencode(f"{pair.name}\n"))
            for path in _paths(pair):
                try:
                    size = path.stat().st_size
                except OSError:  # whoever reads it says so
                    size = -1
                digest.update(os.fsencode(f"{path.name} {size}\n"))
        return digest.hexdigest()


class TrainingPairs(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Augmented crops: dataset[key] -> lq, hq float32 [3, crop, crop] in [0, 1], and the label.

    A crop at a random place is degraded (or cut from the degraded photo), then turned and mirrored in one of the eight
    ways that keep a square, the identity among them. label: int64 []; with `mixtures` float32 [num_tasks], 1 for the
    tasks that restore the photo, 0.5 for those that may be found as well, 0 for the others.

    A file that cannot be read is named once in the log and replaced by the next of its source; `skipped` counts such
    files over all workers. Decoded photos are kept, as they are stored, up to `cache_bytes` in each worker.
    Raises InputError for labels that do not fit num_tasks or mixtures, and for photos smaller than the crop.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        crop: int,
        num_tasks: int,
        seed: int = 0,
        mixtures: bool = False,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        if crop < 1 or seed < 0:
            raise InputError(f"crop {crop}, seed {seed}; accepted: a crop of 1 or more, a seed of 0 or more")
        self.sources = tuple(sources)
        self.crop = crop
        self.seed = seed
        self._labels = [_label(source, num_tasks, mixtures) for source in self.sources]
        self._cache = _ArrayCache(cache_bytes)
        paths = (path for source in self.sources for pair in source.pairs for path in _paths(pair))
        self._file_index = {path: index for index, path in enumerate(dict.fromkeys(paths))}
        # One flag a file, in memory that all workers share.
        self._unreadable = torch.zeros(len(self._file_index), dtype=torch.bool).share_memory_()
        self._check_crop()

    @property
    def skipped(self) -> int:
        """How many files could not be read so far, by any worker."""
        return int(self._unreadable.sum())

    def __len__(self) -> int:
        """Samples in an epoch, repeats included."""
        return sum(len(source.pairs) * source.repeat for source in self.sources)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        source_index, pair_index, draw = key
        source = self.sources[source_index]
        rng = np.random.default_rng([self.seed, source_index, pair_index, draw])
        for step in range(len(source.pairs)):
            pair = source.pairs[(pair_index + step) % len(source.pairs)]
            if any(self._unreadable[self._file_index[path]] for path in _paths(pair)):
                continue
            try:
                photos = self._read(source, pair)
            except InputError:  # logged where it was raised
                continue
            lq, hq = self._cut(source, photos, rng)
            element = int(rng.integers(8))
            return _tensor(dihedral(lq, element)), _tensor(dihedral(hq, element)), self._labels[source_index]
        raise InputError(f"{source.name}: none of its {len(source.pairs)} photos can be read")

    def _check_crop(self) -> None:
        small = []
        factors: dict[Path, float] = {}
        for source in self.sources:
            for pair in source.pairs:
                factors[pair.clean] = max(factors.get(pair.clean, 0), source.reduce[1])
        for path, factor in factors.items():
            try:
                height, width = known_size(path)
            except InputError as error:
                self._skip(path, error)
                continue
            if min(height, width) * factor < self.crop:
                small.append(f"{path} ({width} x {height})")
        if small:
            raise InputError(f"smaller than the crop of {self.crop} x {self.crop}: {some(small)}")

    def _skip(self, path: Path, error: InputError) -> None:
        self._unreadable[self._file_index[path]] = True
        logger.warning("%s; skipped in training", error)

    def _read(self, source: Source, pair: Pair) -> _Photos:
        clean = self._load(pair.clean, _read_samples)
        degraded = depth = None
        if pair.degraded is not None:
            degraded = self._load(pair.degraded, _read_samples, clean)
        elif pair.depth is not None:
            depth = self._load(pair.depth, lambda path: read_depth(path, source.depth_encoding), clean)
        return _Photos(clean, degraded, depth)

    def _load(self, path: Path, read: Callable[[Path], np.ndarray], clean: np.ndarray | None = None) -> np.ndarray:
        try:
            array = self._cache.get(path, read)
            if clean is not None:
                _check_match(path, array, clean)
        except InputError as error:
            self._skip(path, error)
            raise
        return array

    def _cut(self, source: Source, photos: _Photos, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Degraded and clean crop, float32 [crop, crop, 3]."""
        size = self.crop
        factor = _draw_factor(source.reduce, size / min(photos.clean.shape[:2]), rng)
        photo = _Reduced(photos.clean, factor)
        height, width = photo.shape
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        if photos.degraded is not None:
            degraded, clean = (_Reduced(x, factor).cut(top, left, size, size) for x in (photos.degraded, photos.clean))
            return degraded, clean if source.labels else degraded
        degradation = source.degradation
        assert degradation is not None  # Source has one or the other
        # With its surroundings, as far as there are any, so that content moves in over the border as in the photo.
        margin = degradation.margin
        y, x = max(0, top - margin), max(0, left - margin)
        rows, columns = min(height, top + size + margin) - y, min(width, left + size + margin) - x
        depth = None
        if photos.depth is not None:
            depth = _Reduced(photos.depth, factor).cut(y, x, rows, columns)
        elif degradation.needs_depth:
            depth = plausible_depth(photos.clean, rng, photo.window(y, x, rows, columns))
            depth = cv2.resize(depth, (columns, rows), interpolation=cv2.INTER_AREA)
        around = photo.cut(y, x, rows, columns)
        degraded, clean = (
            _window(whole, top - y, left - x, size, size) for whole in (degradation(around, rng, depth), around)
        )
        return degraded, clean if source.labels else degraded


class EvaluationPair(NamedTuple):
    """A whole photo, degraded and clean: float32 [3, H, W] in [0, 1]; label as in TrainingPairs."""

    name: str
    lq: torch.Tensor
    hq: torch.Tensor
    label: torch.Tensor


class EvaluationPairs(Dataset[EvaluationPair]):
    """Whole photos of one source, in order, with the full precision of their files.

    What is synthesised depends only on `seed` and on a photo's place in the source. `reduce` has to be one factor.
    Raises InputError, at once where a header shows it, for any file that cannot be read.
    """

    def __init__(self, source: Source, num_tasks: int, seed: int = 0, mixtures: bool = False) -> None:
        if seed < 0:
            raise InputError(f"seed {seed}; accepted: 0 or more")
        if source.reduce[0] != source.reduce[1]:
            raise InputError(f"{source.name}: reduce {source.reduce}; accepted for evaluation: one number")
        self.source = source
        self.seed = seed
        self._label = _label(source, num_tasks, mixtures)
        for pair in source.pairs:
            for path in _paths(pair):
                known_size(path)

    def check(self) -> None:
        """Read every file whole. Raises InputError where one is damaged, or the photos of a pair differ in size."""
        for pair in self.source.pairs:
            clean = read_rgb(pair.clean)
            if pair.degraded is not None:
                _check_match(pair.degraded, read_rgb(pair.degraded), clean)
            if pair.depth is not None:
                _check_match(pair.depth, read_depth(pair.depth, self.source.depth_encoding), clean)

    def __len__(self) -> int:
        return len(self.source.pairs)

    def __iter__(self) -> Iterator[EvaluationPair]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> EvaluationPair:
        pair, degradation = self.source.pairs[index], self.source.degradation
        factor = self.source.reduce[0]
        clean = read_rgb(pair.clean)
        if pair.degraded is not None:
            degraded = read_rgb(pair.degraded)
            _check_match(pair.degraded, degraded, clean)
            degraded, clean = (_Reduced(x, factor).whole() for x in (degraded, clean))
        else:
            assert degradation is not None  # Source has one or the other
            depth = None
            if pair.depth is not None:
                depth = read_depth(pair.depth, self.source.depth_encoding)
                _check_match(pair.depth, depth, clean)
                depth = _Reduced(depth, factor).whole()
            clean = _Reduced(clean, factor).whole()
            degraded = degradation(clean, np.random.default_rng([self.seed, index]), depth)
        if not self.source.labels:
            clean = degraded
        return EvaluationPair(pair.name, _tensor(degraded), _tensor(clean), self._label)


def dihedral(image: np.ndarray, element: int) -> np.ndarray:
    """`image` [H, W, ...] turned by element % 4 quarter turns, and from 4 on mirrored first; 0 is the identity."""
    return np.rot90(image[:, ::-1] if element >= 4 else image, element % 4)


def worker_init(worker: int) -> None:
    """For DataLoader's worker_init_fn: a worker is one thread; OpenCV's own would fight over the cores. It ends with
    the process that started it, which may have something to save when both are told to stop."""
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Photos(NamedTuple):
    """Decoded files of a pair: [H, W, 3] and [H, W]."""

    clean: np.ndarray
    degraded: np.ndarray | None = None
    depth: np.ndarray | None = None


class _Reduced:
    """A photo [H, W, 3] or a depth map [H, W], seen at `factor` of its size; only what is cut out of it is made."""

    def __init__(self, image: np.ndarray, factor: float) -> None:
        self.image = image
        height, width = image.shape[:2]
        self.shape = (height, width) if factor == 1 else (max(1, round(height * factor)), max(1, round(width * factor)))

    def window(self, top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Where that lies in the photo, in whole pixels."""
        down, across = (own / seen for own, seen in zip(self.image.shape[:2], self.shape, strict=True))
        y, x = int(top * down), int(left * across)
        return y, x, round((top + height) * down) - y, round((left + width) * across) - x

    def cut(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """float32 [height, width, ...], samples of photos in [0, 1]."""
        part = to_float(_window(self.image, *self.window(top, left, height, width)))
        if part.shape[:2] == (height, width):
            return part
        return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA).clip(0, 1)  # rounding leaves the range

    def whole(self) -> np.ndarray:
        return self.cut(0, 0, *self.shape)


def _draw_factor(span: tuple[float, float], least: float, rng: np.random.Generator) -> float:
    """A factor in the span, as far as it leaves at least `least` of the photo's shorter side."""
    if span[1] == 1 == span[0]:
        return 1.0
    return float(rng.uniform(max(span[0], min(least, span[1])), span[1]))


class _ArrayCache:
    """The arrays read last, by path, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._arrays: OrderedDict[Path, np.ndarray] = OrderedDict()

    def get(self, path: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        array = self._arrays.pop(path, None)
        if array is None:
            array = read(path)
            if isinstance(array, np.memmap):  # the system keeps what is read of it
                return np.asarray(array)
            self.size += array.nbytes
        self._arrays[path] = array
        while self.size > self.limit:
            self.size -= self._arrays.popitem(last=False)[1].nbytes
        return array


def _paths(pair: Pair) -> list[Path]:
    return [path for path in (pair.clean, pair.degraded, pair.depth) if path is not None]


def _check_match(path: Path, image: np.ndarray, clean: np.ndarray) -> None:
    if image.shape[:2] != clean.shape[:2]:
        (height, width), (rows, columns) = image.shape[:2], clean.shape[:2]
        raise InputError(f"{path}: {width} x {height}, but its clean photo is {columns} x {rows}")


def _label(source: Source, num_tasks: int, mixtures: bool) -> torch.Tensor:
    highest = max((*source.labels, *source.optional), default=0)
    if highest >= num_tasks:
        raise InputError(f"{source.name}: label {highest} of {num_tasks} tasks; accepted: 0 to {num_tasks - 1}")
    if mixtures:
        label = torch.zeros(num_tasks)
        label[list(source.labels)], label[list(source.optional)] = 1, 0.5
        return label
    if len(source.labels) != 1 or source.optional:
        raise InputError(f"{source.name}: {len(source.labels)} labels; accepted: one, unless training on mixtures")
    return torch.tensor(source.labels[0])


def _read_samples(path: Path) -> np.ndarray:
    """As `read_rgb`, in the type of the file's samples: uint8, uint16 or float32. An uncompressed TIFF is mapped."""
    mapped = map_rgb(path)
    if mapped is not None:
        return mapped
    pixels = read_photo(path).pixels
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _window(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    return image[top : top + height, left : left + width]


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))
