"""Draws degradations.jpg, the pictures of docs/degradations.md: python docs/images/degradations.py"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import skimage.data

from r2r.data.degradations import parse_degradation

SPECS = (
    "noise:sigma=25",
    "noise:sigma=25,grain=2.5,grey=0.5",
    "noise:sigma=30,signal=1,imbalance=0.5",
    "noise:sigma=25+jpeg:quality=50",
    "jpeg:quality=12",
    "noise:sigma=25+resize:factor=0.6",
    "rain",
    "rain+haze",
    "haze:beta=1.5",
    "blur:extent=12",
    "lowlight:gain=0.2",
    "snow",
)
SIDE, ACROSS = 200, 4


def main() -> None:
    photo = skimage.data.coffee()[60:260, 160:360] / np.float32(255)
    tiles = []
    for spec in SPECS:
        tile = np.rint(255 * parse_degradation(spec)(photo, np.random.default_rng(1))).astype(np.uint8)
        label = np.full((20, SIDE, 3), 255, np.uint8)
        cv2.putText(label, spec, (3, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(np.vstack([tile, label]))
    rows = [np.hstack(tiles[start : start + ACROSS]) for start in range(0, len(tiles), ACROSS)]
    cv2.imwrite(str(Path(__file__).with_suffix(".jpg")), np.vstack(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
