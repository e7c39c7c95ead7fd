"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r2r import R2R
from r2r.tiling import _BYTES_PER_BAND_PIXEL, RestoredPhoto, _bytes_per_pixel, restore_photo

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY: dict[str, Any] = {
    "width": 4,
    "encoder_blocks": (1, 1, 1, 1),
    "decoder_blocks": (1, 1, 1, 1),
    "memory_blocks": (1, 1, 1, 1),
    "capacity": 10,
    "bank_size": 2,
}


@pytest.fixture
def shared() -> Path:
    """The folder of real photos and parity data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder of photos and parity data beside the checkout is absent")
    return SHARED


@pytest.fixture
def tiny_model() -> R2R:
    """A small model with a random bank, three tasks, in eval mode."""
    torch.manual_seed(0)
    model = R2R(tasks=("denoise", "derain", "dehaze"), **TINY)
    fill_randomly(model)
    return model.eval()


def finding_nothing(kind: type[R2R] = R2R, **settings: Any) -> R2R:
    """Such a model, where the offsets of its bank decide what is found: nothing, as they are."""
    torch.manual_seed(0)
    model = kind(("denoise", "derain", "dehaze"), **TINY, **settings)
    fill_randomly(model)
    model.bank.offset -= 100
    return model.eval()


def fill_randomly(model: R2R) -> None:
    """Give a new model NAF blocks and an output that do something and a bank that holds something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "gamma")) or name.startswith("ending."):
                parameter.normal_(std=0.3)
    bank = model.bank
    present = torch.ones(len(bank.tasks), dtype=torch.bool)
    bank.replace(torch.rand_like(bank.keys), torch.rand_like(bank.values), present)


def with_the_same_attention_everywhere(model: R2R) -> R2R:
    """Channel attention that does not depend on the image. That of tiles only comes near to that of one piece."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sca." in name and name.endswith("weight"):
                parameter.zero_()
    return model


def whole_and_tiled(model: R2R, pixels: np.ndarray, **how: Any) -> tuple[RestoredPhoto, RestoredPhoto]:
    """A photo restored in one piece, and in tiles of 224²."""
    memory = 224**2 * _bytes_per_pixel(model) + 224 * pixels.shape[1] * _BYTES_PER_BAND_PIXEL
    whole, tiled = (restore_photo(model, pixels, memory=given, **how) for given in (None, memory))
    assert (whole.tiles, tiled.tiles > 1) == (1, True)
    return whole, tiled
