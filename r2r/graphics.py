"""Whether an image is a graphic, such as a screenshot, a chart or a cartoon, rather than a photo."""

from __future__ import annotations

import numpy as np

# Measured on photos, whole and degraded, and on graphics: docs/blind.md.
_FLAT = 0.65  # a graphic has more than this share of its neighbours equal,
_EDGE = 8 / 255  # and at least half of the others differ by this share of the range or more.
_BLOCK, _MORE_INSIDE = 8, 0.02  # In a JPEG file this much more is equal inside of blocks than between them.


def is_graphic(pixels: np.ndarray, visible: np.ndarray | None = None) -> bool:
    """pixels: [H, W, C], integers, or floats in [0, 1]. visible: bool [H, W], False where they do not count.

    A graphic is mostly flat, with sharp edges, and was not compressed with losses. Photos are flat where they are dark,
    overexposed or compressed.
    """
    between, inside = (_steps(pixels, visible, after) for after in (_BLOCK, _BLOCK // 2))
    edges = between[between > 0]
    if not edges.size or not inside.size:
        return False
    sharp, sharp_inside = edges.size / between.size, np.mean(inside > 0)
    most = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    return bool(
        sharp < 1 - _FLAT
        and sharp - sharp_inside < min(_MORE_INSIDE, sharp / 4)
        and np.median(edges) >= np.float32(_EDGE * most)
    )


def _steps(pixels: np.ndarray, visible: np.ndarray | None, after: int) -> np.ndarray:
    """By how much neighbours differ, in the colour that differs most: the rows and columns `after` and the next, and
    so on for each block."""
    steps = []
    for axis in (0, 1):
        lines = pixels.swapaxes(0, axis)
        first, second = lines[after - 1 : -1 : _BLOCK], lines[after::_BLOCK]
        step = (np.maximum(first, second) - np.minimum(first, second)).max(axis=2)
        if visible is not None:
            seen = visible.swapaxes(0, axis)
            step = step[seen[after - 1 : -1 : _BLOCK] & seen[after::_BLOCK]]
        steps.append(step.ravel())
    return np.concatenate(steps)
