"""Photos as uncompressed TIFF, of which training reads a crop and nothing else: what `r2r unpack` does."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import tifffile

from r2r.data.folders import some
from r2r.data.images import image_files, read_photo
from r2r.data.sizes import known_size
from r2r.errors import InputError
from r2r.files import atomic_path


def unpack_folder(root: Path, out: Path, progress: Callable[[Path], object] | None = None) -> tuple[int, int]:
    """Write every photo below `root` to the same place below `out`, as uncompressed RGB TIFF with the bits of the file;
    returns how many were written, and how many were there already and newer than their photo.

    The pixels are those of the photo, upright; metadata are left out. progress: called with each photo once it is
    there. Raises InputError, before any work, for a folder inside the other, two photos that would get one name, and
    too little room on the disk; and for a photo that cannot be read.
    """
    photos = image_files(root)
    if not photos:
        raise InputError(f"{root}: no photo in it")
    if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
        raise InputError(f"{out} lies in {root}: its photos would be found there too")
    targets = [out / path.relative_to(root).with_suffix(".tif") for path in photos]
    double = [str(path) for path, number in Counter(targets).items() if number > 1]
    if double:
        raise InputError(f"{root}: several photos would become {some(double)}")
    todo = [(path, target) for path, target in zip(photos, targets, strict=True) if not _newer(target, path)]
    _check_room(out, [path for path, _ in todo])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for path, _ in zip((path for path, _ in todo), pool.map(lambda one: _unpack(*one), todo), strict=True):
                if progress is not None:
                    progress(path)
        finally:
            pool.shutdown(cancel_futures=True)
    return len(todo), len(photos) - len(todo)


def _unpack(path: Path, target: Path) -> None:
    pixels = read_photo(path).pixels
    rgb = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    with atomic_path(target) as beside:
        tifffile.imwrite(beside, rgb, photometric="rgb", metadata=None, software=False)


def _newer(target: Path, path: Path) -> bool:
    return target.exists() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns


def _check_room(out: Path, photos: Sequence[Path]) -> None:
    existing = next(one for one in chain([out], out.absolute().parents) if one.exists())
    free = shutil.disk_usage(existing).free
    needed = 0
    for path in photos:
        height, width = known_size(path)
        needed += 3 * height * width  # of 8 bits; files of 16 bits are few
    if needed > free:
        raise InputError(f"{out}: {needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")
