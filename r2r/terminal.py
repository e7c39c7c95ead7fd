"""What a person sees in the terminal: one console, progress bars, the display of a training run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


def progress_bar(*columns: Any) -> Progress:
    """A bar with the number done, the time left and the given columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *columns,
        console=console,
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
        self.progress.console.print(escape(line))
