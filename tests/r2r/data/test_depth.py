from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from r2r.data.depth import DEPTH_ENCODINGS, plausible_depth, read_depth
from r2r.errors import InputError


def test_made_up_depth_is_one_scene_for_all_its_windows(photos: list[np.ndarray]) -> None:
    for photo in photos:
        eight_bit = np.rint(photo * 255).astype(np.uint8)
        whole = plausible_depth(eight_bit, np.random.default_rng(1))
        part = plausible_depth(eight_bit, np.random.default_rng(1), (20, 30, 100, 90))
        assert whole.shape == photo.shape[:2]
        assert whole.min() > 0
        assert whole.max() <= 1
        assert np.ptp(whole) > 0.3
        np.testing.assert_allclose(part, whole[20:120, 30:120], atol=0.1)  # the border sees less of the photo
        np.testing.assert_allclose(part[16:-16, 16:-16], whole[36:104, 46:104], atol=1e-5)
        np.testing.assert_allclose(plausible_depth(photo, np.random.default_rng(1)), whole, atol=0.02)


def test_made_up_depth_is_mostly_farther_above_and_follows_edges(photos: list[np.ndarray]) -> None:
    photo = photos[0]
    fields = [plausible_depth(photo, np.random.default_rng(seed)) for seed in range(24)]
    higher = [field[: len(field) // 4].mean() > field[-len(field) // 4 :].mean() for field in fields]
    assert np.mean(higher) > 0.6
    edges = cv2.Canny(np.rint(photo * 255).astype(np.uint8), 150, 300) > 0
    steepness = np.mean([np.hypot(*np.gradient(field)) for field in fields], axis=0)
    assert steepness[edges].mean() > 1.5 * steepness[~edges].mean()


@pytest.mark.parametrize(
    ("name", "encoding", "shape"),
    [
        ("o3d_rgbd_00000.png", "distance", (480, 640)),
        ("TUM.png", "distance", (480, 640)),
        ("SUN.png", "sunrgbd", None),
        ("NYU.pgm", "nyu", (480, 640)),
        ("da_outdoor_1.png", "nearness", (400, 400)),
    ],
)
def test_real_depth_files(shared: Path, name: str, encoding: str, shape: tuple[int, int] | None) -> None:
    depth = read_depth(shared / "data/depth/depth" / name, encoding)
    assert depth.dtype == np.float32
    assert shape is None or depth.shape == shape
    assert 0 <= depth.min() < 0.45
    assert depth.max() == 1
    assert 0.01 < (depth > 0.98).mean() < 0.4  # the far end is a place, not one stray pixel


def test_the_far_end_is_one_and_holes_are_filled(tmp_path: Path) -> None:
    millimetres = np.full((40, 60), 1000, np.uint16)
    millimetres[:, 30:] = 4000
    millimetres[10:20, 5:15] = 0
    cv2.imwrite(str(tmp_path / "depth.png"), millimetres)
    depth = read_depth(tmp_path / "depth.png")
    np.testing.assert_allclose(depth[:, 30:], 1)
    np.testing.assert_allclose(depth[:, :25], 0.25, atol=1e-3)


def test_nearness_turns_bright_into_near(tmp_path: Path) -> None:
    ramp = np.arange(1, 251, dtype=np.uint8)[None].repeat(20, axis=0)
    cv2.imwrite(str(tmp_path / "near.png"), ramp)
    assert (np.diff(read_depth(tmp_path / "near.png", "nearness")[0]) <= 0).all()


def test_what_is_no_depth_map(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "colour.png"), np.zeros((5, 5, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "empty.png"), np.zeros((5, 5), np.uint16))
    (tmp_path / "text.png").write_text("no image")
    for name in ("colour.png", "text.png", "absent.png"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as a depth map"):
            read_depth(tmp_path / name)
    with pytest.raises(InputError, match="holds no measurement"):
        read_depth(tmp_path / "empty.png")
    with pytest.raises(InputError, match=f"accepted: {', '.join(DEPTH_ENCODINGS)}"):
        read_depth(tmp_path / "empty.png", "feet")
