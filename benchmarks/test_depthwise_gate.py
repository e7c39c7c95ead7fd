"""3x3 depthwise convolution, gate and spatial mean. Sizes are those of the result."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import DepthwiseGate, PublishedDepthwiseGate, operator_rivals
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name, settle
from benchmarks.timing import Effort


@pytest.mark.grid(
    quick={"size": QUICK[:1], "backward": [False]}, full={"size": FULL, "backward": [False, True]}, gpu={"size": GPU}
)
def test_depthwise_gate(
    race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    n, c, h, w = size
    x = images((n, 2 * c, h, w), device, dtype)
    module = settle(DepthwiseGate(c), device, dtype)
    published = settle(PublishedDepthwiseGate(c), device, dtype)
    published.load_state_dict(module.state_dict())
    race(
        f"depthwise_gate {direction(backward)}",
        name(size),
        dtype,
        operator_rivals("depthwise_gate", module, [x], published, backward, effort=effort),
        roofline.depthwise_gate(n, 2 * c, h, w, x.itemsize, backward),
    )
