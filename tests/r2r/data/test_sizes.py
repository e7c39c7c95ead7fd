"""Sizes of images: each header is read once, an index keeps them, a changed file is read again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from r2r.data import sizes
from r2r.data.images import write_rgb
from r2r.data.sizes import known_size, read_index, write_index
from r2r.errors import InputError


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sizes, "_known", {})
    write_rgb(tmp_path / "a.png", np.zeros((20, 30, 3), np.float32))
    return tmp_path / "a.png"


def spoil(photo: Path) -> None:
    """Other content, with nothing that tells from outside: whoever opens the file fails."""
    stat = photo.stat()
    photo.write_bytes(b"x" * stat.st_size)
    os.utime(photo, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_header_is_read_once(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_size(photo) == (20, 30)
    spoil(photo)
    monkeypatch.chdir(tmp_path)
    assert known_size(Path("a.png")) == (20, 30)
    os.utime(photo)
    with pytest.raises(InputError, match="not an image"):
        known_size(photo)
    photo.unlink()
    with pytest.raises(InputError, match="no such file"):
        known_size(photo)


def test_an_index_keeps_sizes(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_size(photo)
    write_index(tmp_path / "sizes.json")
    monkeypatch.setattr(sizes, "_known", {})
    spoil(photo)
    read_index(tmp_path / "sizes.json")
    assert known_size(photo) == (20, 30)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 3}', '{"a": ["x", 1, 2, 3]}', "\\xff"])
def test_a_damaged_index_holds_nothing(photo: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "sizes.json").write_text(content)
    read_index(tmp_path / "sizes.json")
    read_index(tmp_path / "missing.json")
    assert known_size(photo) == (20, 30)
