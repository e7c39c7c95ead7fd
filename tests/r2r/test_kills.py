"""A folder run that is killed at any moment loses nothing, and the same command does the rest."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from r2r import R2R
from r2r.data.images import write_rgb
from r2r.report import REPORT
from r2r.restoration import restore_files

PHOTOS, KILLS = 60, 20


def restore(model: Path, photos: Path, out: Path) -> None:
    torch.set_num_threads(1)
    restore_files(R2R.from_pretrained(model), [photos], out)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_20_kills_lose_nothing(tiny_model: R2R, tmp_path: Path) -> None:
    model, photos, out = (tmp_path / name for name in ("model", "photos", "out"))
    tiny_model.save_pretrained(model)
    pixels = skimage.data.astronaut() / np.float32(255)
    suffixes = (".png", ".jpg", ".tif", ".webp")
    for number in range(PHOTOS):
        write_rgb(photos / f"{number:02}{suffixes[number % 4]}", pixels[number : 200 + number, : 240 + number])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()}
    context, rng = multiprocessing.get_context("spawn"), random.Random(0)
    done: set[str] = set()
    for _ in range(KILLS):
        running = context.Process(target=restore, args=(model, photos, out))
        running.start()
        known = time.monotonic()
        while not (out / REPORT).exists() and running.is_alive() and time.monotonic() - known < 600:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5) if rng.random() < 0.5 else rng.uniform(0, 6))  # at the start, and in the midst
        running.kill()
        running.join()
        report = json.loads((out / REPORT).read_text())  # true, and whole
        now = {Path(one["output"]).name for one in report["files"]}
        assert done <= now  # what was done is still known
        done = now
        for path in out.iterdir():
            if path.name != REPORT and not path.name.startswith("."):
                with Image.open(path) as image:
                    image.load()  # whole
    report = restore_files(R2R.from_pretrained(model), [photos], out)
    assert report.unchanged == len(done)
    assert (report.failed, len(report.files), report.complete) == (0, PHOTOS, True)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        *(path.name for path in photos.iterdir()), REPORT,
    }  # fmt: skip
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()} == before
