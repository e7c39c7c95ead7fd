"""Restoring folders of photos: photo by photo, with a report, from where an earlier run stopped."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

import r2r_kernels
from r2r.data.images import RAW_SUFFIXES, Photo, memory_to_read, read_photo, write_photo
from r2r.device import device_of, release_freed_memory, resident_memory
from r2r.errors import InputError
from r2r.files import atomic_path
from r2r.inputs import plan_outputs, unreadable
from r2r.model import R2R, Task
from r2r.report import REPORT, FileResult, RestorationReport, read_done
from r2r.tiling import RestoredPhoto, restore_photo, tile_side

_WRITING = 2  # files that wait to be written


@dataclass(frozen=True)
class Output:
    """How outputs are written: `file_format`, a key of `r2r.data.images.FORMATS`, and `quality`, see `write_photo`."""

    file_format: str | None = None
    quality: int | None = None


def restore_files(
    model: R2R,
    inputs: Sequence[str | Path],
    out: str | Path,
    task: Task = None,
    memory: int | None = None,
    output: Output = Output(),
    overwrite: bool = False,
    progress: Callable[[FileResult, int], object] | None = None,
    strength: float = 1.0,
) -> RestorationReport:
    """Restore image files, and folders of them, into `out`, with `out/report.json`; model in eval mode, on any device.

    Outputs are named as `plan_outputs` says and hold what `write_photo` keeps; a photo in which nothing was found is
    copied, where its format stays. task, memory, strength: see `restore_photo`. What
    an earlier run into `out` did with the same model and settings is skipped where neither size nor time of the input
    has changed and the output is there; overwrite: it is done again.
    progress: called after each file with its result and how many files there are to do. A file that cannot be read,
    restored or written is reported and does not stop the rest; an interrupted run leaves a report of what it did.

    Raises InputError before any work for what `plan_outputs` refuses, an unknown task, an empty bank and too little
    memory.
    """
    report, todo = prepare(model, inputs, out, task, memory, output, overwrite, strength)
    path = Path(out, REPORT)
    report.write(path)

    def finish(result: FileResult) -> None:
        with suppress(InputError):  # a disk that is full now may not be so at the end
            report.append(result, path)
        if progress is not None:
            progress(result, len(todo))

    try:
        _restore_all(model, todo, task, memory, output, strength, finish)
        report.complete = True
    finally:
        report.write(path)
    return report


def restore_stream(
    model: R2R,
    source: str,
    target: IO[bytes],
    task: Task = None,
    memory: int | None = None,
    output: Output = Output(),
    strength: float = 1.0,
) -> None:
    """Restore one file, or standard input where `source` is "-", and write it to an open file. Raises InputError."""
    if source != "-" and (reason := unreadable(Path(source))):
        raise InputError(f"{source}: {reason}")
    given = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    photo = read_photo(io.BytesIO(given) if source == "-" else source)
    restored = _restore_photo(model, photo, task, memory, strength)
    written = io.BytesIO()  # a TIFF is not written from front to back
    if not restored.tasks and output == Output() and Path(source).suffix.lower() not in RAW_SUFFIXES:
        written.write(given)
    else:
        write_photo(written, photo, output.file_format, output.quality)
    target.write(written.getbuffer())
    target.flush()


def prepare(
    model: R2R,
    inputs: Sequence[str | Path],
    out: str | Path,
    task: Task = None,
    memory: int | None = None,
    output: Output = Output(),
    overwrite: bool = False,
    strength: float = 1.0,
) -> tuple[RestorationReport, list[tuple[Path, Path]]]:
    """What `restore_files` starts from: a report of what is done already, and what is left to do. Writes nothing."""
    plan = plan_outputs(inputs, out, output.file_format)
    tile_side(model, _Memory(model, memory).activations())  # raises for too little memory
    model.restore(
        torch.zeros(1, 3, 1, 1, device=device_of(model)), task, strength
    )  # raises for bad ones, an empty bank
    settings = fingerprint(model, task, output, strength)
    done = {} if overwrite else read_done(Path(out, REPORT), settings)
    unchanged = [done.get(str(source)) for source, target in plan.files]
    kept, todo = [], []
    for (source, target), result in zip(plan.files, unchanged, strict=True):
        if result is not None and _is_done(source, target, result):
            kept.append(result)
        else:
            todo.append((source, target))
    return RestorationReport(settings, plan.skipped, kept, len(kept)), todo


def fingerprint(model: R2R, task: Task = None, output: Output = Output(), strength: float = 1.0) -> str:
    """Of everything that decides what an output looks like: the model, the settings, the version of this package."""
    digest = hashlib.sha256()
    digest.update(
        json.dumps(
            [r2r_kernels.__version__, model.config, str(task), strength, output.file_format, output.quality]
        ).encode()
    )
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_done(source: Path, target: Path, result: FileResult) -> bool:
    try:
        now = source.stat()
        there = target.is_file() and target.stat().st_size > 0
    except OSError:
        return False
    return there and (str(target), now.st_size, now.st_mtime_ns) == (result.output, result.size, result.modified)


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

    def failed(self, error: Exception, seconds: float) -> _Job:
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if not isinstance(error, InputError | MemoryError | RuntimeError):
            line = f"{type(error).__name__}: {line}"
        line = line.removeprefix(f"{self.result.input}: ")
        return _Job(replace(self.result, error=line, seconds=self.result.seconds + seconds))


def _restore_all(
    model: R2R,
    todo: Sequence[tuple[Path, Path]],
    task: Task,
    memory: int | None,
    output: Output,
    strength: float,
    finish: Callable[[FileResult], object],
) -> None:
    """While one photo is restored, the next one is read and the last ones are written; a large one is alone."""
    room = _Memory(model, memory)
    writing: deque[Future[_Job]] = deque()

    def finish_writing(waiting: int) -> None:
        while len(writing) > waiting or (writing and writing[0].done()):
            finish(writing.popleft().result().result)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(_WRITING) as writers:
        try:
            reading: Future[_Job] | None = None
            for index, (source, target) in enumerate(todo):
                alone = room.is_large(source)
                if alone:
                    finish_writing(0)
                job = reading.result() if reading else _read(source, target, room)
                following = todo[index + 1 : index + 2]
                reading = None
                if not alone and following and not room.is_large(following[0][0]):
                    reading = reader.submit(_read, *following[0], room)
                job = _restore(job, model, task, strength, room)
                writing.append(writers.submit(_write, job, output))
                del job  # the photo goes when it is written
                finish_writing(0 if alone else _WRITING)
                if alone:
                    release_freed_memory()
        finally:
            finish_writing(0)  # an interruption too waits for what is being written


def _read(source: Path, target: Path, room: _Memory) -> _Job:
    start = time.perf_counter()
    job = _Job(FileResult(str(source), str(target)))
    try:
        now = source.stat()
        job.result = replace(job.result, size=now.st_size, modified=now.st_mtime_ns)
        room.check(source)
        photo = read_photo(source)
    except Exception as error:  # whatever a decoder does to one file, the others are still to come
        return job.failed(error, time.perf_counter() - start)
    height, width = photo.pixels.shape[:2]
    seconds = time.perf_counter() - start
    return _Job(replace(job.result, height=height, width=width, seconds=seconds), photo)


def _restore(job: _Job, model: R2R, task: Task, strength: float, room: _Memory) -> _Job:
    if job.photo is None:
        return job
    start = time.perf_counter()
    try:
        restored = _restore_photo(model, job.photo, task, room.activations(), strength)
    except Exception as error:  # RuntimeError for want of memory above all
        return job.failed(error, time.perf_counter() - start)
    scores = {name: score if math.isfinite(score) else None for name, score in restored.scores.items()}
    seconds = job.result.seconds + time.perf_counter() - start
    result = replace(job.result, tasks=restored.tasks, scores=scores, tiles=restored.tiles, seconds=seconds)
    return _Job(result, job.photo)


def _restore_photo(model: R2R, photo: Photo, task: Task, memory: int | None, strength: float) -> RestoredPhoto:
    """In place; colours that transparency hides have no part in it."""
    visible = None if photo.alpha is None else photo.alpha > 0
    return restore_photo(model, photo.pixels, task, memory, photo.pixels, strength, visible)


def _write(job: _Job, output: Output) -> _Job:
    if job.photo is None:
        return job
    start = time.perf_counter()
    try:
        if job.result.tasks or output != Output() or Path(job.result.output).suffix != Path(job.result.input).suffix:
            write_photo(job.result.output, job.photo, output.file_format, output.quality)
        else:  # nothing was found: the file stays what it is, byte for byte
            with atomic_path(job.result.output) as temporary:
                shutil.copyfile(job.result.input, temporary)
                shutil.copystat(job.result.input, temporary)
    except Exception as error:
        return job.failed(error, time.perf_counter() - start)
    return _Job(replace(job.result, seconds=job.result.seconds + time.perf_counter() - start))
