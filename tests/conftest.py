"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from r2r import R2R

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


def fill_randomly(model: R2R) -> None:
    """Give a new model NAF blocks and an output that do something and a bank that holds something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "gamma")) or name.startswith("ending."):
                parameter.normal_(std=0.3)
    bank = model.bank
    present = torch.ones(len(bank.tasks), dtype=torch.bool)
    bank.replace(torch.rand_like(bank.keys), torch.rand_like(bank.values), present)
