"""Whether an image is a graphic, such as a screenshot, a chart or a cartoon, rather than a photo."""

from __future__ import annotations

from functools import reduce

import cv2
import numpy as np

# Measured on photos, whole and degraded, and on graphics: docs/blind.md.
_DIFFERENT = 0.35  # Of a graphic's neighbours, fewer than this share differ,
_STEP = 8 / 255  # and half of those that do, differ by this share of the range or more.
_BLOCK, _AT_BORDERS = 8, 0.03  # In a JPEG file, this share more differ at the borders of blocks than elsewhere,
# down and across. In a table, whose rows are often 8 pixels apart or 16, it is one of both.
_RUN, _IN_RUNS = 8, 0.5  # In photos before one colour, more than this share differ in runs that long.


def is_graphic(pixels: np.ndarray, visible: np.ndarray | None = None) -> bool:
    """pixels: [H, W, C], integers, or floats in [0, 1]. visible: bool [H, W], False where they do not count.

    A graphic is mostly flat, with sharp edges, and was not compressed with losses. Photos are flat where they are dark,
    overexposed or compressed, and around an object that was cut out. One colour is a graphic: it shows nothing that
    could be restored.
    """
    if visible is None:
        visible = np.ones(pixels.shape[:2], bool)
    steps, at_borders, in_runs = [], [], 0
    for axis in (0, 1):
        lines, seen = (x.swapaxes(0, axis)[:, ::_BLOCK] for x in (pixels, visible))
        both = seen[:-1] & seen[1:]
        step = _steps(lines)
        steps.append(step[both])
        differs = (step > 0) & both
        shares = [differs[start::_BLOCK].sum() / max(1, both[start::_BLOCK].sum()) for start in range(_BLOCK)]
        at_borders.append(max(shares) - np.median(shares))  # wherever the blocks begin
        if differs.any():
            run = np.ones((_RUN, 1), np.uint8)
            in_runs += cv2.morphologyEx(differs.astype(np.uint8), cv2.MORPH_OPEN, run).sum()
    known = np.concatenate(steps)
    edges = known[known > 0]
    if not edges.size:
        shown = pixels[visible]
        return bool((shown == shown[:1]).all())
    different = edges.size / known.size
    scale = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    return bool(
        different < _DIFFERENT
        and in_runs < _IN_RUNS * edges.size
        and min(at_borders) < min(_AT_BORDERS, different / 2)
        and np.median(edges) >= np.float32(_STEP * scale)
    )


def _steps(lines: np.ndarray) -> np.ndarray:
    """[L, M, C] -> [L - 1, M]: by how much neighbours along L differ, in the colour that differs most."""
    steps = np.maximum(lines[:-1], lines[1:]) - np.minimum(lines[:-1], lines[1:])
    return reduce(np.maximum, (steps[:, :, colour] for colour in range(steps.shape[2])))
