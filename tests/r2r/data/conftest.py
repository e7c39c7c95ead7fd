"""Real photos for the tests of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data

from r2r.data.images import write_rgb

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Four real photos at half size, float32 [H, W, 3] in [0, 1]."""
    return [np.ascontiguousarray(getattr(skimage.data, name)()[::2, ::2], np.float32) / 255 for name in NAMES]


@pytest.fixture(scope="session")
def photo_folder(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos as a folder of clean ones; not to be written to."""
    folder = tmp_path_factory.mktemp("photos")
    for name, photo in zip(NAMES, photos, strict=True):
        write_rgb(folder / f"{name}.png", photo)
    return folder
