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
from r2r.report import Skipped
from r2r.storage import Address, Location, location

# Images that a person would expect to be restored: they are named where they are left out.
_UNREAD = (".gif", ".apng", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".xcf", ".tga", ".exr", ".hdr", ".svg",
           ".ico", ".heics", ".avifs", ".mpo", ".crw", ".mrw", ".x3f", ".3fr", ".iiq")  # fmt: skip
_READ = (*SUFFIXES, *EXTRA_SUFFIXES)


@dataclass
class Plan:
    """Pairs of input and output file, and what is left out."""

    files: list[tuple[Location, Location]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def plan_outputs(inputs: Sequence[str | Location], out: str | Location, file_format: str | None = None) -> Plan:
    """Where each image file goes: a file to `out/NAME`, a folder's files to the same subfolders of `out`. Inputs and
    `out` are paths or addresses in object storage, see `r2r.storage`.

    file_format: a key of `r2r.data.images.FORMATS`, whose suffix the outputs get; raw files become TIFF otherwise.
    Where two outputs would have one name because of the format, they keep their old suffix too (`a.jpg.png`); where
    they come from several inputs, all keep their path below the folder that is common to the inputs. What lies in `out`
    is no input, even where `out` is inside an input folder. Hidden files and folders are left out.

    Raises InputError where an input is missing or no image, a folder holds none, or an output would replace an input.
    """
    out = location(out)
    if not inputs:
        raise InputError(f"no input; accepted: image files ({', '.join(SUFFIXES)}) and folders of them")
    plan = Plan()
    found: dict[str, tuple[Location, Path]] = {}  # by real path: file, path below its input
    for path in map(location, inputs):
        files_in = (
            _stored_files(path, out, plan.skipped) if isinstance(path, Address) else _files(path, out, plan.skipped)
        )
        for source, below in files_in:
            found.setdefault(_real(source), (source, below))
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
    for _, target in plan.files:
        if _real(target) in found:
            source, _ = found[_real(target)]
            raise InputError(f"{source} would be replaced by an output; give another folder than {out}")
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


def _below_common_folder(files: Sequence[tuple[Location, Path]]) -> list[Path]:
    sources = [str(source) if isinstance(source, Address) else os.path.abspath(source) for source, _ in files]
    try:
        common = os.path.commonpath([os.path.dirname(source) for source in sources])
    except ValueError as error:  # several drives, or object storage beside paths
        raise InputError("inputs on several drives have the same names; restore them separately") from error
    return [Path(os.path.relpath(source, common)) for source in sources]


def _files(path: Path, out: Location, skipped: list[Skipped]) -> Iterator[tuple[Path, Path]]:
    """The image files of one input, each with its path below it; what is left out is added to `skipped`."""
    if path.is_dir():
        before = len(skipped)
        inside = sorted(_walk(path, out, skipped))
        if not inside:
            raise _empty(path, skipped[before:])
        yield from ((source, source.relative_to(path)) for source in inside)
    elif not os.path.lexists(path):
        raise InputError(f"{path}: no such file or folder")
    elif reason := unreadable(path):
        raise InputError(f"{path}: {reason}")
    elif path.suffix.lower() not in _READ:
        raise InputError(f"{path}: not an image; {ACCEPTED}")
    else:
        yield path, Path(path.name)


def _stored_files(folder: Address, out: Location, skipped: list[Skipped]) -> Iterator[tuple[Address, Path]]:
    """As `_files`, in object storage."""
    listed = folder.files()
    if not listed:
        raise InputError(f"{folder}: no such file or folder")
    if listed == [folder]:
        if folder.suffix.lower() not in _READ:
            raise InputError(f"{folder}: not an image; {ACCEPTED}")
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
        raise _empty(folder, skipped[before:])


def _empty(folder: Location, skipped: Sequence[Skipped]) -> InputError:
    more = "".join(f"; {one.input}: {one.reason}" for one in skipped[:1])
    return InputError(f"{folder}: no image in it; {ACCEPTED}{more}")


def _walk(folder: Path, out: Location, skipped: list[Skipped]) -> Iterator[Path]:
    def note(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot be read: {error.strerror}"))

    real_out = _real(out)
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
        for name in sorted(names):
            path = Path(where, name)
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
