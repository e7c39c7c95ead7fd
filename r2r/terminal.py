"""What a person sees in the terminal: one console, progress bars, the display of a training run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from r2r.report import REPORT, FileResult, RestorationReport
from r2r.storage import Location

if TYPE_CHECKING:
    from r2r.evaluation import Evaluation

_UNBROKEN = 100_000  # columns: in a pipe or a file a line stays a line

console = Console(width=None if sys.stdout.isatty() else _UNBROKEN, markup=False, emoji=False, highlight=False)


def printable(name: object) -> str:
    """A name as it can be shown: control characters and bytes that are not UTF-8 become escapes such as `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name))


def tolerate_any_character() -> None:
    """Let standard output and error show what their encoding can, and escapes for the rest."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def only_results() -> Iterator[None]:
    """Inside, what anything else prints goes to standard error, and what the console prints where it went before."""
    console.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        console._file = None


def progress_bar(*columns: Any) -> Progress:
    """A bar with the number done, the time left and the given columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
        disable=not console.is_terminal,
    )


class TrainingDisplay:
    """A bar for the phase and the newest figures behind it."""

    def __init__(self) -> None:
        self.progress = progress_bar(TextColumn("{task.fields[figures]}"))
        self.bar = self.progress.add_task("starting", total=None, figures="")

    def start(self, phase: str, done: int, total: int) -> None:
        self.progress.reset(self.bar, description=phase, total=total, completed=done, figures="")

    def update(self, done: int, row: dict[str, float]) -> None:
        figures = (
            f"loss {row['total']:.3f}  {row['psnr']:.2f} dB  {row['accuracy']:4.0%} matched  "
            f"{row['images_per_second']:.1f} images/s"
        )
        self.progress.update(self.bar, completed=done, figures=figures)

    def say(self, line: str) -> None:
        self.progress.console.print(line)


class RestorationDisplay:
    """A line for each photo, as text or as JSON, and a bar."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.progress = progress_bar()
        self.bar = self.progress.add_task("restoring", total=None)

    def show(self, result: FileResult, total: int) -> None:
        self.progress.update(self.bar, total=total, advance=1)
        if self.as_json:
            self._say(json.dumps(asdict(result)))
        elif result.error:
            self._say(("failed ", "red"), f"{printable(result.input)}: {printable(result.error)}")
        else:
            scores = "  ".join(f"{name} {score:.0%}" for name, score in result.scores.items())
            tiles = f", {result.tiles} tiles" if result.tiles and result.tiles > 1 else ""
            likely = f" ({scores})" if scores else ""
            found = (" + ".join(result.tasks) or result.untouched, "bold")
            self._say(f"{printable(result.input)}: ", found, f"{likely} in {result.seconds:.1f} s{tiles}")

    def plan(self, report: RestorationReport, todo: Sequence[tuple[Location, Location]]) -> None:
        """What a run would do."""
        for source, target in todo:
            self._say(*self._fields({"input": str(source), "output": str(target)}, f"{source} -> {target}"))
        self._skipped(report)
        counts = {"to_restore": len(todo), "unchanged": report.unchanged, "skipped": len(report.skipped)}
        text = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
        self._say(*self._fields(counts, text))

    def summary(self, report: RestorationReport, out: Location) -> None:
        self._skipped(report)
        counts = {
            "restored": report.restored,
            "failed": report.failed,
            "unchanged": report.unchanged,
            "skipped": len(report.skipped),
        }
        always = ("restored", "failed")
        text = ", ".join(f"{number} {name}" for name, number in counts.items() if number or name in always)
        path = out / REPORT
        self._say(*self._fields({**counts, "report": str(path)}, f"{text}; {path}"))

    def _skipped(self, report: RestorationReport) -> None:
        for one in report.skipped:
            if self.as_json:
                self._say(json.dumps({"skipped": one.input, "reason": one.reason}))
            else:
                self._say(("skipped ", "yellow"), f"{printable(one.input)}: {printable(one.reason)}")

    def _fields(self, values: dict[str, Any], text: str) -> tuple[str]:
        return (json.dumps(values) if self.as_json else printable(text),)

    def _say(self, *parts: str | tuple[str, str]) -> None:
        self.progress.console.print(Text.assemble(*parts), soft_wrap=True)


def show_growth(before: Evaluation, after: Evaluation) -> None:
    """What a new task, the first set of each evaluation, did to its own photos and to those of the old tasks."""
    table = Table(
        "task", "input", "before", "after", "matched before", "matched after", title="held-out photos, PSNR in dB"
    )
    for number, (old, new) in enumerate(zip(before.sets, after.sets, strict=True)):
        matched = f"{old.accuracy:.0%}" if number else "-"
        quality = (f"{one.psnr:.2f}" for one in (new.input, old.blind, new.blind))
        table.add_row(new.name, *quality, matched, f"{new.accuracy:.0%}")
    console.print(table)
