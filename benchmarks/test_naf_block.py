"""A whole NAF block, at the model's levels: what the kernels are for."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name, settle
from benchmarks.timing import Effort
from r2r_kernels.nn import NAFBlock


@pytest.mark.grid(
    quick={"size": QUICK, "backward": [False, True]},
    everyday={"size": QUICK[:1], "backward": [False, True]},
    full={"size": FULL, "backward": [False, True]},
    gpu={"size": GPU},
)
def test_naf_block(race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort) -> None:
    x = images(size, device, dtype)
    module = settle(NAFBlock(size[1], eager=True), device, dtype)
    race(
        f"naf_block {direction(backward)}",
        name(size),
        dtype,
        operator_rivals("naf_block", module, [x], backward=backward, effort=effort),
        roofline.naf_block(*size, x.itemsize, backward),
    )
