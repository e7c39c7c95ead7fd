"""Sources of training and test images as configuration files and the command line name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2r.data.dataset import Source
from r2r.data.degradations import TASK_DEGRADATIONS, parse_degradation
from r2r.data.folders import clean_folder, paired_folder
from r2r.data.layouts import LAYOUTS
from r2r.errors import InputError

KEYS = ("name", "task", "pairs", "clean", "layout", "root", "names", "class", "degradation", "sigma", "depth",
        "depth_encoding", "repeat", "optional", "share", "reduce", "first")  # fmt: skip


PATHS = ("pairs", "clean", "root", "names", "depth")
"""Those of the keys that hold paths."""


def build_source(entry: Mapping[str, Any], tasks: Sequence[str]) -> Source:
    """A source from its keys.

    task: one name, several for a mixture, or `[]` for photos with nothing wrong; optional: tasks that may be found as
    well. The photos are one of: pairs, a folder `{degraded,clean}/NAME.*`; clean, a
    folder of clean photos, degraded as `degradation` (a spec) or `sigma` (a level or several) says, else as the task
    suggests; layout, a published one, with its root (and `names`, a list file, or `class`, one of CDD-11's). depth: a
    folder of depth maps for clean photos, in `depth_encoding`. repeat: how often an epoch shows each image; share: how
    often training draws from this source, relative to others. reduce: a factor, or a range `low..high`, by which photos
    are reduced first. first: how many photos are used, from the first on; all by default.
    Raises InputError that names the key.
    """
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r} in a data source; accepted: {', '.join(KEYS)}")
    given = [key for key in ("pairs", "clean", "layout") if entry.get(key)]
    if len(given) != 1:
        raise InputError(f"a data source needs one of pairs, clean and layout, got {' and '.join(given) or 'none'}")
    names, optional = named(entry, "task"), named(entry, "optional")
    for name in (*names, *optional):
        if name not in tasks:
            raise InputError(f"unknown task {name!r} in a data source; the run's tasks are {', '.join(tasks)}")
    if entry.get("task") is None:
        raise InputError(
            f"a data source needs a task; the run's tasks are {', '.join(tasks)}, [] where nothing is wrong"
        )

    degradation = None
    if given == ["pairs"]:
        pairs = [pair for folder in named(entry, "pairs") for pair in paired_folder(folder)]
    elif given == ["layout"]:
        pairs = _layout(entry)
    else:
        folders = named(entry, "clean")
        if entry.get("depth") and len(folders) > 1:
            raise InputError("depth goes with one folder of clean photos")
        pairs = [pair for folder in folders for pair in clean_folder(folder, entry.get("depth"))]
    if all(pair.degraded is None for pair in pairs):
        degradation = parse_degradation(_spec(entry, names))
    elif entry.get("degradation") or entry.get("sigma"):
        raise InputError("degradation and sigma go with clean photos; these are degraded already")
    return Source(
        name=str(entry.get("name") or "+".join(names) or "clean"),
        labels=tuple(tasks.index(name) for name in names),
        pairs=tuple(pairs[: _count(entry, "first")]),
        degradation=degradation,
        repeat=int(entry.get("repeat", 1)),
        depth_encoding=str(entry.get("depth_encoding", "distance")),
        optional=tuple(tasks.index(name) for name in optional),
        share=_number(entry, "share"),
        reduce=_span(entry, "reduce"),
    )


def anchor(entry: Any, folder: Path) -> None:
    """Make the relative folders of a data source, or an evaluation set, start at `folder`."""
    for key in PATHS:
        given = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(given, str):
            entry[key] = str(folder / Path(given).expanduser())
        elif isinstance(given, list):
            entry[key] = [str(folder / Path(one).expanduser()) for one in given]


def named(entry: Mapping[str, Any], key: str) -> list[str]:
    """The names or paths under a key that takes one or several."""
    names = entry.get(key)
    return [str(names)] if isinstance(names, str | Path) else list(names or ())


def _count(entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is None or (isinstance(value, int) and value > 0 and value is not True):
        return value
    raise InputError(f"{key} is {value!r} in a data source; accepted: 1 or more")


def _number(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise InputError(f"{key} is {value!r} in a data source; accepted: a number")


def _span(entry: Mapping[str, Any], key: str) -> tuple[float, float]:
    text = str(entry.get(key, 1))
    low, _, high = text.partition("..")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise InputError(f"{key} is {text!r} in a data source; accepted: a number or low..high") from None


def _spec(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    sigma = entry.get("sigma")
    if sigma is not None and entry.get("degradation"):
        raise InputError("a data source takes sigma or degradation, not both")
    if sigma is not None:
        return f"noise:sigma={'/'.join(map(str, sigma if isinstance(sigma, list | tuple) else [sigma]))}"
    if entry.get("degradation"):
        return str(entry["degradation"])
    if not names:
        return "jpeg:quality=100,chance=0"  # nothing is wrong with them
    unknown = [name for name in names if name not in TASK_DEGRADATIONS]
    if unknown:
        raise InputError(f"how to degrade clean photos for the task {unknown[0]!r} is not known; name a degradation")
    return "+".join(TASK_DEGRADATIONS[name] for name in names)


def _layout(entry: Mapping[str, Any]) -> list[Any]:
    layout = entry["layout"]
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; accepted: {', '.join(LAYOUTS)}")
    if not entry.get("root"):
        raise InputError(f"layout {layout} needs its root folder")
    extra = [Path(entry["names"])] if entry.get("names") else [entry["class"]] if entry.get("class") else []
    try:
        return LAYOUTS[layout](entry["root"], *extra)
    except TypeError as error:
        raise InputError(f"layout {layout}: names and class do not fit it ({error})") from error
