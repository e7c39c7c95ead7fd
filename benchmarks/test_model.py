"""The whole model, restoring blind: 224 x 224 alone and in a batch, 720p and 1080p in one piece, 4K in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import TASKS, inference_rivals, photo_rivals
from benchmarks.timing import Effort
from r2r.presets import PRESETS

# Peak of the published model in one piece, in elements for each pixel and channel of the first level
ELEMENTS = 24


@pytest.mark.grid(
    quick={"size": [(1, 224, 224)]},
    everyday={"size": [(1, 224, 224)]},
    full={"size": [(1, 224, 224), (32, 224, 224), (1, 720, 1280), (1, 1080, 1920)]},
)
def test_model(race: Race, size: tuple[int, int, int], dtype: str, device: torch.device, effort: Effort) -> None:
    n, h, w = size
    lq = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(0)).to(device)
    kind: torch.dtype = getattr(torch, dtype)
    race(
        "model",
        f"{n} x {h} x {w}",
        dtype,
        inference_rivals("base", lq, kind, effort),
        roofline.total(roofline.model(n, h, w, kind.itemsize, PRESETS["base"], len(TASKS))),
        items=n,
        baseline=lq,
        needs=n * h * w * 32 * ELEMENTS * kind.itemsize,
    )


@pytest.mark.grid(quick={"size": []}, full={"size": [(2160, 3840)], "dtype": ["float32"]})
def test_tiled(race: Race, size: tuple[int, int], dtype: str, device: torch.device, effort: Effort) -> None:
    h, w = size
    pixels = np.random.default_rng(0).random((h, w, 3), dtype=np.float32)
    race(
        "model in tiles",
        f"1 x {h} x {w}",
        dtype,
        photo_rivals("base", pixels, device, effort),
        roofline.total(roofline.model(1, h, w, 4, PRESETS["base"], len(TASKS))),
        items=1,
        baseline=torch.from_numpy(pixels),
    )
