"""The demos: photos restored on a page, and a model trained with next to no time, whose verdict is honest."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from r2r import R2R
from r2r.data.images import read_rgb
from r2r.demo import restoring
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


def test_the_page_shows_every_case_before_and_after(tiny_model: R2R, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    console = Console(record=True, width=200)
    shown = restoring.run_demo(tmp_path / "demo", console, str(tmp_path / "model"))
    assert [one.case for one in shown] == list(restoring.CASES)
    page = (tmp_path / "demo" / "index.html").read_text()
    text = console.export_text()
    for one in shown:
        assert f"{one.case.title}: {one.found}; {one.before:.1f} -> {one.after:.1f} dB in " in text
        for folder in ("degraded", "restored"):
            assert f'src="{folder}/{one.case.file}"' in page
            assert (tmp_path / "demo" / folder / one.case.file).stat().st_size > 10_000
    assert read_rgb(tmp_path / "demo" / "restored" / "large.jpg").shape == (*restoring.LARGE, 3)
    noisy, nothing = shown[0], shown[-2]
    assert 20 < noisy.before < 21
    assert nothing.before == 100
    assert re.search(r"times as fast as plain PyTorch", page)
    assert "http" not in page  # it works from the file system, and asks nobody for anything
