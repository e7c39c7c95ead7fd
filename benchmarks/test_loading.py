"""Training pairs a second of one worker on one core: five tasks at 128 x 128, from a folder of photos.

Training must not wait for data: at least 60 pairs a second. "cache warm" finds the decoded photos in the worker's
cache, "cache cold" decodes every one, as with data sets larger than the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from benchmarks.race import Race
from benchmarks.rivals import TASKS, Rival
from benchmarks.timing import Contender
from r2r.data.dataset import Source, TrainingPairs
from r2r.data.degradations import TASK_DEGRADATIONS, parse_degradation
from r2r.data.folders import clean_folder
from r2r.data.images import write_rgb
from r2r.data.sampler import EpochSampler

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "train" / "clean"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photos: those beside the project, else the few inside scikit-image."""
    if PHOTOS.is_dir():
        return PHOTOS
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        write_rgb(folder / f"{name}.png", getattr(skimage.data, name)().astype(np.float32) / 255)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.mark.grid(quick={"batch": [20]}, full={"batch": [60]})
def test_loading(race: Race, photos: Path, batch: int) -> None:
    def loading(cache_bytes: int) -> Contender:
        pairs = tuple(clean_folder(photos))
        sources = [
            Source(task, (index,), pairs, parse_degradation(TASK_DEGRADATIONS[task]))
            for index, task in enumerate(TASKS)
        ]
        dataset = TrainingPairs(sources, 128, len(TASKS), cache_bytes=cache_bytes)
        batches = iter(EpochSampler(sources, batch, len(TASKS), steps=10_000))
        if cache_bytes:
            for index in range(len(pairs)):
                dataset[0, index, 0]

        def load() -> None:
            for key in next(batches):
                dataset[key]

        return Contender({"": load})

    race(
        "loading",
        f"{batch} pairs of {len(TASKS)} tasks, 128 x 128, one core",
        "float32",
        [Rival("cache warm", lambda: loading(2**30)), Rival("cache cold", lambda: loading(0))],
        items=batch,
    )
