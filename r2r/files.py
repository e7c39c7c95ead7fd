"""Files that are whole or not there."""

from __future__ import annotations

import csv
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from r2r.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    The folder is made if need be; the temporary name is hidden and keeps the suffix, which is what image writers go by.
    A file that was at `path` stays as it was until the new one is complete and on the disk.

    Raises InputError, in one line that names `path`, for what the file system refuses: a full disk, no permission, a
    folder in the way. Every other exception passes unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # renamed already, or never made
            temporary.unlink()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other one of that folder runs, in this process or another; the folder is made if need be.
    Raises InputError where one runs. Windows, and file systems without locks, let all of them run."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # also a killed process lets go of it
            except BlockingIOError:
                raise InputError(
                    f"{folder}: another run writes there; wait for its end, or give another folder"
                ) from None
        yield
    finally:
        os.close(handle)


def check_writable(path: str | Path) -> None:
    """Raises InputError as `atomic_path` does, before work that `path` is to take the result of."""

    class Enough(Exception):
        pass

    with suppress(Enough), atomic_path(path) as beside:
        beside.touch()
        raise Enough


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that share their keys, under a line of these, atomically. Raises InputError."""
    with atomic_path(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def remove_temporaries(folder: str | Path) -> None:
    """Remove what processes left in `folder` that were killed inside `atomic_path` or while they saved a model; nobody
    may be writing there."""
    for path in Path(folder).glob(".*"):
        if re.fullmatch(r"\.saving-\w+", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.[0-9a-f]{16}(\.\w+)?", path.name):
            with suppress(OSError):
                path.unlink()


def umask() -> int:
    """The permissions that new files of this process lack."""
    current = os.umask(0o077)
    os.umask(current)
    return current
