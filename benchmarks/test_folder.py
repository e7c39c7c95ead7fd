"""Photos a second of `r2r restore FOLDER`, which reads and writes beside the model, and of one photo after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from benchmarks.race import Race
from benchmarks.rivals import Rival, freeze
from benchmarks.runs import OURS
from benchmarks.timing import Contender
from r2r import fast
from r2r.data.images import read_photo, write_photo, write_rgb
from r2r.restoration import Settings, restore_files
from r2r.tiling import restore_photo

TASK = "denoise"  # all photos go through the network and are written


@pytest.mark.grid(quick={"photos": [(4, 64, 64)]}, full={"photos": [(50, 1024, 1024), (256, 128, 128)]})
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_folder(race: Race, photos: tuple[int, int, int], suffix: str, device: torch.device, tmp_path: Path) -> None:
    number, height, width = photos
    image = np.tile(skimage.data.astronaut().astype(np.float32) / 255, (3, 3, 1))
    (tmp_path / "photos").mkdir()
    for index in range(number):
        y, x = 7 * index % 400, 11 * index % 400
        write_rgb(tmp_path / "photos" / f"{index}{suffix}", image[y : y + height, x : x + width])
    model = freeze(fast.R2R.from_pretrained().to(device), torch.float32)

    def folder() -> None:
        report = restore_files(model, [tmp_path / "photos"], tmp_path / "out", Settings(TASK), overwrite=True)
        assert report.complete
        assert not any(one.error for one in report.files)

    def one_by_one() -> None:
        for source in sorted((tmp_path / "photos").iterdir()):
            photo = read_photo(source)
            restore_photo(model, photo.pixels, TASK, out=photo.pixels)
            write_photo(tmp_path / source.name, photo)

    race(
        "folder",
        f"{number} {suffix[1:].upper()} files of {height} x {width}",
        "float32",
        [
            Rival("one after another", lambda: Contender({"": one_by_one})),
            Rival(OURS, lambda: Contender({"": folder})),
        ],
        items=number,
    )
