"""Pairs on disk, made from clean photos: what `r2r degrade` does."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from r2r.data.degradations import Degradation
from r2r.data.depth import read_depth
from r2r.data.folders import Pair
from r2r.data.images import read_rgb, write_rgb
from r2r.errors import InputError
from r2r.files import atomic_path

SETTINGS = "degrade.json"


def degrade_folder(
    pairs: Sequence[Pair],
    out: str | Path,
    degradation: Degradation,
    seed: int = 0,
    depth_encoding: str = "distance",
    progress: Callable[[Pair], object] | None = None,
) -> int:
    """Write `<out>/{degraded,clean}/NAME.png` for clean photos (`clean_folder`); returns how many pairs were made.

    What happens to a photo depends only on its name and the seed. The settings are kept in `<out>/degrade.json`: called
    again with the same ones after having been stopped, it makes the pairs that are missing. progress: called with
    each pair once that is there.
    Raises InputError, before any work, where `out` holds anything else; and for a photo that cannot be read.
    """
    if seed < 0:
        raise InputError(f"seed {seed}; accepted: 0 or more")
    out = Path(out)
    photos = {pair.name: str(pair.depth) if pair.depth else None for pair in pairs}
    settings = json.dumps(
        {"degradation": str(degradation), "seed": seed, "depth_encoding": depth_encoding, "depth_of_photos": photos},
        indent=2,
    )
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and _read_settings(out) != settings:
        raise InputError(
            f"{out}: exists and was not made with these photos, degradation and seed; accepted: a new or empty folder"
        )
    made = 0
    for pair in pairs:
        clean_path, degraded_path = (out / kind / f"{pair.name}.png" for kind in ("clean", "degraded"))
        if not (clean_path.exists() and degraded_path.exists()):
            clean = read_rgb(pair.clean)
            depth = read_depth(pair.depth, depth_encoding) if pair.depth is not None else None
            if not made:
                with atomic_path(out / SETTINGS) as path:
                    path.write_text(settings, encoding="utf-8")
            rng = np.random.default_rng([seed, zlib.crc32(pair.name.encode())])
            write_rgb(degraded_path, degradation(clean, rng, depth))
            write_rgb(clean_path, clean)
            made += 1
        if progress is not None:
            progress(pair)
    return made


def _read_settings(out: Path) -> str | None:
    try:
        return (out / SETTINGS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
