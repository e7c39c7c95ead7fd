"""1x1 convolution, PixelShuffle(2) and the skip. Sizes are those of the result."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import UpsampleAdd, operator_rivals
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name, settle
from benchmarks.timing import Effort


def levels(sizes: list[Size]) -> list[Size]:
    """Those that are the result of an upsampling."""
    return [size for size in sizes if size[2] % 2 == 0 and size[3] % 2 == 0]


@pytest.mark.grid(
    quick={"size": QUICK[:1], "backward": [False]},
    full={"size": levels(FULL), "backward": [False, True]},
    gpu={"size": levels(GPU)},
)
def test_upsample_add(race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort) -> None:
    n, c, h, w = size
    x, skip = images((n, 2 * c, h // 2, w // 2), device, dtype), images(size, device, dtype)
    module = settle(UpsampleAdd(c), device, dtype)
    race(
        f"upsample_add {direction(backward)}",
        name(size),
        dtype,
        operator_rivals("upsample_add", module, [x, skip], backward=backward, effort=effort),
        roofline.upsample_add(n, c, h, w, x.itemsize, backward),
    )
