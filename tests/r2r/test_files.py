"""Atomic writing: whole or not there."""

from __future__ import annotations

import resource
import stat
from pathlib import Path

import pytest

from r2r.errors import InputError
from r2r.files import atomic_path


def test_the_file_appears_whole_with_its_folder_and_usual_permissions(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("whole")
        assert not target.exists()
    plain = tmp_path / "plain"
    plain.touch()
    assert target.read_text() == "whole"
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert list(target.parent.iterdir()) == [target]


def write(target: Path, data: bytes, error: type[BaseException] | None = None) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)
        if error:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error):
        write(target, b"half of the n", error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_that_the_disk_refuses_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a larger write fails as on a full disk
    try:
        with pytest.raises(InputError, match=r"^cannot write .*a\.bin: File too large$"):
            write(target, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_or_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder: Is a directory"), atomic_path(tmp_path / "folder"):
        pytest.fail("work began that would have been lost")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file/a\.txt"):
        write(tmp_path / "file" / "a.txt", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
