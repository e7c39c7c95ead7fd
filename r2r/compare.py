"""Pages that show photos before and after, with a slider between them: plain HTML, read from the file system."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote_from_bytes

from r2r.files import atomic_path
from r2r.report import FileResult

PAGE = "compare.html"


def write_comparison(out: Path, results: Sequence[FileResult]) -> Path:
    """Write `out/compare.html`, which shows the files where they lie. Raises InputError where it cannot be written."""
    figures = [
        figure(Path(one.input), Path(one.output), out, f"{one.input}: {' + '.join(one.tasks) or one.untouched}")
        for one in results
        if one.error is None
    ]
    note = "Left of the slider: the photo as it was. Right of it: restored. What a browser does not know stays empty."
    write_page(out / PAGE, "Before and after", note, figures)
    return out / PAGE


def write_page(path: Path, title: str, note: str, figures: Iterable[str]) -> None:
    """Write a page of `figure`s. Raises InputError where it cannot be written."""
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>R2R: {_escaped(title)}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
figure {{ margin: 2rem 0; --cut: 50% }} .pair {{ position: relative }}
img {{ width: 100%; display: block }}
.before {{ position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0) }}
input {{ width: 100% }} figcaption {{ overflow-wrap: anywhere }}
</style>
<h1>{_escaped(title)}</h1>
<p>{_escaped(note)}</p>
{"".join(figures)}</html>
"""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def figure(before: Path, after: Path, folder: Path, caption: str) -> str:
    """Two photos, of which a slider shows a part each, on a page in `folder`; the files are shown where they lie."""
    caption = _escaped(caption)
    return (
        f'<figure><div class="pair"><img loading="lazy" src="{_address(after, folder)}" alt="restored">'
        f'<img loading="lazy" class="before" src="{_address(before, folder)}" alt="before"></div>'
        f'<input type="range" aria-label="how much of before is shown: {caption}" '
        "oninput=\"this.parentNode.style.setProperty('--cut', this.value + '%')\">"
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def _address(path: Path, out: Path) -> str:
    try:
        relative = os.path.relpath(path, out)
    except ValueError:  # another drive
        return html.escape(Path(os.path.abspath(path)).as_uri())
    return html.escape(quote_from_bytes(os.fsencode(relative.replace(os.sep, "/"))))
