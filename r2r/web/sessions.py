"""What the page does for each open tab: its photos are restored one job at a time, and removed when the tab closes."""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from r2r.data.images import ACCEPTED, EXTRA_SUFFIXES, SUFFIXES, image_size, read_photo, write_photo
from r2r.errors import InputError
from r2r.model import R2R
from r2r.report import FileResult
from r2r.restoration import Settings, restore_files

_SHOWN = ["JPEG", "PNG", "WEBP", "AVIF", "BMP"]  # what browsers show as it is
_PREVIEW_QUALITY = 95


class Stopped(BaseException):
    """Ends a job at the next tile or photo. No `Exception`: those are taken for the fault of one photo."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` photos, and the `share` of the next one, in [0, 1], that has been worked on."""

    done: int
    total: int
    share: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of one photo. `before` and `after`: files that a browser shows; of a photo that failed there are
    none, and `result.error` says why."""

    name: str
    result: FileResult
    before: Path | None = None
    after: Path | None = None


@dataclass
class Session:
    """One tab. `uploads`: its photos as they came, which other tabs may share; `folder`: all that is made of them."""

    folder: Path
    uploads: set[Path] = field(default_factory=set)
    outcomes: list[Outcome] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


class Sessions:
    """All open tabs. folder: where their files go, each tab's in one whose name cannot be guessed."""

    def __init__(self, model: R2R, folder: Path, memory: int | None, max_pixels: int) -> None:
        self.model = model
        self.folder = folder
        self.memory = memory
        self.max_pixels = max_pixels
        self._open: dict[str, Session] = {}
        self._closed: set[str] = set()  # a job of theirs may still wait
        self._lock = threading.Lock()

    def of(self, tab: str) -> Session:
        with self._lock:
            if tab not in self._open:
                self._open[tab] = Session(self.folder / secrets.token_hex(16))
            return self._open[tab]

    def close(self, tab: str) -> None:
        """Stop the tab's job and remove its files."""
        with self._lock:
            session = self._open.pop(tab, None)
            self._closed.add(tab)
        if session is not None:
            session.stop.set()
            self._remove(session.uploads)
            shutil.rmtree(session.folder, ignore_errors=True)

    def close_all(self) -> None:
        for tab in list(self._open):
            self.close(tab)

    def keep(self, tab: str, uploads: Sequence[Path]) -> None:
        """These are the tab's photos from now on; others that it had are removed."""
        session = self.of(tab)
        with self._lock:
            gone, session.uploads = session.uploads - set(uploads), set(uploads)
        self._remove(gone)

    def _remove(self, uploads: set[Path]) -> None:
        with self._lock:
            used = {path for session in self._open.values() for path in session.uploads}
        for path in uploads - used:
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # each upload lies in a folder named by its content

    def restore(self, tab: str, uploads: Sequence[Path], tasks: Sequence[str], strength: float) -> Iterator[Progress]:
        """Restore photos as `r2r restore` does; `outcomes` of the session grow meanwhile. An upload that is too large,
        or no image, fails by itself. Nothing is done for a tab that was closed. Raises InputError for what concerns all
        of them."""
        if tab in self._closed:
            return
        session = self.of(tab)
        shutil.rmtree(session.folder, ignore_errors=True)
        session.outcomes = []
        inputs = []
        for number, upload in enumerate(uploads):
            copy = session.folder / "in" / str(number) / upload.name
            try:
                self._check(upload)
                copy.parent.mkdir(parents=True)
                os.link(upload, copy)
            except (InputError, OSError) as error:
                line = str(error).removeprefix(f"{upload}: ")
                session.outcomes.append(Outcome(upload.name, FileResult(str(upload), "", error=line)))
            else:
                inputs.append(copy)
        if inputs:
            yield from self._run(session, inputs, "+".join(tasks) or None, strength)

    def _check(self, upload: Path) -> None:
        if not upload.exists():
            raise InputError("the upload is gone; drop the photo again")
        if upload.suffix.lower() not in (*SUFFIXES, *EXTRA_SUFFIXES):
            raise InputError(f"not an image; {ACCEPTED}")
        try:
            height, width = image_size(upload)
        except InputError:
            return  # reading it will tell what is wrong
        if height * width > self.max_pixels:
            raise InputError(
                f"{width} x {height} pixels; at most {self.max_pixels / 1e6:g} megapixels are accepted here"
            )

    def _run(self, session: Session, inputs: list[Path], task: str | None, strength: float) -> Iterator[Progress]:
        """The restoration has a thread of its own, so that a closed tab can end it."""
        told: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        errors: list[Exception] = []
        done = 0

        def tell(share: float = 0.0) -> None:
            if session.stop.is_set():
                raise Stopped
            told.put(Progress(done, len(inputs), share))

        def show(result: FileResult, total: int) -> None:
            nonlocal done
            session.outcomes.append(self._shown(result, session.folder / "shown" / str(done)))
            done += 1
            tell()

        def work() -> None:
            settings = Settings(task, strength, self.memory, tiles=tell)
            try:
                tell()
                restore_files(self.model, inputs, session.folder / "out", settings, True, show)
            except Stopped:
                pass
            except Exception as error:
                errors.append(error)
            finally:
                told.put(None)

        worker = threading.Thread(target=work, name="restoring")
        worker.start()
        try:
            yield from iter(told.get, None)
        except GeneratorExit:
            session.stop.set()
            raise
        finally:
            worker.join()
        if errors:
            raise errors[0]

    def _shown(self, result: FileResult, folder: Path) -> Outcome:
        outcome = Outcome(Path(result.input).name, result)
        if result.error:
            return outcome
        try:
            before, after = (_viewable(Path(path), folder) for path in (result.input, result.output))
        except InputError as error:
            return replace(outcome, result=replace(result, error=str(error)))
        return replace(outcome, before=before, after=after)


def _viewable(path: Path, folder: Path) -> Path:
    """The file itself where browsers show its format, else a picture of it of the same size in `folder`."""
    with suppress(Image.UnidentifiedImageError, OSError), Image.open(path, formats=_SHOWN):
        return path
    photo = read_photo(path)
    if photo.alpha is None:
        picture = folder / f"{secrets.token_hex(4)}.jpg"
        write_photo(picture, photo, "JPEG", _PREVIEW_QUALITY)
    else:
        picture = folder / f"{secrets.token_hex(4)}.png"
        write_photo(picture, photo, "PNG")
    return picture
