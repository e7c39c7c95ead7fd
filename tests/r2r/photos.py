"""Photos that tests write to files."""

from __future__ import annotations

from typing import Any

import numpy as np

from r2r.data.images import Photo, format_of, from_float


def photo_of(
    name: str, pixels: np.ndarray, alpha: np.ndarray | None = None, bits: int = 8, grey: bool = False, **kept: Any
) -> Photo:
    """A photo of float pixels [H, W, 3] and alpha [H, W], in the format of a file's name."""
    samples = pixels[..., :1] if grey else pixels
    samples = samples if alpha is None else np.dstack([samples, alpha])
    return Photo(from_float(samples, np.dtype(f"uint{bits}")), file_format=format_of(name), **kept)
