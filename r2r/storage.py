"""Files in object storage, by addresses such as `s3://bucket/photos/a.jpg`.

pyarrow reads and writes them. Ray Data needs it anyway, and it speaks S3, Google Cloud Storage, Azure and HDFS by
itself; fsspec would need a package for each. Credentials, region and endpoint come from where these services' own
tools take them: environment variables and files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

from r2r.errors import InputError

_SEPARATOR = "://"
_SCHEME = re.compile(rf"[a-z][a-z0-9+.-]+{_SEPARATOR}", re.IGNORECASE)


class Stat(NamedTuple):
    """Size in bytes and last change in ns, under the names that `os.stat` gives them."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class Address:
    """A file or folder in object storage. What it does raises InputError, in one line that names it."""

    text: str
    listed: Stat | None = field(default=None, compare=False)  # where a listing has told

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, below: str | PurePath) -> Address:
        return Address(f"{self.text}/{PurePath(below).as_posix()}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.text).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.text).suffix

    @property
    def parent(self) -> Address:
        return Address(self.text.rpartition("/")[0])

    def below(self, folder: Address) -> Path | None:
        """The path below `folder`, None where it is elsewhere."""
        start = f"{folder.text}/"
        return Path(self.text.removeprefix(start)) if self.text.startswith(start) else None

    def stat(self) -> Stat:
        """Of a file."""
        if self.listed is not None:
            return self.listed
        system, path = self._place()
        with _told(f"cannot read {self}"):
            return _stat(system.get_file_info(path))

    def files(self) -> list[Address]:
        """The files below this folder and its subfolders, sorted; a file is the only one. Empty where nothing is."""
        import pyarrow.fs as fs

        system, path = self._place()
        with _told(f"cannot read {self}"):
            own = system.get_file_info(path)
            if own.type == fs.FileType.File:
                return [Address(self.text, _stat(own))]
            found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
        inside = [one for one in found if one.type == fs.FileType.File]
        return sorted((Address(self.text + one.path[len(path) :], _stat(one)) for one in inside), key=str)

    def read(self) -> bytes:
        system, path = self._place()
        with _told(f"cannot read {self}"), system.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content

    def write(self, content: bytes) -> None:
        """The file appears when all of it has arrived; until then what was there stays."""
        system, path = self._place()
        with _told(f"cannot write {self}"), system.open_output_stream(path) as stream:
            stream.write(content)

    def _place(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        scheme, _, rest = self.text.partition(_SEPARATOR)
        authority, _, key = rest.partition("/")
        system, root = _file_system(f"{scheme}{_SEPARATOR}{authority}")
        return system, f"{root.rstrip('/')}/{key}".rstrip("/")


Location = Path | Address


def location(name: str | Path | Address) -> Location:
    """An address where there is a scheme and `://`, else a path of the file system; one letter is a drive."""
    if isinstance(name, Address):
        return name
    return Address(str(name).rstrip("/")) if _SCHEME.match(str(name)) else Path(name)


@lru_cache
def _file_system(root: str) -> tuple[Any, str]:
    """pyarrow's, and the root in it. The key is no part of the address here: it may hold what a URI may not."""
    import pyarrow.fs as fs

    with _told(f"cannot read {root}"):
        system, path = fs.FileSystem.from_uri(root)
    return system, path


def _stat(info: Any) -> Stat:
    if info.size is None:
        raise FileNotFoundError("no such file")
    return Stat(info.size, info.mtime_ns or 0)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what pyarrow raises into an InputError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{what}: no such file") from error
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are among them
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        line = line.partition(": AWS Error ")[2] or line  # before it stands what was being done
        raise InputError(f"{what}: {line.partition(' (Request ID')[0]}") from error
