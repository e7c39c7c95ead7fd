"""Depth for haze: read from a file where there is one, else a plausible field made up from the photo.

Depth here is relative: float32 [H, W], 0 at the camera, 1 at the far end of the scene. Haze needs no more than that,
and RESIDE's indoor set draws its scattering coefficient for depth on the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from r2r.data.images import to_float
from r2r.errors import InputError

Window = tuple[int, int, int, int]
"""top, left, height, width of a crop, in pixels of the image it is cut from."""

_LAYOUT_SIZE = 96  # long side, in pixels, at which the layout of a scene is made up; its edges come from the photo


def _nearness(raw: np.ndarray) -> np.ndarray:
    peak = raw.max() or 1
    return np.where(raw > 0, 1.05 - raw / peak, 0)  # 0 stays "no measurement"


def _nyu(raw: np.ndarray) -> np.ndarray:
    kinect = 1092.5 - raw.astype(np.uint16).byteswap().astype(np.float32)
    return np.where(kinect > 0, 351.3 / np.where(kinect > 0, kinect, 1), 0)


DEPTH_ENCODINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "distance": lambda raw: raw,
    "sunrgbd": lambda raw: (raw.astype(np.uint16) >> 3) | (raw.astype(np.uint16) << 13),
    "nyu": _nyu,
    "nearness": _nearness,
}
"""What the numbers in a depth file mean: stored integers to distance in any unit, 0 where nothing was measured.
"distance" is what most files hold, such as millimetres; "nearness" is for estimates with bright = near."""


def read_depth(path: str | Path, encoding: str = "distance") -> np.ndarray:
    """The relative depth in a single-channel image file, float32 [H, W] in [0, 1]: the 99th percentile becomes 1.

    Places without a measurement are filled from their surroundings. Raises InputError for an unknown encoding, a file
    that cannot be read and a map without any measurement.
    """
    if encoding not in DEPTH_ENCODINGS:
        raise InputError(f"depth encoding {encoding!r} is unknown; accepted: {', '.join(DEPTH_ENCODINGS)}")
    try:
        raw = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        raw = None
    if raw is None or raw.ndim != 2:
        raise InputError(f"{path}: cannot be read as a depth map; accepted: an 8- or 16-bit grey image file")
    depth = DEPTH_ENCODINGS[encoding](raw).astype(np.float32)
    measured = depth > 0
    if not measured.any():
        raise InputError(f"{path}: the depth map holds no measurement")
    depth = _fill(depth, measured)
    return np.clip(depth / np.percentile(depth[measured], 99), 0, 1).astype(np.float32)


def plausible_depth(image: np.ndarray, rng: np.random.Generator, window: Window | None = None) -> np.ndarray:
    """A made-up depth field, float32 [h, w] in (0, 1], for `window` of `image` (or all of it).

    image: uint8, uint16 or float32 [H, W, 3], the whole photo: a ground plane that recedes to a horizon drawn at random
    (or none, for a view of things side by side), smooth random relief, and bright pale places taken to be farther away
    (the colour attenuation prior, Zhu et al. 2015). A guided filter (He et al. 2013) makes the field follow the photo's
    edges. Two windows of one photo with equal `rng` states see one scene.
    """
    height, width = image.shape[:2]
    shrink = min(1.0, _LAYOUT_SIZE / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    layout = _layout(to_float(cv2.resize(image, size, interpolation=cv2.INTER_AREA)), rng)
    top, left, rows, columns = window or (0, 0, height, width)
    scale_x, scale_y = size[0] / width, size[1] / height
    # Pixel centres: x of the window lies at (x + left + 1/2) * scale - 1/2 in the layout.
    to_layout = np.array(
        [[scale_x, 0, (left + 0.5) * scale_x - 0.5], [0, scale_y, (top + 0.5) * scale_y - 0.5]], np.float32
    )
    depth = cv2.warpAffine(
        layout,
        to_layout,
        (columns, rows),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    guide = to_float(image[top : top + rows, left : left + columns]).mean(axis=2)
    return np.clip(_guided_filter(guide, depth, radius=8, epsilon=2e-3), 0.01, 1).astype(np.float32)


def _layout(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = photo.shape[:2]
    nearest = rng.uniform(0.05, 0.35)
    horizon = rng.uniform(0.05, 0.55)
    flatness = rng.uniform(0.08, 0.4)  # a low camera sees the ground rush away, a high one sees it recede evenly
    ground = rng.random() < 0.75
    relief = _stretch(cv2.resize(rng.random((2, 3), np.float32), (width, height), interpolation=cv2.INTER_CUBIC))
    brightest, palest = photo.max(axis=2), photo.min(axis=2)
    prior = cv2.GaussianBlur(brightest - (brightest - palest) / np.maximum(brightest, 1e-3), (0, 0), 1.0)
    if ground:
        below = np.maximum(np.linspace(0, 1, height, dtype=np.float32)[:, None] - horizon, 0)
        depth = flatness / (below + flatness) + 0.15 * relief + 0.3 * _stretch(prior)
    else:
        depth = relief + 0.7 * _stretch(prior)
    depth = _guided_filter(photo.mean(axis=2), depth.astype(np.float32), radius=6, epsilon=1e-2)
    return nearest + (1 - nearest) * _stretch(depth)


def _stretch(field: np.ndarray) -> np.ndarray:
    low, high = float(field.min()), float(field.max())
    return (field - low) / (high - low) if high > low else np.zeros_like(field)


def _guided_filter(guide: np.ndarray, field: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """`field` smoothed over 2 * radius + 1 pixels except across the edges of `guide`; both float32 [H, W]."""

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)

    guide_mean, field_mean = mean(guide), mean(field)
    slope = (mean(guide * field) - guide_mean * field_mean) / (mean(guide * guide) - guide_mean**2 + epsilon)
    return mean(slope) * guide + mean(field_mean - slope * guide_mean)


def _fill(depth: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Holes filled with the mean of what was measured around them, looking ever farther out."""
    filled, known = np.where(measured, depth, 0).astype(np.float32), measured.astype(np.float32)
    for step in range(2, 2 + math.ceil(math.log2(max(depth.shape)))):
        if known.all():
            break
        side = (2**step + 1, 2**step + 1)
        weight = cv2.blur(known, side, borderType=cv2.BORDER_CONSTANT)
        reached = (known == 0) & (weight > 1e-6)
        mean = cv2.blur(filled * known, side, borderType=cv2.BORDER_CONSTANT) / np.maximum(weight, 1e-6)
        filled, known = np.where(reached, mean, filled), np.where(reached, 1, known).astype(np.float32)
    return filled
