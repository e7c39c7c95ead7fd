"""Restoring folders of photos: photo by photo, with a report, from where an earlier run stopped."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch

import r2r_kernels
from r2r.data.images import RAW_SUFFIXES, Photo, image_size, memory_to_read, read_photo, write_photo
from r2r.device import device_of, resident_memory
from r2r.errors import InputError
from r2r.files import alone_in, atomic_path
from r2r.inputs import plan_outputs, real_name, unreadable
from r2r.model import R2R, Task
from r2r.report import REPORT, FileResult, Origin, RestorationReport, read_report
from r2r.storage import Address, Location, location
from r2r.tiling import Progress, RestoredPhoto, restore_photo, restore_together, tile_side, whole_photos

_WRITING = 2  # files that wait to be written
_TOGETHER, _PIXELS = 16, 2**18  # photos, and pixels of them, that go through the network together
_STORED = 2**20  # bytes of their files; so many pixels seldom take more


@dataclass(frozen=True)
class Item:
    """A file of a run, and whether an earlier run has done it."""

    source: Location
    target: Location
    done: bool = False


Record = Callable[[FileResult], None]


@dataclass(frozen=True)
class Settings:
    """task, strength, memory: see `restore_photo`. How outputs are written: `file_format`, a key of
    `r2r.data.images.FORMATS`, and `quality`, see `write_photo`; by default as the input is. tiles: `progress` of
    `restore_photo`; what it raises fails the photo, unless it is no Exception: then the run ends."""

    task: Task = None
    strength: float = 1.0
    memory: int | None = None
    file_format: str | None = None
    quality: int | None = None
    tiles: Progress | None = None

    def changes(self, tasks: Sequence[str]) -> bool:
        """Whether a file in which this was found is written anew; else it stays what it is, byte for byte."""
        return (bool(tasks) and self.strength > 0) or self.file_format is not None or self.quality is not None

    def fingerprint(self, model: R2R) -> str:
        """Of everything that decides what an output looks like: the model, the settings, the package's version."""
        chosen = str(self.task), self.strength, self.file_format, self.quality
        decisive = [r2r_kernels.__version__, model.config, model.fingerprint(), *chosen]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


Work = Callable[[R2R, Sequence[Sequence[Item]], Settings, Record, Record], None]


def restore_files(
    model: R2R,
    inputs: Sequence[str | Location],
    out: str | Location,
    settings: Settings = Settings(),
    overwrite: bool = False,
    progress: Callable[[FileResult, int], object] | None = None,
    by: Work | None = None,
) -> RestorationReport:
    """Restore image files, and folders of them, into `out`, with `out/report.json`; model in eval mode, on any device.

    Outputs are named as `plan_outputs` says and hold what `write_photo` keeps; a photo in which nothing was found is
    copied, where its format stays. What an earlier run into `out` did with the same model and settings is skipped
    where neither size nor time of the input has changed and the output is there; overwrite: it is done again, and files
    in `out` that were not made of the same photo are replaced.
    progress: called after each file with its result and how many files there are to do. A file that cannot be read,
    restored or written is reported and does not stop the rest; an interrupted run leaves a report of what it did.
    by: what does the work in place of `restore_items`: `r2r.fleet.Fleet`, which object storage needs.

    Raises InputError before any work for what `plan_outputs` refuses, an unknown task, an empty bank, too little
    memory, a file in the way that was not made of the same photo, and another run into `out`.
    """
    if by is None:
        for place in (*inputs, out):
            if isinstance(location(place), Address):
                raise InputError(f"{place}: object storage is reached through Ray; see --ray")
    report, items = prepare(model, inputs, out, settings, overwrite)
    out = location(out)
    with nullcontext() if isinstance(out, Address) else alone_in(out):
        _restore_into(out, model, report, items, settings, progress, by or restore_items)
    return report


def _restore_into(
    out: Location,
    model: R2R,
    report: RestorationReport,
    items: Sequence[Item],
    settings: Settings,
    progress: Callable[[FileResult, int], object] | None,
    work: Work,
) -> None:
    """Restore what is not done of `items`, and tell of it in the report."""
    total = sum(not item.done for item in items)
    path = out / REPORT
    report.write(path)

    lock = threading.Lock()
    origins = {str(item.source): _origin(item.source, item.target, out) for item in items}

    def whole(result: FileResult) -> FileResult:
        return replace(result, origin=origins[result.input], settings=report.settings)

    def record(result: FileResult) -> None:
        with lock, suppress(InputError):  # a disk that is full now may not be so at the end
            report.append(whole(result), path)

    def show(result: FileResult) -> None:
        if progress is not None:
            progress(whole(result), total)

    try:
        work(model, batches(items), settings, record, show)
        report.complete = True
    finally:
        order = {str(item.source): index for index, item in enumerate(items)}
        report.files.sort(key=lambda one: order[one.input])
        recorded = {one.origin for one in report.files}
        report.pending = [one for one in report.pending if one not in recorded]
        report.write(path)


def restore_stream(model: R2R, source: str, target: IO[bytes], settings: Settings = Settings()) -> None:
    """Restore one file, or standard input where `source` is "-", and write it to an open file. Raises InputError."""
    if source != "-" and (reason := unreadable(Path(source))):
        raise InputError(f"{source}: {reason}")
    given = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    photo = read_photo(io.BytesIO(given) if source == "-" else source)
    restored = _restore_photo(model, photo, settings, settings.memory)
    written = io.BytesIO()  # a TIFF is not written from front to back
    if settings.changes(restored.tasks) or Path(source).suffix.lower() in RAW_SUFFIXES:
        _write_restored(written, photo, restored.tasks, settings)
    else:
        written.write(given)
    target.write(written.getbuffer())
    target.flush()


def prepare(
    model: R2R,
    inputs: Sequence[str | Location],
    out: str | Location,
    settings: Settings = Settings(),
    overwrite: bool = False,
) -> tuple[RestorationReport, list[Item]]:
    """What `restore_files` starts from: a report of what is done already, and all files. Writes nothing."""
    plan = plan_outputs(inputs, out, settings.file_format)
    _Memory(model, settings.memory).check_network(model)
    pixel = torch.zeros(1, 3, 1, 1, device=device_of(model))
    model.restore(pixel, settings.task, settings.strength)  # raises for bad ones, an empty bank
    fingerprint, out = settings.fingerprint(model), location(out)
    known, pending = read_report(out / REPORT)
    there = _present(out, [*(target for _, target in plan.files), *(out / name for name in known)])
    report, items = RestorationReport(fingerprint, plan.skipped), []
    for source, target in plan.files:
        origin = _origin(source, target, out)
        result = known.pop(origin.name, None)
        is_there, own = str(target) in there, origin in pending or (result is not None and result.origin == origin)
        if is_there and not own and not overwrite:
            raise InputError(
                f"{target} is there, and was not made of {source}; give another --out, or --overwrite to replace it"
            )
        done = False
        if is_there and result is not None and result.origin == origin and result.settings == fingerprint:
            done = not overwrite and _is_unchanged(source, result)
        if done and result is not None:
            report.files.append(replace(result, input=str(source), output=str(target)))
        elif own or not is_there:
            report.pending.append(origin)
        items.append(Item(source, target, done))
    report.unchanged = len(report.files)
    report.earlier = [result for name, result in known.items() if str(out / name) in there]
    return report, items


def _origin(source: Location, target: Location, out: Location) -> Origin:
    if isinstance(target, Address):
        assert isinstance(out, Address)
        below = target.below(out)
        assert below is not None
    else:
        assert isinstance(out, Path)
        below = target.relative_to(out)
    return Origin(real_name(source), below.as_posix())


def _present(out: Location, targets: Sequence[Location]) -> set[str]:
    """Which of the outputs are there and not empty."""
    if isinstance(out, Address):
        return {str(file) for file in out.files() if _size(file)} if targets else set()  # one listing for all
    return {str(target) for target in targets if _path(target).is_file() and _size(target)}


def _size(file: Location) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _is_unchanged(source: Location, result: FileResult) -> bool:
    try:
        now = source.stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (result.size, result.modified)


def batches(items: Sequence[Item]) -> list[list[Item]]:
    """Neighbours of which some may be restored together, without those batches of which all is done.

    They follow from the plan alone. Whatever was done before, a photo goes through the network with the same others,
    as a batch of another size may round in another way.
    """
    made: list[list[Item]] = []
    stored = 0
    for item in items:
        size = _size(item.source)
        if not made or len(made[-1]) == _TOGETHER or stored + size > _STORED:
            made.append([])
            stored = 0
        made[-1].append(item)
        stored += size
    return [batch for batch in made if not all(item.done for item in batch)]


class _Memory:
    """How much of the memory that was asked for is left. On a CPU the whole process counts, on a GPU what is there."""

    def __init__(self, model: R2R, limit: int | None) -> None:
        self.limit = limit
        self.shared = device_of(model).type == "cpu"

    def activations(self) -> int | None:
        """Bytes that are left for the network, the photo having been read."""
        if self.limit is None or not self.shared:
            return self.limit
        return max(0, self.limit - resident_memory() - self.limit // 8)  # an eighth is for what is read and written

    def check_network(self, model: R2R) -> None:
        """Raises InputError where the smallest tile would take more than is left."""
        try:
            tile_side(model, self.activations())
        except InputError as error:
            if self.limit is None or not self.shared:
                raise
            held = resident_memory() / 1e9
            raise InputError(
                f"--memory of {self.limit / 1e9:g} GB, of which the program takes {held:.1f}; {error}"
            ) from error

    def is_large(self, source: Path) -> bool:
        """Whether a photo is to be the only one in memory."""
        return self.limit is not None and self.shared and memory_to_read(source) > self.limit // 16

    def check(self, source: Path) -> None:
        """Raises InputError where reading the photo would take more than is left."""
        if self.limit is None or not self.shared:
            return
        needed, held = memory_to_read(source), resident_memory()
        if held + needed > self.limit:
            raise InputError(
                f"reading it takes about {needed / 1e9:.1f} GB beside the {held / 1e9:.1f} GB of the program, "
                f"more than the {self.limit / 1e9:g} GB of --memory"
            )


@dataclass
class _Job:
    """A file on its way: read, restored in place, written."""

    result: FileResult
    photo: Photo | None = None
    done: bool = False  # before, so that it is not written

    def restored(self, by: RestoredPhoto, seconds: float) -> _Job:
        seconds += self.result.seconds
        result = replace(
            self.result, tasks=by.tasks, scores=by.scores, tiles=by.tiles, graphic=by.graphic, seconds=seconds
        )
        return replace(self, result=result)

    def failed(self, error: Exception, seconds: float) -> _Job:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if not isinstance(error, InputError | MemoryError | RuntimeError):
            line = f"{type(error).__name__}: {line}"
        line = line.removeprefix(f"{self.result.input}: ")
        return _Job(replace(self.result, error=line, seconds=self.result.seconds + seconds), done=self.done)


def restore_items(
    model: R2R, batches: Sequence[Sequence[Item]], settings: Settings, record: Record, show: Record
) -> None:
    """Restore what is not done of files in the file system. While photos are restored, the next ones are read and the
    last ones are written; a large one is alone. The thread that has written a file records it, which no interruption of
    this one prevents; then it is shown, in order."""
    room = _Memory(model, settings.memory)
    writing: deque[Future[FileResult]] = deque()

    def finish_writing(waiting: int) -> None:
        while len(writing) > waiting or (writing and writing[0].done()):
            show(writing.popleft().result())

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(_WRITING) as writers:
        groups = (group for batch in batches for group in _groups(batch) if not all(item.done for item in group))
        group = next(groups, None)
        reading: Future[list[_Job]] | None = None
        while group:
            alone = room.is_large(_path(group[0].source))
            if alone:
                finish_writing(0)
            jobs = reading.result() if reading else _read(group, room)
            group, reading = next(groups, None), None
            if group and not alone and not room.is_large(_path(group[0].source)):
                reading = reader.submit(_read, group, room)
            for job in _restore(jobs, model, settings, room):
                if not job.done:
                    writing.append(writers.submit(_write, job, settings, record))
            del job, jobs  # a photo goes when it is written
            finish_writing(0 if alone else _WRITING)
        finish_writing(0)


def _groups(batch: Sequence[Item]) -> Iterator[list[Item]]:
    """Neighbours of one size, as far as they are few and small; any other file is a group of its own."""
    group: list[Item] = []
    size: tuple[int, int] | None = None
    for item in batch:
        try:
            own = image_size(_path(item.source))
        except (InputError, OSError):  # reading it will tell why
            own = None
        more = len(group) + 1
        if group and (own is None or own != size or more > _TOGETHER or more * math.prod(own) > _PIXELS):
            yield group
            group = []
        group.append(item)
        size = own
    if group:
        yield group


def _path(file: Location) -> Path:
    """`restore_items` gets no addresses."""
    assert isinstance(file, Path)
    return file


def _read(group: Sequence[Item], room: _Memory) -> list[_Job]:
    return [_read_one(item, room) for item in group]


def _read_one(item: Item, room: _Memory) -> _Job:
    start = time.perf_counter()
    job = _Job(FileResult(str(item.source), str(item.target)), done=item.done)
    source = _path(item.source)
    try:
        now = source.stat()
        job.result = replace(job.result, size=now.st_size, modified=now.st_mtime_ns)
        room.check(source)
        photo = read_photo(source)
    except Exception as error:  # whatever a decoder does to one file, the others are still to come
        return job.failed(error, time.perf_counter() - start)
    height, width = photo.pixels.shape[:2]
    seconds = time.perf_counter() - start
    return replace(job, result=replace(job.result, height=height, width=width, seconds=seconds), photo=photo)


def _restore(jobs: Sequence[_Job], model: R2R, settings: Settings, room: _Memory) -> list[_Job]:
    """Photos of one size together; where that fails, or one is unlike the others, each by itself that is not done."""
    photos = [job.photo for job in jobs if job.photo is not None and _visible(job.photo) is None]
    alike = 1 < len(photos) == len(jobs) and len({photo.pixels.shape[:2] for photo in photos}) == 1
    if not alike or whole_photos(model, photos[0].pixels.shape, room.activations()) < len(photos):
        return [_restore_one(job, model, settings, room) for job in jobs]
    start = time.perf_counter()
    pixels = [photo.pixels for photo in photos]
    try:
        done = restore_together(model, pixels, settings.task, [*map(np.empty_like, pixels)], settings.strength)
    except Exception:  # what is wrong is one photo's fault, or too much for all at once
        return [_restore_one(job, model, settings, room) for job in jobs]
    each = (time.perf_counter() - start) / len(jobs)
    for photo, restored in zip(photos, done, strict=True):
        photo.pixels[...] = restored.pixels
    return [job.restored(restored, each) for job, restored in zip(jobs, done, strict=True)]


def _restore_one(job: _Job, model: R2R, settings: Settings, room: _Memory) -> _Job:
    if job.photo is None or job.done:
        return job
    start = time.perf_counter()
    try:
        restored = _restore_photo(model, job.photo, settings, room.activations())
    except Exception as error:  # RuntimeError for want of memory above all
        return job.failed(error, time.perf_counter() - start)
    return job.restored(restored, time.perf_counter() - start)


def _restore_photo(model: R2R, photo: Photo, settings: Settings, memory: int | None) -> RestoredPhoto:
    """In place."""
    pixels = photo.pixels
    return restore_photo(
        model, pixels, settings.task, memory, pixels, settings.strength, _visible(photo), settings.tiles
    )


def _visible(photo: Photo) -> np.ndarray | None:
    """Where colours can be seen, None for everywhere; those that transparency hides have no part in the result."""
    return None if photo.alpha is None or photo.alpha.all() else photo.alpha > 0


def _write(job: _Job, settings: Settings, record: Callable[[FileResult], None]) -> FileResult:
    result = _written(job, settings).result
    record(result)
    return result


def _written(job: _Job, settings: Settings) -> _Job:
    if job.photo is None:
        return job
    start = time.perf_counter()
    source, target = job.result.input, job.result.output
    try:
        if settings.changes(job.result.tasks) or Path(target).suffix != Path(source).suffix:
            _write_restored(target, job.photo, job.result.tasks, settings)
        else:
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)
                shutil.copystat(source, temporary)
    except Exception as error:
        return job.failed(error, time.perf_counter() - start)
    return _Job(replace(job.result, seconds=job.result.seconds + time.perf_counter() - start))


def _write_restored(target: str | IO[bytes], photo: Photo, tasks: Sequence[str], settings: Settings) -> None:
    if "dejpeg" in tasks:
        photo.compression.clear()  # was the fault, and would come back with the file's own quality
    write_photo(target, photo, settings.file_format, settings.quality)
