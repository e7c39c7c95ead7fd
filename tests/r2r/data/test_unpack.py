"""Unpacked photos give the same crops, and no more of them is read than a crop."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from skimage import data

from r2r import InputError
from r2r.data import dataset
from r2r.data.dataset import TrainingPairs
from r2r.data.images import map_rgb, read_photo, read_rgb, write_rgb
from r2r.data.sources import build_source
from r2r.data.unpack import unpack_folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for name, photo in (("cat", data.chelsea()), ("more/cup", data.coffee())):
        for kind, gain in (("clean", 1.0), ("degraded", 0.5)):
            write_rgb(tmp_path / "pairs" / kind / f"{name}.png", photo[:90, :110].astype("float32") / 255 * gain)
    return tmp_path / "pairs"


def test_crops_are_the_same_bit_for_bit_and_nothing_is_decoded(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unpack_folder(pairs, tmp_path / "unpacked") == (4, 0)
    sources = [
        build_source({"task": "denoise", "pairs": folder, "reduce": "0.6..1"}, ["denoise"])
        for folder in (pairs, tmp_path / "unpacked")
    ]
    keys = [(0, index % 2, 31 * index) for index in range(8)]
    packed = [TrainingPairs(sources[:1], 32, 1)[key] for key in keys]
    unpacked = TrainingPairs(sources[1:], 32, 1, cache_bytes=10)
    monkeypatch.setattr(dataset, "read_photo", None)  # it would decode
    for key, (lq, hq, _) in zip(keys, packed, strict=True):
        assert torch.equal(unpacked[key][0], lq)
        assert torch.equal(unpacked[key][1], hq)
    assert unpacked.skipped == 0


def test_what_is_there_stays(pairs: Path, tmp_path: Path) -> None:
    seen: list[Path] = []
    unpack_folder(pairs, tmp_path / "unpacked")
    (tmp_path / "unpacked" / "clean" / "cat.tif").unlink()
    assert unpack_folder(pairs, tmp_path / "unpacked", seen.append) == (1, 3)
    assert seen == [pairs / "clean" / "cat.png"]


def test_sixteen_bits_and_turned_photos_are_kept(tmp_path: Path) -> None:
    deep = (np.arange(6 * 8 * 3) * 400).astype(np.uint16).reshape(6, 8, 3)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "deep.tif", deep, photometric="rgb", compression="zlib", byteorder=">")
    tifffile.imwrite(
        tmp_path / "in" / "turned.tif", deep, photometric="rgb", extratags=[(274, "H", 1, 6, True)], metadata=None
    )
    assert map_rgb(tmp_path / "in" / "turned.tif") is None  # rows of the file are columns of the photo
    unpack_folder(tmp_path / "in", tmp_path / "out")
    mapped = map_rgb(tmp_path / "out" / "deep.tif")
    assert mapped is not None
    assert np.array_equal(mapped, deep)
    turned = map_rgb(tmp_path / "out" / "turned.tif")
    assert turned is not None
    assert turned.shape == (8, 6, 3)
    assert np.array_equal(read_rgb(tmp_path / "in" / "turned.tif"), read_rgb(tmp_path / "out" / "turned.tif"))


def test_big_endian_files_are_mapped_as_they_are_read(tmp_path: Path) -> None:
    deep = (np.arange(6 * 8 * 3) * 400).astype(np.uint16).reshape(6, 8, 3)
    path = tmp_path / "big.tif"
    tifffile.imwrite(path, deep, photometric="rgb", byteorder=">", metadata=None)
    mapped = map_rgb(path)
    assert mapped is not None
    assert np.array_equal(mapped, read_photo(path).pixels)
    path.write_bytes(path.read_bytes()[:-40])
    assert map_rgb(path) is None  # cut short: whoever reads it says so
    assert map_rgb(tmp_path / "photo.png") is None


def test_what_cannot_be_unpacked_is_named(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="lies in"):
        unpack_folder(pairs, pairs / "unpacked")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no photo in it"):
        unpack_folder(tmp_path / "none", tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(InputError, match=r"0\.0 GB are needed there, 0\.0 GB are free"):
        unpack_folder(pairs, tmp_path / "out")
    monkeypatch.undo()
    write_rgb(pairs / "clean" / "cat.jpg", np.zeros((9, 9, 3), np.float32))
    with pytest.raises(InputError, match=r"several photos would become .*cat\.tif"):
        unpack_folder(pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
