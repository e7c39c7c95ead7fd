"""Gated fusion of features and prior, of equal size and with the prior at the bank's resolution."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import Size, direction, images, name, settle
from benchmarks.timing import Effort
from r2r_kernels.nn import GatedConv2d

BANK = 8  # height and width of a prior that was not resized


@pytest.mark.grid(
    quick={"size": [(1, 512, 56, 56)], "kernel": [1], "prior": ["same"], "backward": [False]},
    full={
        "size": [(1, 512, 14, 14), (1, 512, 56, 56), (1, 512, 135, 240)],
        "kernel": [1, 3],
        "prior": ["same", "bank"],
        "backward": [False, True],
    },
    gpu={"size": [(32, 512, 14, 14), (32, 512, 56, 56), (8, 512, 135, 240)]},
)
def test_gated_conv(
    race: Race, size: Size, kernel: int, prior: str, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    n, c, h, w = size
    x = images(size, device, dtype)
    other = images(size if prior == "same" else (n, c, BANK, BANK), device, dtype).flip(0, 1)
    small = 0 if prior == "same" else other.numel()
    race(
        f"gated_conv {direction(backward)}",
        f"{name(size)}, {kernel} x {kernel}{f', prior {BANK} x {BANK}' if small else ''}",
        dtype,
        operator_rivals(
            "gated_conv", settle(GatedConv2d(c, kernel, eager=True), device, dtype), [x, other],
            backward=backward, effort=effort,
        ),
        roofline.gated_conv(n, c, h, w, kernel, x.itemsize, small, backward),
    )  # fmt: skip
