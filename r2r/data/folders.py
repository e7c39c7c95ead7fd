"""Folders of pairs, `<root>/{degraded,clean}/NAME.*`, and of clean photos, `<root>/clean/NAME.*` or `<root>/NAME.*`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from r2r.data.images import image_files
from r2r.data.sizes import known_size
from r2r.errors import InputError


@dataclass(frozen=True)
class Pair:
    """A clean photo with its degraded version; without one, that is synthesised when the photo is drawn."""

    name: str
    clean: Path
    degraded: Path | None = None
    depth: Path | None = None


def paired_folder(root: str | Path) -> list[Pair]:
    """The pairs of `<root>/{degraded,clean}/NAME.*`, matched by path without suffix, sorted by name.

    Raises InputError where a folder is missing or empty, names have no partner or two files one name, and where the
    two photos of a pair differ in size. Photos whose header cannot be read are left to whoever reads them.
    """
    root = Path(root)
    for folder in (root / "degraded", root / "clean"):
        if not folder.is_dir():
            raise InputError(f"{root}: no folder {folder.name}; accepted: pairs in {root}/degraded and {root}/clean")
    degraded, clean = by_name(root / "degraded"), by_name(root / "clean")
    for having, lacking, files, others in (
        ("degraded", "clean", degraded, clean),
        ("clean", "degraded", clean, degraded),
    ):
        alone = [name for name in files if name not in others]
        if alone:
            raise InputError(f"{root}: {some(alone)} in {having} without a partner in {lacking}")
    pairs = [Pair(name, clean[name], degraded[name]) for name in clean]
    check_sizes(pairs)
    return pairs


def clean_folder(root: str | Path, depth: str | Path | None = None) -> list[Pair]:
    """The photos of `<root>/clean/NAME.*`, or of `<root>/NAME.*` where there is no folder `clean`, sorted by name.

    depth: a folder with a depth map `NAME.*` for every photo. Raises InputError where a folder is missing or empty, two
    photos have one name, or a depth map is missing or of another size.
    """
    root = Path(root)
    photos = by_name(root / "clean" if (root / "clean").is_dir() else root)
    if depth is None:
        return [Pair(name, path) for name, path in photos.items()]
    depths = by_name(Path(depth))
    missing = [name for name in photos if name not in depths]
    if missing:
        raise InputError(f"{depth}: no depth map for {some(missing)}")
    pairs = [Pair(name, path, depth=depths[name]) for name, path in photos.items()]
    check_sizes(pairs)
    return pairs


def check_sizes(pairs: Sequence[Pair]) -> None:
    """Raises InputError where a degraded photo or a depth map differs in size from the clean photo.

    Reads only headers; what has none that can be read is passed over.
    """

    def size(path: Path) -> tuple[int, int] | None:
        try:
            return known_size(path)
        except InputError:
            return None

    different = []
    for pair in pairs:
        for path in filter(None, (pair.degraded, pair.depth)):
            given, clean = size(path), size(pair.clean)
            if given and clean and given != clean:
                different.append(f"{path} ({given[1]} x {given[0]}, not {clean[1]} x {clean[0]})")
    if different:
        raise InputError(f"size differs from that of the clean photo: {some(different)}")


def by_name(folder: Path) -> dict[str, Path]:
    """The image files of `folder` by path without suffix. Raises InputError for no folder, no image, a name twice."""
    files: dict[str, Path] = {}
    beginning = len((folder / "x").as_posix()) - 1
    for path in image_files(folder):
        name = os.path.splitext(path.as_posix())[0][beginning:]
        if name in files:
            raise InputError(f"{folder}: two files named {name}: {files[name].name} and {path.name}")
        files[name] = path
    if not files:
        raise InputError(f"{folder}: no image in it; accepted: PNG, JPEG, BMP, TIFF, WebP, PPM")
    return files


def some(names: Iterable[str]) -> str:
    """The first few of `names` and how many more there are, for an error of one line."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
