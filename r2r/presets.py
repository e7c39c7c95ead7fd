"""Sizes of the model by name: keyword arguments of `r2r.R2R`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # the paper's, 19.8 M parameters at inference
    "base": {
        "width": 32,
        "encoder_blocks": (1, 1, 1, 28),
        "middle_blocks": 1,
        "decoder_blocks": (1, 1, 1, 1),
        "memory_blocks": (2, 2, 4, 8),
        "capacity": 64,
        "bank_size": 8,
    },
    "small": {
        "width": 16,
        "encoder_blocks": (1, 1, 1, 12),
        "middle_blocks": 1,
        "decoder_blocks": (1, 1, 1, 1),
        "memory_blocks": (1, 1, 2, 4),
        "capacity": 64,
        "bank_size": 8,
    },
    # trains on a laptop's CPU in minutes, on 64 x 64 crops
    "tiny": {
        "width": 8,
        "encoder_blocks": (1, 1, 1, 2),
        "middle_blocks": 1,
        "decoder_blocks": (1, 1, 1, 1),
        "memory_blocks": (1, 1, 1, 1),
        "capacity": 20,
        "bank_size": 4,
    },
}
