from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from r2r.data.degradations import Haze, Noise, Rain
from r2r.data.degrade import degrade_folder
from r2r.data.folders import Pair, clean_folder, paired_folder
from r2r.data.images import image_size, read_rgb
from r2r.errors import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pairs_are_written_and_read_back(photo_folder: Path, tmp_path: Path) -> None:
    photos = clean_folder(photo_folder)
    done: list[Pair] = []
    assert degrade_folder(photos, tmp_path / "out", Noise(sigma=(25,)), progress=done.append) == 4
    assert done == photos
    pairs = paired_folder(tmp_path / "out")
    assert [pair.name for pair in pairs] == ["astronaut", "chelsea", "coffee", "rocket"]
    for pair, photo in zip(pairs, photos, strict=True):
        assert pair.degraded is not None
        clean = read_rgb(pair.clean)
        np.testing.assert_array_equal(clean, read_rgb(photo.clean))
        assert 15 < 255 * (read_rgb(pair.degraded) - clean).std() < 26


def test_a_photo_depends_on_its_name_and_the_seed_alone(photo_folder: Path, tmp_path: Path) -> None:
    photos = clean_folder(photo_folder)
    degrade_folder(photos, tmp_path / "all", Rain(), seed=1)
    degrade_folder(photos[:1:-1], tmp_path / "some", Rain(), seed=1)
    degrade_folder(photos[2:], tmp_path / "other", Rain(), seed=2)
    for name in ("coffee", "rocket"):
        path = f"degraded/{name}.png"
        expected = (tmp_path / "all" / path).read_bytes()
        assert (tmp_path / "some" / path).read_bytes() == expected
        assert (tmp_path / "other" / path).read_bytes() != expected


def test_stopped_and_called_again_it_goes_on(photo_folder: Path, tmp_path: Path) -> None:
    photos = clean_folder(photo_folder)
    degrade_folder(photos, tmp_path / "whole", Noise())

    def stop(pair: object) -> None:
        if pair is photos[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        degrade_folder(photos, tmp_path / "out", Noise(), progress=stop)
    assert len(list((tmp_path / "out/clean").iterdir())) == 2
    assert degrade_folder(photos, tmp_path / "out", Noise()) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert degrade_folder(photos, tmp_path / "out", Noise()) == 0
    for half in ("clean", "degraded"):
        (tmp_path / "out" / half / "coffee.png").unlink()
        assert degrade_folder(photos, tmp_path / "out", Noise()) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_there_is_not_overwritten(photo_folder: Path, tmp_path: Path) -> None:
    photos = clean_folder(photo_folder)[:1]
    out = tmp_path / "out"
    out.mkdir()
    degrade_folder(photos, out, Noise())  # an empty folder is fine
    before = contents(out)
    for degradation, seed in ((Noise(), 1), (Rain(), 0)):
        with pytest.raises(InputError, match="out: exists and was not made with these"):
            degrade_folder(photos, out, degradation, seed)
    with pytest.raises(InputError, match="seed -1; accepted: 0 or more"):
        degrade_folder(photos, tmp_path / "new", Noise(), seed=-1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(InputError, match="accepted: a new or empty folder"):
            degrade_folder(photos, tmp_path / name, Noise())
    assert contents(out) == before
    assert contents(tmp_path / "full") == {"mine.txt": b"mine"}


def test_haze_uses_the_depth_given(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "depth").mkdir()
    for pair in clean_folder(photo_folder):
        height, width = image_size(pair.clean)
        near_left = np.full((height, width), 5000, np.uint16)
        near_left[:, : width // 2] = 1
        cv2.imwrite(str(tmp_path / "depth" / f"{pair.name}.png"), near_left)
    photos = clean_folder(photo_folder, tmp_path / "depth")
    degrade_folder(photos, tmp_path / "out", Haze(beta=(3, 3)))
    for pair in paired_folder(tmp_path / "out"):
        assert pair.degraded is not None
        change = np.abs(read_rgb(pair.degraded) - read_rgb(pair.clean)).mean(axis=(0, 2))
        middle = len(change) // 2
        assert change[:middle].max() < 0.01 < 0.1 < change[middle:].mean()


def test_a_photo_that_cannot_be_read_is_named(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    whole = (photo_folder / "rocket.png").read_bytes()
    (tmp_path / "in/a.png").write_bytes(whole)
    (tmp_path / "in/b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"b\.png"):
        degrade_folder(clean_folder(tmp_path / "in"), tmp_path / "out", Noise())
    assert sorted(contents(tmp_path / "out")) == ["clean/a.png", "degrade.json", "degraded/a.png"]
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(InputError, match=r"b\.png"):
        degrade_folder(clean_folder(tmp_path / "in"), tmp_path / "new", Noise())
    assert not (tmp_path / "new").exists()
