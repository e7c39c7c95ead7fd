"""The amalgamator's convolution along the slots, for the bank's keys (64 channels) and values (512)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import direction, settle
from benchmarks.timing import Effort
from r2r_kernels.nn import SlotConv3d

SIDE = 8


class PublishedSlotConv3d(SlotConv3d):
    """One depthwise Conv3d after the other, a task each."""

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[2]
        done = [
            F.conv3d(one.transpose(0, 1)[None], weight[:, None], bias, padding=(0, 1, 1), groups=channels)
            for one, weight, bias in zip(x, self.weight, self.bias, strict=True)
        ]
        return torch.cat(done).transpose(1, 2)


@pytest.mark.grid(
    quick={"tasks": [1], "slots": [64], "channels": [64], "backward": [True]},
    full={"tasks": [1, 5], "slots": [64], "channels": [64, 512], "backward": [False, True]},
)
def test_slot_conv(
    race: Race, tasks: int, slots: int, channels: int, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    convolution(race, tasks, slots, channels, backward, dtype, device, effort, f"slot_conv {direction(backward)}")


def convolution(
    race: Race, tasks: int, slots: int, channels: int, backward: bool, dtype: str, device: torch.device, effort: Effort,
    group: str, growth: tuple[str, float] | None = None,
) -> None:  # fmt: skip
    """growth: where the row stands in a series, which is measured without the rivals that compile."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, slots, channels, SIDE, SIDE, generator=generator).to(device, getattr(torch, dtype))
    kernel = slots // 5
    torch.manual_seed(0)
    module = settle(SlotConv3d(tasks, channels, kernel, eager=True), device, dtype)
    published = settle(PublishedSlotConv3d(tasks, channels, kernel), device, dtype)
    published.load_state_dict(module.state_dict())
    race(
        group,
        f"tasks {tasks}, slots {slots}, channels {channels}",
        dtype,
        operator_rivals("slot_conv", module, [x], published, backward, False, effort, growth is None),
        roofline.slot_conv(tasks, slots, channels, kernel, SIDE, SIDE, x.itemsize, backward),
        growth=growth,
    )
