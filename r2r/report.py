"""`report.json`: what became of each photo, true at every moment of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from r2r.errors import InputError
from r2r.files import atomic_path
from r2r.storage import Address, Location

REPORT = "report.json"

# In object storage the report is written anew at most this often, in seconds, and for at most this part of the time.
_EVERY, _SHARE = 10, 1 / 20

# The report is one JSON object with one file on a line. A line is added by writing over the end, which is short.
_HEAD = '{\n  "settings": '
_END = '\n  ],\n  "complete": {}\n}}\n'


@dataclass(frozen=True)
class Origin:
    """Of which photo an output is made. `source`: its real path or address; `name`: where the output is, below the
    folder of the report. However inputs and outputs are named, these stay the same."""

    source: str
    name: str


@dataclass(frozen=True)
class FileResult:
    """What became of one file. `size` in bytes and `modified` in ns are those of the input when it was read. `scores`:
    how likely each task is, in [0, 1]. `graphic`: no photo, and left as it is. `error` is None where all went well.
    `origin` and `settings` are those of `Origin` and of the report."""

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
    origin: Origin | None = None
    settings: str = ""

    @property
    def untouched(self) -> str:
        """What is said of a photo in which nothing was restored."""
        return f"{'a graphic' if self.graphic else 'nothing wrong'}, left as it is"


@dataclass(frozen=True)
class Skipped:
    """An input that was left out, and why."""

    input: str
    reason: str


_ORIGIN, _RESULT = ({one.name for one in fields(kind)} for kind in (Origin, FileResult))


@dataclass
class RestorationReport:
    """settings: a fingerprint of the model and of everything that decides what the outputs look like. earlier: results
    of other runs into the folder. pending: what this run was to make, and may have made before it could record it.
    unchanged: how many of `files` an earlier run had done. complete: False while files are still to come, and where the
    run was interrupted."""

    settings: str = ""
    skipped: list[Skipped] = field(default_factory=list)
    earlier: list[FileResult] = field(default_factory=list)
    pending: list[Origin] = field(default_factory=list)
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
        text = f'{_HEAD}{json.dumps(self.settings)},\n  "unchanged": {self.unchanged}'
        lists: dict[str, Sequence[Any]] = {
            "skipped": self.skipped,
            "earlier": self.earlier,
            "pending": self.pending,
            "files": self.files,
        }
        for name, entries in lists.items():
            text += f',\n  "{name}": [' + ",".join(f"\n    {_line(one)}" for one in entries) + "\n  ]"
        text = text.removesuffix("\n  ]")
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


def _line(one: FileResult | Skipped | Origin) -> str:
    return json.dumps(asdict(one), allow_nan=False)  # ASCII: names that are not UTF-8 come through too


def read_report(path: Location) -> tuple[dict[str, FileResult], set[Origin]]:
    """Of an earlier report, also of a damaged one: what was restored, by the name of the output, and what was pending.
    Raises InputError where object storage cannot be reached."""
    done: dict[str, FileResult] = {}
    pending: set[Origin] = set()
    try:
        lines = _content(path).decode().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}, set()
    for line in lines:
        with suppress(ValueError, TypeError, RecursionError):
            entry: Any = json.loads(line.strip().rstrip(","), parse_constant=_refuse)
            if not isinstance(entry, Mapping):
                continue
            if entry.keys() == _ORIGIN:
                pending.add(_origin(entry))
            elif entry.keys() == _RESULT and entry["error"] is None:
                origin = _origin(entry["origin"])
                done[origin.name] = FileResult(**{**entry, "tasks": tuple(entry["tasks"]), "origin": origin})
    return done, pending


def _origin(entry: Mapping[str, Any]) -> Origin:
    if not all(isinstance(value, str) for value in entry.values()):
        raise TypeError("a source and a name are text")
    return Origin(**entry)


def _content(path: Location) -> bytes:
    if isinstance(path, Address):  # what cannot be reached there is an error, else all would be done again
        return path.read() if path.files() else b""
    return path.read_bytes()


def _refuse(constant: str) -> None:
    raise ValueError(constant)
