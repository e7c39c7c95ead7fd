"""The page itself, in Gradio's parts."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from r2r.data.images import EXTRA_SUFFIXES, SUFFIXES
from r2r.errors import InputError
from r2r.web.sessions import Outcome, Progress, Sessions

TITLE = "R2R: restore photos"
_INTRODUCTION = f"""# {TITLE}

Drop photos. What is wrong with each of them is found out, and put right: noise, rain, haze, blur, darkness, JPEG
artefacts. Nothing leaves the computer that runs this page. Photos are removed from it when you close the page.
"""
_HERE = Path(__file__).parent
_WAITING = 20  # jobs; more are refused
_FAULTS = {
    "denoise": "noise",
    "derain": "rain",
    "dehaze": "haze",
    "deblur": "blur",
    "lowlight": "low light",
    "dejpeg": "JPEG artefacts",
    "desnow": "snow",
}

# Gradio's own has too little contrast (WCAG AA asks for 4.5 : 1).
THEME = gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace").set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_hover_dark="#991b1b",
    button_cancel_text_color="white",
    button_cancel_text_color_dark="white",
)
CSS = """
#photos .or { color: inherit }
#photos [aria-haspopup=false]:has(input) { display: none }  /* a button in a button; clearing the list does the same */
#found table { width: 100% }
#found th, #found td { text-align: left; font-weight: normal }
progress { width: 100% }
"""


def build_page(sessions: Sessions, examples: Sequence[Path]) -> gr.Blocks:
    """The page; examples: photos that it offers, which lie where the page may read."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 24 * 3600)) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                photos = gr.File(
                    label="Photos", file_count="multiple", file_types=[*SUFFIXES, *EXTRA_SUFFIXES], elem_id="photos"
                )
                gr.Examples(
                    [[[str(path)]] for path in examples], photos, label="Or try one of these", elem_id="examples"
                )
                tasks = gr.CheckboxGroup(
                    [(_fault(task), task) for task in sessions.model.tasks],
                    label="What is wrong",
                    info="Tick nothing, and it is found out.",
                    elem_id="tasks",
                )
                strength = gr.Slider(
                    0, 100, 100, step=1, label="Strength in per cent", info="How much is put right.", elem_id="strength"
                )
                with gr.Row():
                    start = gr.Button("Restore", variant="primary", elem_id="restore")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
            with gr.Column(scale=2, min_width=320):
                status = gr.HTML(_status("Nothing to do yet."), elem_id="status")
                chosen = gr.Radio([], label="Look at", visible=False, elem_id="chosen")
                viewer = gr.HTML(
                    "",
                    css_template=(_HERE / "viewer.css").read_text(),
                    js_on_load=(_HERE / "viewer.js").read_text(),
                    elem_id="viewer",
                )
                found = gr.HTML("", elem_id="found")
                restored = gr.File(label="Restored photos, to download", visible=False, elem_id="restored")

        def keep(uploads: list[str] | None, request: gr.Request) -> None:
            offered = set(examples)
            sessions.keep(_tab(request), [path for path in map(Path, uploads or ()) if path not in offered])

        def get_ready(request: gr.Request) -> str:
            sessions.of(_tab(request)).stop.clear()
            return _status("Waiting for its turn.")

        def restore(
            uploads: list[str] | None, named: list[str], percent: float, request: gr.Request
        ) -> Iterator[dict[Any, Any]]:
            tab = _tab(request)
            session = sessions.of(tab)
            yield {
                status: _status("Starting."), chosen: gr.update(choices=[], value=None, visible=False), viewer: "",
                found: "", restored: gr.update(value=None, visible=False),
            }  # fmt: skip
            if not uploads:
                yield {status: _status("Drop a photo first.", alarm=True)}
                return
            try:
                for progress in sessions.restore(tab, [Path(upload) for upload in uploads], named, percent / 100):
                    yield {status: _progress(progress)}
            except InputError as error:
                yield {status: _status(str(error), alarm=True)}
                return
            outcomes = session.outcomes
            good = [number for number, outcome in enumerate(outcomes) if not outcome.result.error]
            yield {
                status: _summary(outcomes, session.stop.is_set()),
                restored: gr.update(value=[outcomes[number].result.output for number in good], visible=bool(good)),
                chosen: gr.update(
                    choices=[(f"{outcomes[number].name}: {_in_words(outcomes[number])}", number) for number in good],
                    value=good[0] if good else None,
                    visible=len(good) > 1,
                ),
                viewer: _viewer(outcomes[good[0]]) if good else "",
                found: _found(outcomes[good[0]]) if good else "",
            }

        def show(number: int | None, request: gr.Request) -> tuple[str, str]:
            outcomes = sessions.of(_tab(request)).outcomes
            if number is None or number >= len(outcomes):
                return "", ""
            return _viewer(outcomes[number]), _found(outcomes[number])

        def halt(request: gr.Request) -> None:
            sessions.of(_tab(request)).stop.set()

        def leave(request: gr.Request) -> None:
            sessions.close(_tab(request))

        here: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        photos.change(keep, photos, None, queue=False, **here)
        start.click(get_ready, None, status, queue=False, **here).then(
            restore,
            [photos, tasks, strength],
            [status, chosen, viewer, found, restored],
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=status,
            api_visibility="private",
        )
        stop.click(halt, None, None, queue=False, **here)
        chosen.input(show, chosen, [viewer, found], queue=False, **here)
        page.unload(leave)
    page.queue(max_size=_WAITING)
    return page


def _tab(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash


def _status(text: str, alarm: bool = False) -> str:
    return f'<p role="{"alert" if alarm else "status"}">{html.escape(text)}</p>'


def _progress(progress: Progress) -> str:
    whole = (progress.done + progress.share) / progress.total
    photo = min(progress.done + 1, progress.total)
    share = f", {progress.share:.0%} of it" if progress.share else ""
    text = f"Restoring photo {photo} of {progress.total}{share}."
    return f'<p>{text}</p><progress max="1" value="{whole:.3f}" aria-label="Restoring"></progress>'


def _summary(outcomes: Sequence[Outcome], stopped: bool) -> str:
    failed = [outcome for outcome in outcomes if outcome.result.error]
    restored = len(outcomes) - len(failed)
    seconds = sum(outcome.result.seconds for outcome in outcomes)
    text = f"{'Stopped. ' if stopped else ''}{restored} restored in {seconds:.1f} s, {len(failed)} failed."
    if restored:
        text += " Not right? Tick what is wrong, or choose another strength, and restore again."
    lines = "".join(f'<p role="alert">{html.escape(f"{one.name}: {one.result.error}")}</p>' for one in failed)
    return _status(text) + lines


def _viewer(outcome: Outcome) -> str:
    name = html.escape(outcome.name)
    result = outcome.result
    told = f"{name} before and after. Arrow keys move, plus and minus zoom, 0 fits."
    return f"""<div class="stage" tabindex="0" role="group" aria-label="{told}"
 style="aspect-ratio: {result.width} / {result.height}">
<div class="pair" data-width="{result.width}" data-height="{result.height}">
<img class="after" src="{_address(outcome.after)}" alt="{name}, restored">
<img class="before" src="{_address(outcome.before)}" alt="{name}, as it was"><div class="line"></div></div></div>
<div class="tools"><span aria-hidden="true">before</span>
<input class="cut" type="range" max="100" step="0.1" value="50" aria-label="How much of the photo before is shown">
<span aria-hidden="true">restored</span>
<button type="button" data-action="smaller" aria-label="Smaller">&minus;</button>
<output class="scale" aria-label="Scale"></output>
<button type="button" data-action="larger" aria-label="Larger">+</button>
<button type="button" data-action="fit">Fit</button>
<button type="button" data-action="actual">100 %</button></div>"""


def _found(outcome: Outcome) -> str:
    result = outcome.result
    rows = "".join(
        f'<tr><th scope="row">{html.escape(_fault(task))}</th><td>{score:.0%}</td>'
        f"<td>{'restored' if task in result.tasks else ''}</td></tr>"
        for task, score in result.scores.items()
    )
    tiles = f", in {result.tiles} tiles" if (result.tiles or 1) > 1 else ""
    size = f"{result.width} x {result.height} pixels{tiles}, {result.seconds:.1f} s"
    return (
        f"<table><caption>{html.escape(outcome.name)}: {html.escape(_in_words(outcome))} ({size})</caption>"
        '<thead><tr><th scope="col">what may be wrong</th><th scope="col">how likely</th><th scope="col">done</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _fault(task: str) -> str:
    return _FAULTS.get(task, task)


def _in_words(outcome: Outcome) -> str:
    return ", ".join(map(_fault, outcome.result.tasks)) or outcome.result.untouched


def _address(path: Path | None) -> str:
    return html.escape(f"gradio_api/file={quote(str(path))}")
