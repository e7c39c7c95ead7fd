"""Photos a second of `r2r restore --ray local`, with workers of one core each, and of a plain run on as many cores.

A run of the fleet starts its workers, which import everything and load the model. In a full run this counts little.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from benchmarks.race import Race
from benchmarks.rivals import Rival
from benchmarks.runs import OURS
from benchmarks.timing import Contender
from r2r import fast
from r2r.data.images import write_rgb
from r2r.frozen import inference_form
from r2r.restoration import Settings, restore_files

TASK = "denoise"  # all photos go through the network and are written


@pytest.mark.grid(quick={"photos": [(16, 128, 128)]}, full={"photos": [(64, 1024, 1024)]})
def test_fleet(race: Race, photos: tuple[int, int, int], device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="a fleet needs Ray")
    from r2r.fleet import Fleet, connected

    number, height, width = photos
    image = np.tile(skimage.data.astronaut().astype(np.float32) / 255, (3, 3, 1))
    for index in range(number):
        y, x = 7 * index % 400, 11 * index % 400
        write_rgb(tmp_path / "photos" / f"{index}.jpg", image[y : y + height, x : x + width])
    model = fast.R2R.from_pretrained()
    frozen = inference_form(model.to(device))

    def restoring(by: Fleet | None) -> Callable[[], None]:
        def run() -> None:
            report = restore_files(frozen, [tmp_path / "photos"], tmp_path / "out", Settings(TASK), True, by=by)
            assert report.complete
            assert not report.failed

        return run

    with connected("local"):
        fleet = Fleet(model.cpu(), device.type, cores=1)
        race(
            "fleet",
            f"{number} JPEG files of {height} x {width}",
            "float32",
            [
                Rival("one process", lambda: Contender({"": restoring(None)})),
                Rival(OURS, lambda: Contender({"": restoring(fleet)})),
            ],
            items=number,
        )
