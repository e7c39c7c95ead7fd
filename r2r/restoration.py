"""Restoring folders of photos, with a report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from r2r.data.images import SUFFIXES, image_files, read_photo, write_photo
from r2r.device import device_of
from r2r.errors import InputError
from r2r.files import atomic_path
from r2r.model import R2R, Task
from r2r.tiling import restore_photo, tile_side

REPORT = "report.json"


@dataclass(frozen=True)
class FileResult:
    """What became of one file. A score is None for a task that has no slots; `error` is None where all went well."""

    input: str
    output: str
    tasks: tuple[str, ...] = ()
    scores: dict[str, float | None] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    tiles: int | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass
class RestorationReport:
    """What `report.json` says. `complete` is False while files are still to come, and where the run was interrupted."""

    files: list[FileResult] = field(default_factory=list)
    complete: bool = False

    @property
    def failed(self) -> int:
        return sum(result.error is not None for result in self.files)

    def write(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def restore_files(
    model: R2R,
    inputs: Sequence[str | Path],
    out: str | Path,
    task: Task = None,
    memory: int | None = None,
    progress: Callable[[FileResult, int], object] | None = None,
) -> RestorationReport:
    """Restore image files, and folders of them, into `out`, with `out/report.json`; model in eval mode, on any device.

    A file goes to `out/NAME`, a folder's files to the same subfolders of `out`; formats, bit depth, alpha, EXIF and ICC
    profile stay (`r2r.data.images.write_photo`), earlier outputs are replaced. task, memory: see `restore_photo`.
    progress: called after each file with its result and how many files there are. A file that cannot be read,
    restored or written is reported and does not stop the rest; an interrupted run leaves a report of what it did.

    Raises InputError before any work where an input is missing or no image, two outputs would be one file or would
    replace an input, the task is unknown, the bank is empty, or the memory too little.
    """
    out = Path(out)
    plan = plan_outputs(inputs, out)
    tile_side(model, memory)  # raises for too little memory
    model.restore(torch.zeros(1, 3, 1, 1, device=device_of(model)), task)  # raises for a bad task, an empty bank
    report = RestorationReport()
    report.write(out / REPORT)  # an older one would not be true any more
    try:
        for source, target in plan:
            report.files.append(_restore_file(model, source, target, task, memory))
            if progress is not None:
                progress(report.files[-1], len(plan))
        report.complete = True
    finally:
        report.write(out / REPORT)
    return report


def plan_outputs(inputs: Sequence[str | Path], out: str | Path) -> list[tuple[Path, Path]]:
    """Pairs of input and output file. What lies in `out` is no input, even where `out` is inside an input folder.

    Raises InputError where an input is missing or no image, a folder holds none, two outputs would be one file, or an
    output would replace an input.
    """
    out = Path(out)
    if not inputs:
        raise InputError(f"no input; accepted: image files ({', '.join(SUFFIXES)}) and folders of them")
    targets: dict[Path, Path] = {}
    for path in map(Path, inputs):
        for source, target in _outputs(path, out):
            other = targets.setdefault(target, source)
            if other.resolve() != source.resolve():
                raise InputError(f"{other} and {source} would both be written to {target}; restore them separately")
    sources = {source.resolve(): source for source in targets.values()}
    for target in targets:
        if target.resolve() in sources:
            raise InputError(
                f"{sources[target.resolve()]} would be replaced by an output; give another folder than {out}"
            )
    return [(source, target) for target, source in targets.items()]


def _outputs(path: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    if path.is_dir():
        inside = [source for source in image_files(path) if out.resolve() not in source.resolve().parents]
        if not inside:
            raise InputError(f"{path}: no image in it; accepted: {', '.join(SUFFIXES)}")
        for source in inside:
            yield source, out / source.relative_to(path)
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder")
    elif path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: not an image; accepted: {', '.join(SUFFIXES)}")
    else:
        yield path, out / path.name


def _restore_file(model: R2R, source: Path, target: Path, task: Task, memory: int | None) -> FileResult:
    start = time.perf_counter()
    try:
        photo = read_photo(source)
        restored = restore_photo(model, photo.pixels, task, memory)
        write_photo(target, restored.pixels, photo)
    # RuntimeError: torch's, for want of memory above all.
    except (InputError, MemoryError, RuntimeError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        return FileResult(str(source), str(target), seconds=time.perf_counter() - start, error=line)
    height, width = photo.pixels.shape[:2]
    scores = {name: score if math.isfinite(score) else None for name, score in restored.scores.items()}
    seconds = time.perf_counter() - start
    return FileResult(str(source), str(target), restored.tasks, scores, height, width, restored.tiles, seconds)
