"""How cost grows: with pixels it must be linear, with tasks retrieval must be flat but for reading the keys.

Few rivals here: what matters is the slope of each, which the last table shows beside that of the machine's limit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import roofline
from benchmarks.race import Race
from benchmarks.rivals import TASKS, inference_rivals, operator_rivals, photo_rivals
from benchmarks.sizes import images, settle
from benchmarks.test_bank_retrieve import retrieval
from benchmarks.test_slot_conv import convolution
from benchmarks.timing import QUICK, Effort
from r2r.presets import PRESETS
from r2r_kernels.nn import NAFBlock

PIXELS = [(128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 2048), (4000, 6000)]


@pytest.mark.grid(quick={"size": PIXELS[:2]}, full={"size": PIXELS, "dtype": ["float32"]})
def test_photo_by_pixels(race: Race, size: tuple[int, int], dtype: str, device: torch.device, effort: Effort) -> None:
    """As `r2r restore`, in tiles where the photo is large; the tiny model in quick runs."""
    h, w = size
    preset = "tiny" if effort is QUICK else "base"
    pixels = np.random.default_rng(0).random((h, w, 3), dtype=np.float32)
    race(
        "photo by pixels",
        f"{preset}, {h} x {w}",
        dtype,
        photo_rivals(preset, pixels, device, effort, compiling=False),
        roofline.total(roofline.model(1, h, w, 4, PRESETS[preset], len(TASKS))),
        growth=("pixels", h * w),
        items=1,
        baseline=torch.from_numpy(pixels),
    )


# 24 MP on a CPU: PyTorch's convolutions crash the process in bfloat16, and need 31 GB in float32
@pytest.mark.grid(quick={"size": PIXELS[:3]}, full={"size": PIXELS[:-1]}, gpu={"size": PIXELS})
def test_naf_block_by_pixels(
    race: Race, size: tuple[int, int], dtype: str, device: torch.device, effort: Effort
) -> None:
    h, w = size
    itemsize = getattr(torch, dtype).itemsize
    x = images((1, 32, h, w), device, dtype)
    module = settle(NAFBlock(32, eager=True), device, dtype)
    race(
        "naf_block by pixels",
        f"1 x 32 x {h} x {w}",
        dtype,
        operator_rivals("naf_block", module, [x], effort=effort, compiling=False),
        roofline.naf_block(1, 32, h, w, itemsize),
        growth=("pixels", h * w),
        needs=10 * x.numel() * itemsize,
    )


@pytest.mark.grid(quick={"batch": [1, 4]}, full={"batch": [1, 2, 4, 8, 16, 32, 64]})
def test_model_by_batch(race: Race, batch: int, dtype: str, device: torch.device, effort: Effort) -> None:
    preset, side = ("tiny", 64) if effort is QUICK else ("base", 128)
    lq = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    kind: torch.dtype = getattr(torch, dtype)
    race(
        "model by batch",
        f"{preset}, {batch} x {side} x {side}",
        dtype,
        inference_rivals(preset, lq, kind, effort, compiling=False),
        roofline.total(roofline.model(batch, side, side, kind.itemsize, PRESETS[preset], len(TASKS))),
        growth=("images", batch),
        items=batch,
        baseline=lq,
    )


@pytest.mark.grid(quick={"tasks": [1, 16]}, full={"tasks": [1, 2, 4, 8, 16, 32, 64]})
def test_retrieval_by_tasks(race: Race, tasks: int, dtype: str, device: torch.device, effort: Effort) -> None:
    retrieval(race, tasks, 1, 53, False, dtype, device, effort, "bank_retrieve by tasks", ("tasks", tasks))


@pytest.mark.grid(quick={"slots": [16, 64]}, full={"slots": [16, 32, 64, 128, 256]})
def test_retrieval_by_slots(race: Race, slots: int, dtype: str, device: torch.device, effort: Effort) -> None:
    retrieval(race, 5, 1, slots, False, dtype, device, effort, "bank_retrieve by slots", ("slots", slots))


@pytest.mark.grid(quick={"slots": []}, full={"slots": [16, 32, 64, 128]})
def test_slot_conv_by_slots(race: Race, slots: int, dtype: str, device: torch.device, effort: Effort) -> None:
    convolution(race, 1, slots, 64, True, dtype, device, effort, "slot_conv by slots", ("slots", slots))
