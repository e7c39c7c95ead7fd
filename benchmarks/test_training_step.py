"""One step of pretraining: half of the batch is restored, half builds the bank; forward, backward, optimiser apart."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import TASKS, training_rivals
from benchmarks.timing import Effort
from r2r import R2R
from r2r.presets import PRESETS

# Peak of eager training in float32, in elements for each pixel and channel of the first level
ELEMENTS = 120


@pytest.mark.grid(
    quick={"preset": ["tiny"], "batch": [10], "side": [64]},
    everyday={"preset": ["base"], "batch": [8], "side": [128]},
    full={"preset": ["base"], "batch": [8, 32], "side": [128]},
)
def test_training_step(
    race: Race, preset: str, batch: int, side: int, dtype: str, device: torch.device, effort: Effort
) -> None:
    generator = torch.Generator().manual_seed(0)
    hq = torch.rand(batch, 3, side, side, generator=generator)
    lq = (hq + 0.1 * torch.randn(hq.shape, generator=generator)).clamp(0, 1)
    labels = torch.arange(batch) % (batch // 2) % len(TASKS)
    pairs = [x.to(device) for x in (lq, hq, labels)]
    kind: torch.dtype = getattr(torch, dtype)
    race(
        "training step",
        f"{preset}, {batch} x {side} x {side}",
        dtype,
        training_rivals(preset, device, kind, pairs, effort),
        work(preset, batch // 2, side, kind.itemsize),
        items=batch,
        needs=batch * side * side * PRESETS[preset]["width"] * ELEMENTS * kind.itemsize,
    )


def work(preset: str, half: int, side: int, itemsize: int) -> dict[str, roofline.Work]:
    sizes = PRESETS[preset]

    def step(backward: bool) -> roofline.Work:
        restored = roofline.model(half, side, side, itemsize, sizes, len(TASKS), backward)
        memory = roofline.amalgamator(half, side, side, itemsize, sizes, len(TASKS), backward)
        return roofline.total(restored) + roofline.total(memory)

    forward, both = step(False), step(True)
    return {"forward": forward, "backward": both - forward, "optimiser": roofline.adam(parameters(preset))}


def parameters(preset: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in R2R(tasks=TASKS, **PRESETS[preset]).parameters())
