from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from r2r.data.folders import Pair, clean_folder, paired_folder
from r2r.data.images import write_rgb
from r2r.errors import InputError


def picture(path: Path, height: int = 4, width: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rgb(path, np.zeros((height, width, 3), np.float32))
    return path


def test_pairs_are_matched_by_path_without_suffix(tmp_path: Path) -> None:
    degraded = [picture(tmp_path / "degraded" / name) for name in ("b.png", "a.v2.jpg", "sub/b.png")]
    clean = [picture(tmp_path / "clean" / name) for name in ("b.bmp", "a.v2.png", "sub/b.jpg")]
    (tmp_path / "clean" / "notes.txt").write_text("no photo")
    assert paired_folder(tmp_path) == [
        Pair("a.v2", clean[1], degraded[1]),
        Pair("b", clean[0], degraded[0]),
        Pair("sub/b", clean[2], degraded[2]),
    ]


def test_the_real_pairs(shared: Path) -> None:
    assert len(paired_folder(shared / "data/test/derain")) == 50
    assert len(paired_folder(shared / "data/train/dehaze")) == 11


def test_clean_photos_lie_in_the_folder_or_in_clean(tmp_path: Path) -> None:
    loose = picture(tmp_path / "x.png")
    assert clean_folder(tmp_path) == [Pair("x", loose)]
    inside = picture(tmp_path / "clean" / "y.jpg")
    assert clean_folder(tmp_path) == [Pair("y", inside)]


def test_links_to_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "elsewhere" / "b.png")
    photo = picture(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "c.png").symlink_to(photo)
    assert [pair.name for pair in clean_folder(tmp_path / "photos")] == ["a", "c"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'photos' / 'more'}: a link to a folder, which is not followed; name that folder beside this one"
    ]


def test_depth_maps_are_matched_by_name(tmp_path: Path) -> None:
    photo, depth = picture(tmp_path / "rgb" / "x.jpg"), picture(tmp_path / "depth" / "x.png")
    assert clean_folder(tmp_path / "rgb", tmp_path / "depth") == [Pair("x", photo, depth=depth)]
    picture(tmp_path / "rgb" / "y.jpg")
    with pytest.raises(InputError, match="depth: no depth map for y"):
        clean_folder(tmp_path / "rgb", tmp_path / "depth")
    picture(tmp_path / "depth" / "y.png", 5, 6)
    with pytest.raises(InputError, match=r"depth/y\.png \(6 x 5, not 6 x 4\)"):
        clean_folder(tmp_path / "rgb", tmp_path / "depth")


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        clean_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no image in it"):
        clean_folder(tmp_path)
    picture(tmp_path / "degraded" / "x.png")
    with pytest.raises(InputError, match=r"no folder clean; accepted: pairs in .*degraded and .*clean"):
        paired_folder(tmp_path)
    (tmp_path / "clean").mkdir()
    with pytest.raises(InputError, match="clean: no image in it"):
        paired_folder(tmp_path)


def test_names_without_a_partner(tmp_path: Path) -> None:
    for index in range(6):
        picture(tmp_path / "degraded" / f"{index}.png")
    picture(tmp_path / "clean" / "0.png")
    with pytest.raises(InputError, match="1, 2, 3 and 2 more in degraded without a partner in clean"):
        paired_folder(tmp_path)
    for index in range(7):
        picture(tmp_path / "clean" / f"{index}.png")
    with pytest.raises(InputError, match="6 in clean without a partner in degraded"):
        paired_folder(tmp_path)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    picture(tmp_path / "x.jpg")
    picture(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"two files named x: x\.jpg and x\.png"):
        clean_folder(tmp_path)


def test_pairs_of_different_sizes(tmp_path: Path) -> None:
    for kind in ("degraded", "clean"):
        picture(tmp_path / kind / "same.png")
    picture(tmp_path / "degraded" / "other.png", 4, 7)
    picture(tmp_path / "clean" / "other.png", 5, 6)
    with pytest.raises(InputError, match=r"clean photo: .*degraded/other\.png \(7 x 4, not 6 x 5\)$"):
        paired_folder(tmp_path)


def test_a_broken_header_is_left_to_the_reader(tmp_path: Path) -> None:
    picture(tmp_path / "clean" / "x.png")
    (tmp_path / "degraded").mkdir()
    (tmp_path / "degraded" / "x.png").write_bytes(b"no image")
    assert [pair.name for pair in paired_folder(tmp_path)] == ["x"]
