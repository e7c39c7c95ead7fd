"""Which files a run restores, and where each of them goes."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r2r.data.images import ACCEPTED, EXTRA_SUFFIXES, FORMATS, RAW_SUFFIXES, SUFFIXES
from r2r.errors import InputError
from r2r.report import REPORT, Skipped, read_report
from r2r.storage import Address, Location, location

# Images that a person would expect to be restored: they are named where they are left out.
_UNREAD = (".gif", ".apng", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".xcf", ".tga", ".exr", ".hdr", ".svg",
           ".ico", ".heics", ".avifs", ".mpo", ".crw", ".mrw", ".x3f", ".3fr", ".iiq")  # fmt: skip
_READ = (*SUFFIXES, *EXTRA_SUFFIXES)
_OWN = "the results go there; give another folder for them"


@dataclass
class Plan:
    """Pairs of input and output file, and what is left out."""

    files: list[tuple[Location, Location]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def plan_outputs(inputs: Sequence[str | Location], out: str | Location, file_format: str | None = None) -> Plan:
    """Where each image file goes: a file to `out/NAME`, a folder's files to the same subfolders of `out`. Inputs and
    `out` are paths or addresses in object storage, see `r2r.storage`. A file that is named twice is taken once.

    file_format: a key of `r2r.data.images.FORMATS`, whose suffix the outputs get; raw files become TIFF otherwise.
    Where two outputs would have one name because of the format, they keep their old suffix too (`a.jpg.png`); where
    they come from several inputs, all keep their path below the folder that is common to the inputs. What lies in `out`
    is no input, even where `out` is inside an input folder. Hidden files and folders are left out. So are the results
    of earlier runs, unless their folder is the only input.

    Raises InputError where an input is missing, none is an image or holds one, `out` is a file, or an output would
    replace an input.
    """
    out = location(out)
    if not inputs:
        raise InputError(f"no input; accepted: image files ({', '.join(SUFFIXES)}) and folders of them")
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; results go to a folder")
    plan = Plan()
    found: dict[str, tuple[Location, Path]] = {}  # file, path below its input
    for path in map(location, inputs):
        files_in = (
            _stored_files(path, out, plan.skipped)
            if isinstance(path, Address)
            else _files(path, out, plan.skipped, alone=len(inputs) == 1)
        )
        for source, below in files_in:
            found.setdefault(real_name(source), (source, below))
    if not found:
        raise InputError(f"{plan.skipped[0].input}: {plan.skipped[0].reason}")
    plan.skipped = list(dict.fromkeys(one for one in plan.skipped if one.reason != _OWN))
    files = list(found.values())
    names = [_renamed(below, file_format, keep=False) for _, below in files]
    taken = Counter(map(os.path.normcase, names))
    if max(taken.values()) > 1:
        names = [
            _renamed(below, file_format, keep=taken[os.path.normcase(name)] > 1)
            for name, (_, below) in zip(names, files, strict=True)
        ]
    if len(set(map(os.path.normcase, names))) < len(names):
        names = [_renamed(below, file_format, keep=True) for below in _below_common_folder(files)]
    plan.files = [(source, out / name) for (source, _), name in zip(files, names, strict=True)]
    made: dict[str, Location] = {}
    for name, (source, _) in zip(names, files, strict=True):
        other = made.setdefault(os.path.normcase(name), source)
        if other is not source:
            raise InputError(f"{other} and {source} would both become {out / name}; restore them separately")
    sources = {_real(source): source for source, _ in files}
    for _, target in plan.files:
        if _real(target) in sources:
            raise InputError(f"{sources[_real(target)]} would be replaced by an output; give another folder than {out}")
    return plan


def _renamed(below: Path, file_format: str | None, keep: bool) -> Path:
    """The name of the output. keep: the suffix of the input stays, before another one."""
    if file_format is None and below.suffix.lower() in RAW_SUFFIXES:
        file_format = "TIFF"
    if file_format is None or below.suffix.lower() in FORMATS[file_format].suffixes:
        return below
    suffix = FORMATS[file_format].suffixes[0]
    return below.with_name(below.name + suffix) if keep else below.with_suffix(suffix)


def _real(file: Location) -> str:
    return str(file) if isinstance(file, Address) else os.path.realpath(file)


def real_name(file: Location) -> str:
    """The same however the file is named; a link and what it leads to have two."""
    return str(file) if isinstance(file, Address) else os.path.join(os.path.realpath(file.parent), file.name)


def _within(file: str, place: str) -> bool:
    """Whether it is the place or lies in it; both real."""
    return Path(place) in (Path(file), *Path(file).parents)


def _below_common_folder(files: Sequence[tuple[Location, Path]]) -> list[Path]:
    sources = [real_name(source) for source, _ in files]
    try:
        common = os.path.commonpath([os.path.dirname(source) for source in sources])
    except ValueError as error:  # several drives, or object storage beside paths
        raise InputError("inputs on several drives have the same names; restore them separately") from error
    return [Path(os.path.relpath(source, common)) for source in sources]


def _files(path: Path, out: Location, skipped: list[Skipped], alone: bool) -> Iterator[tuple[Path, Path]]:
    """The image files of one input, each with its path below it; what is left out is added to `skipped`. alone: there
    is no other input, so that a folder of earlier results was meant."""
    if path.is_dir():
        before = len(skipped)
        inside = sorted(_walk(path, out, skipped, alone))
        if not inside:
            skipped[before:] = [_empty(path, out, skipped[before:])]
        yield from ((source, source.relative_to(path)) for source in inside)
    elif not os.path.lexists(path):
        raise InputError(f"{path}: no such file or folder")
    elif reason := unreadable(path) or _unread(path.suffix):
        skipped.append(Skipped(str(path), reason))
    else:
        yield path, Path(path.name)


def _unread(suffix: str) -> str | None:
    """Why files with this suffix are left out."""
    suffix = suffix.lower()
    if suffix in _READ:
        return None
    return f"{suffix} is not read; {ACCEPTED}" if suffix in _UNREAD else f"not an image; {ACCEPTED}"


def _stored_files(folder: Address, out: Location, skipped: list[Skipped]) -> Iterator[tuple[Address, Path]]:
    """As `_files`, in object storage."""
    listed = folder.files()
    if not listed:
        raise InputError(f"{folder}: no such file or folder")
    if listed == [folder]:
        if reason := _unread(folder.suffix):
            skipped.append(Skipped(str(folder), reason))
        else:
            yield folder, Path(folder.name)
        return
    before, some = len(skipped), False
    for file in listed:
        below, suffix = file.below(folder), file.suffix.lower()
        own = isinstance(out, Address) and file.below(out) is not None
        if below is None or own or any(part.startswith(".") for part in below.parts):
            continue
        if suffix in _UNREAD:
            skipped.append(Skipped(str(file), f"{suffix} is not read; {ACCEPTED}"))
        elif suffix in _READ:
            some = True
            yield file, below
    if not some:
        skipped[before:] = [_empty(folder, out, skipped[before:])]


def _empty(folder: Location, out: Location, inside: Sequence[Skipped]) -> Skipped:
    """What is said of a folder without images. inside: what was left out in it."""
    own = next((one for one in inside if one.input == str(folder)), None)  # it cannot be read
    if own is not None:
        return own
    if isinstance(folder, Path) and isinstance(out, Path) and _within(_real(folder), _real(out)):
        return Skipped(str(folder), _OWN)
    more = "".join(f"; {one.input}: {one.reason}" for one in inside[:1])
    return Skipped(str(folder), f"no image in it; {ACCEPTED}{more}")


def _walk(folder: Path, out: Location, skipped: list[Skipped], alone: bool) -> Iterator[Path]:
    def note(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot be read: {error.strerror}"))

    real_out = _real(out)
    results: set[Path] = set()
    for where, folders, names in os.walk(folder, onerror=note):
        for name in sorted(folders):
            path = Path(where, name)
            if name.startswith(".") or os.path.realpath(path) == real_out:
                folders.remove(name)
            elif path.is_symlink():  # os.walk does not follow it
                skipped.append(Skipped(str(path), "a link to a folder, which is not followed"))
        if os.path.realpath(where) == real_out:
            folders.clear()
            continue
        if REPORT in names and not (alone and Path(where) == folder):
            results.update(Path(where, name) for name in read_report(Path(where, REPORT))[0])
            if any(Path(where) in path.parents for path in results):
                skipped.append(Skipped(where, f"the results of an earlier run in it ({REPORT})"))
        for name in sorted(names):
            path = Path(where, name)
            if path in results:
                continue
            suffix = path.suffix.lower()
            if name.startswith(".") or suffix not in (*_READ, *_UNREAD):
                continue
            if suffix in _UNREAD:
                skipped.append(Skipped(str(path), f"{suffix} is not read; {ACCEPTED}"))
            elif reason := unreadable(path):
                skipped.append(Skipped(str(path), reason))
            elif Path(real_out) not in Path(os.path.realpath(path)).parents:
                yield path


def unreadable(path: Path) -> str | None:
    """Why this is no file to be opened: opening a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None if stat.S_ISREG(mode) else "a pipe, socket or device, which is not opened"
