"""LayerNorm over the channels of each pixel."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name, settle
from benchmarks.timing import Effort
from r2r_kernels.nn import LayerNorm2d


@pytest.mark.grid(
    quick={"size": QUICK[:1], "backward": [False]}, full={"size": FULL, "backward": [False, True]}, gpu={"size": GPU}
)
def test_layer_norm_2d(
    race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    x = images(size, device, dtype)
    module = settle(LayerNorm2d(size[1], eager=True), device, dtype)
    race(
        f"layer_norm_2d {direction(backward)}",
        name(size),
        dtype,
        operator_rivals("layer_norm_2d", module, [x], backward=backward, effort=effort),
        roofline.layer_norm_2d(*size, x.itemsize, backward),
    )
