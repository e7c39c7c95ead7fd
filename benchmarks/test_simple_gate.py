"""SimpleGate: one half of the channels times the other. Sizes are those of the result."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name, settle
from benchmarks.timing import Effort
from r2r_kernels.nn import SimpleGate


@pytest.mark.grid(
    quick={"size": QUICK[:1], "backward": [False]}, full={"size": FULL, "backward": [False, True]}, gpu={"size": GPU}
)
def test_simple_gate(race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort) -> None:
    n, c, h, w = size
    x = images((n, 2 * c, h, w), device, dtype)
    race(
        f"simple_gate {direction(backward)}",
        name(size),
        dtype,
        operator_rivals(
            "simple_gate", settle(SimpleGate(eager=True), device, dtype), [x], backward=backward, effort=effort
        ),
        roofline.simple_gate(n, 2 * c, h, w, x.itemsize, backward),
    )
