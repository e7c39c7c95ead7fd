"""The demo, with next to no training: everything is written, nothing held out was trained on, the verdict is honest."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from r2r import R2R
from r2r.data.images import read_rgb
from r2r.demo.photos import TASKS
from r2r.demo.training import run_demo


def test_demo_writes_all_and_does_not_boast(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    run_demo(tmp_path, seed=0, minutes=0, console=console)
    text = console.export_text()
    assert all(re.search(rf"{task} +\d", text) for task in TASKS)
    assert "NOT reached" in text
    page = (tmp_path / "index.html").read_text()
    assert "NOT reached" in page
    pictures = re.findall(r'src="([^"]+)"', page)
    assert len(pictures) == 3
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)
    assert R2R.from_pretrained(tmp_path / "model").tasks == TASKS
    trained, held_out = (
        {path.stem: read_rgb(path) for path in (tmp_path / "photos" / part).iterdir()} for part in ("train", "held_out")
    )
    assert not trained.keys() & held_out.keys()
    assert not {"motorcycle", "chelsea", "coffee"} & trained.keys()

    log = (tmp_path / "run" / "log.csv").read_text()
    run_demo(tmp_path, seed=0, minutes=0, console=console)  # finished: draws again, trains no more
    assert (tmp_path / "run" / "log.csv").read_text() == log
