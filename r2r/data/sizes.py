"""Heights and widths of image files, read from their headers once: for the life of a process, and longer in an index.

An index is a JSON file: of each path how many bytes the file has, when it was changed, its height and width. A file
that has changed since is read again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from r2r.data.images import image_size
from r2r.files import atomic_path

_known: dict[str, list[int]] = {}


def known_size(path: Path) -> tuple[int, int]:
    """`image_size`, without opening a file that was read before."""
    name = os.path.abspath(path)
    try:
        stat = path.stat()
    except OSError:
        return image_size(path)  # which says what is wrong
    state = [stat.st_size, stat.st_mtime_ns]
    entry = _known.get(name)
    if entry is None or entry[:2] != state:
        entry = _known[name] = [*state, *image_size(path)]
    return entry[2], entry[3]


def read_index(path: Path) -> None:
    """Know what the index at `path` holds; one that is missing or damaged holds nothing."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        _known.update(
            {str(name): [int(number) for number in entry] for name, entry in entries.items() if len(entry) == 4}
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return


def write_index(path: Path) -> None:
    """Keep what is known. Raises InputError where the file cannot be written."""
    with atomic_path(path) as beside:
        beside.write_text(json.dumps(_known), encoding="utf-8")
