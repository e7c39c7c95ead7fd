"""Training pairs a second of one worker on one core: five tasks at 128 x 128, from a folder of photos.

Training must not wait for data: at least 60 pairs a second. "warm" finds the decoded photos in the worker's cache,
"cold" decodes every one, as with data sets larger than the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from r2r.data.dataset import Source, TrainingPairs
from r2r.data.degradations import TASK_DEGRADATIONS, parse_degradation
from r2r.data.folders import clean_folder
from r2r.data.images import write_rgb
from r2r.data.sampler import EpochSampler

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "train" / "clean"
TASKS = ("denoise", "derain", "dehaze", "deblur", "lowlight")
BATCH = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photos: those beside the project, else the few inside scikit-image."""
    if PHOTOS.is_dir():
        return PHOTOS
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        write_rgb(folder / f"{name}.png", np.float32(getattr(skimage.data, name)()) / 255)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    yield
    cv2.setNumThreads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_loading(benchmark: BenchmarkFixture, photos: Path, cache: str) -> None:
    pairs = tuple(clean_folder(photos))
    sources = [
        Source(task, (index,), pairs, parse_degradation(TASK_DEGRADATIONS[task])) for index, task in enumerate(TASKS)
    ]
    dataset = TrainingPairs(sources, 128, len(TASKS), cache_bytes=2**30 if cache == "warm" else 0)
    batches = iter(EpochSampler(sources, BATCH, len(TASKS), steps=10_000))
    if cache == "warm":
        for index in range(len(pairs)):
            dataset[0, index, 0]

    def load() -> None:
        for key in next(batches):
            dataset[key]

    benchmark.pedantic(load, rounds=8, warmup_rounds=1)
    if benchmark.stats is not None:  # absent with --benchmark-disable
        benchmark.extra_info["pairs_per_second"] = round(BATCH / benchmark.stats["median"], 1)
