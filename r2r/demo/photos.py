"""The demo's photos, all from installed packages: those to train on and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from skimage import data
from sklearn.datasets import load_sample_images

from r2r.data.dataset import EvaluationPair, Source, TrainingPairs
from r2r.data.degradations import TASK_DEGRADATIONS, parse_degradation
from r2r.data.folders import Pair, clean_folder
from r2r.data.images import write_rgb
from r2r.evaluation import EvaluationSet
from r2r.files import atomic_path

TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight")
TRAINING_PHOTOS = ("astronaut", "rocket", "camera", "brick", "coins", "grass", "gravel", "page", "immunohistochemistry")
HEIGHT, WIDTH = 256, 384  # of the held-out photos, all alike to lie side by side
CROP, CROPS = 128, 24  # of the held-out crops: size, number for each task
HELD_OUT_SEED = 7


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
