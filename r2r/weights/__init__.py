"""The model that comes with the package; docs/weights.md is its card."""

from __future__ import annotations

from pathlib import Path


def default_weights() -> Path:
    """The folder that `R2R.from_pretrained()` reads: six tasks, made by `configs/default_weights.yaml`."""
    return Path(__file__).parent / "default"
