"""The feed-forward branch of a NAF block, which other architectures share, at the model's levels."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import GatedFeedForward, PublishedGatedFeedForward, operator_rivals, published_form
from benchmarks.sizes import FULL, GPU, QUICK, Size, direction, images, name, settle
from benchmarks.timing import Effort


@pytest.mark.grid(
    quick={"size": QUICK, "backward": [False]}, full={"size": FULL, "backward": [False, True]}, gpu={"size": GPU}
)
def test_gated_feed_forward(
    race: Race, size: Size, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    x = images(size, device, dtype)
    module = settle(GatedFeedForward(size[1], eager=True), device, dtype)
    published = settle(PublishedGatedFeedForward(size[1]), device, dtype)
    published.load_state_dict(module.state_dict())
    race(
        f"gated_feed_forward {direction(backward)}",
        name(size),
        dtype,
        operator_rivals("gated_feed_forward", module, [x], published_form(published), backward, effort=effort),
        roofline.gated_feed_forward(*size, x.itemsize, backward),
    )
