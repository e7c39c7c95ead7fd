"""A page that shows each photo before and after, with a slider between them."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote_from_bytes

from r2r.files import atomic_path
from r2r.report import FileResult

PAGE = "compare.html"

_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>R2R: before and after</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
figure { margin: 2rem 0; --cut: 50% } .pair { position: relative }
img { width: 100%; display: block }
.before { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0) }
input { width: 100% } figcaption { opacity: .75; overflow-wrap: anywhere }
</style>
<h1>Before and after</h1>
<p>Left of the slider: the photo as it was. Right of it: restored.
A format that the browser does not know stays empty.</p>
"""


def write_comparison(out: Path, results: Sequence[FileResult]) -> Path:
    """Write `out/compare.html`, which shows the files where they lie. Raises InputError where it cannot be written."""
    figures = []
    for one in results:
        if one.error is None:
            before, after = (_address(Path(name), out) for name in (one.input, one.output))
            name = html.escape(one.input.encode("utf-8", "replace").decode())
            found = html.escape(" + ".join(one.tasks) or "nothing found")
            figures.append(
                f'<figure><div class="pair"><img loading="lazy" src="{after}" alt="restored">'
                f'<img loading="lazy" class="before" src="{before}" alt="before"></div>'
                '<input type="range" aria-label="before and after" '
                "oninput=\"this.parentNode.style.setProperty('--cut', this.value + '%')\">"
                f"<figcaption>{name}: {found}</figcaption></figure>\n"
            )
    with atomic_path(out / PAGE) as path:
        path.write_text(_HEAD + "".join(figures) + "</html>\n", encoding="utf-8")
    return out / PAGE


def _address(path: Path, out: Path) -> str:
    try:
        relative = os.path.relpath(path, out)
    except ValueError:  # another drive
        return html.escape(Path(os.path.abspath(path)).as_uri())
    return html.escape(quote_from_bytes(os.fsencode(relative.replace(os.sep, "/"))))
