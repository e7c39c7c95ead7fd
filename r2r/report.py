"""`report.json`: what became of each photo, true at every moment of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from r2r.errors import InputError
from r2r.files import atomic_path
from r2r.storage import Address, Location

REPORT = "report.json"

# In object storage the report is written anew at most this often, in seconds, and for at most this part of the time.
_EVERY, _SHARE = 10, 1 / 20

# The report is one JSON object with one file on a line. A line is added by writing over the end, which is short.
_SETTINGS, _INPUTS = '{\n  "settings": ', '  "inputs": '
_END = '\n  ],\n  "complete": {}\n}}\n'


@dataclass(frozen=True)
class FileResult:
    """What became of one file. `size` in bytes and `modified` in ns are those of the input when it was read. `scores`:
    how likely each task is, in [0, 1]. `graphic`: no photo, and left as it is. `error` is None where all went well."""

    input: str
    output: str
    size: int = 0
    modified: int = 0
    tasks: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    tiles: int | None = None
    graphic: bool = False
    seconds: float = 0.0
    error: str | None = None

    @property
    def untouched(self) -> str:
        """What is said of a photo in which nothing was restored."""
        return f"{'a graphic' if self.graphic else 'nothing wrong'}, left as it is"


@dataclass(frozen=True)
class Skipped:
    """An input that was left out, and why."""

    input: str
    reason: str


@dataclass
class RestorationReport:
    """settings: a fingerprint of the model and of everything that decides what the outputs look like. inputs: where the
    files and folders are that were given, in earlier runs too. unchanged: how many of the files an earlier run had
    done. complete: False while files are still to come, and where the run was interrupted."""

    settings: str = ""
    inputs: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    files: list[FileResult] = field(default_factory=list)
    unchanged: int = 0
    complete: bool = False
    _next: float = field(default=0.0, repr=False, compare=False)  # when it may be stored again

    @property
    def failed(self) -> int:
        return sum(result.error is not None for result in self.files)

    @property
    def restored(self) -> int:
        """Files of this run, without those that were done before."""
        return len(self.files) - self.failed - self.unchanged

    def write(self, path: Location) -> None:
        """Atomically, the whole report. Raises InputError."""
        head = f"{_SETTINGS}{json.dumps(self.settings)},\n{_INPUTS}{json.dumps(self.inputs)},\n"
        head += f'  "unchanged": {json.dumps(self.unchanged)}'
        skipped = ",".join(f"\n    {_line(one)}" for one in self.skipped)
        files = ",".join(f"\n    {_line(one)}" for one in self.files)
        text = f'{head},\n  "skipped": [{skipped}\n  ],\n  "files": [{files}'
        text += _END.format(json.dumps(self.complete))
        if isinstance(path, Address):
            start = time.monotonic()
            path.write(text.encode())
            now = time.monotonic()
            self._next = now + max(_EVERY, (now - start) / _SHARE)
            return
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def append(self, result: FileResult, path: Location) -> None:
        """Add one file, to the report at `path` too, which is an incomplete one of `write`; in object storage, where
        nothing can be appended, only now and then. Raises InputError."""
        first = not self.files
        self.files.append(result)
        if isinstance(path, Address):
            if time.monotonic() >= self._next:
                self.write(path)
            return
        end = _END.format("false").encode()
        line = ("" if first else ",") + f"\n    {_line(result)}"
        try:
            with open(path, "r+b") as file:
                file.seek(-len(end), 2)
                file.write(line.encode() + end)  # one call, which a killed process has made or has not
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _line(one: FileResult | Skipped) -> str:
    return json.dumps(asdict(one), allow_nan=False)  # ASCII: names that are not UTF-8 come through too


def read_done(path: Location, settings: str) -> dict[str, FileResult]:
    """Of an earlier report, also of a damaged one: the files that were restored with these settings, by input.
    Raises InputError where object storage cannot be reached."""
    done: dict[str, FileResult] = {}
    known = {one.name for one in fields(FileResult)}
    try:
        lines = _content(path).decode().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if f"{_SETTINGS}{json.dumps(settings)}," != "\n".join(lines[:2]):
        return {}
    for line in lines:
        with suppress(ValueError, TypeError, RecursionError):
            entry: Any = json.loads(line.strip().rstrip(","), parse_constant=_refuse)
            if isinstance(entry, Mapping) and entry.keys() == known and entry["error"] is None:
                done[str(entry["input"])] = FileResult(**{**entry, "tasks": tuple(entry["tasks"])})
    return done


def read_inputs(path: Location) -> list[str]:
    """`inputs` of an earlier report, also of a damaged one; none where there is no report. Raises InputError as
    `read_done`."""
    try:
        lines = _content(path).decode().splitlines()
        line = next(line for line in lines[:3] if line.startswith(_INPUTS))
        found: list[str] = json.loads(line.removeprefix(_INPUTS).rstrip(","))
    except (OSError, ValueError, StopIteration, RecursionError):
        return []
    return found


def is_report(path: Path) -> bool:
    """Whether a report of `RestorationReport.write` is there."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_SETTINGS)) == _SETTINGS.encode()
    except OSError:
        return False


def _content(path: Location) -> bytes:
    if isinstance(path, Address):  # what cannot be reached there is an error, else all would be done again
        return path.read() if path.files() else b""
    return path.read_bytes()


def _refuse(constant: str) -> None:
    raise ValueError(constant)
