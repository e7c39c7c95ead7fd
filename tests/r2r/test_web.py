"""`r2r web`, used as a person would, in headless Chromium."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage import data

from r2r import R2R, fast
from r2r.demo.restoring import CASES, Case, write_cases
from r2r.restoration import Settings, restore_files
from r2r.web.sessions import Sessions

ENTRY = Path(sys.executable).with_name("r2r")
PASSWORD = "long enough"
SCREENSHOT = "R2R_SCREENSHOT"  # names a file: the README's picture is made by R2R_SCREENSHOT=docs/images/web.png
MAX_SIZE, MAX_PIXELS = 8, 3  # megabytes, megapixels
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return probing.getsockname()[1]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its temporary files."""
    return tmp_path_factory.mktemp("temporary")


@contextmanager
def serving(temporary: Path, *options: object) -> Iterator[tuple[str, int]]:
    """A server's address and process; afterwards it has left nothing behind."""
    pytest.importorskip("gradio", reason="the page needs Gradio")
    port = free_port()
    environment = {**os.environ, "R2R_PASSWORD": PASSWORD, "TMPDIR": str(temporary)}
    command = [str(ENTRY), "web", "--port", str(port), *map(str, options)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith(f"http://127.0.0.1:{port}"), said + server.stdout.read()
        yield f"http://127.0.0.1:{port}/", server.pid
        server.send_signal(signal.SIGTERM)
        assert server.stdout.read() == ""  # no errors were logged
        assert server.wait(60) == 0
    assert not list(temporary.iterdir())


@pytest.fixture(scope="module")
def address(temporary: Path) -> Iterator[str]:
    """A server with the weights that come along, and with little memory, so that a photo of 2 megapixels is tiled."""
    with serving(temporary, "--max-size", MAX_SIZE, "--max-pixels", MAX_PIXELS, "--memory", 1.5) as (found, _):
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need Playwright")
    if CHROMIUM is None:
        pytest.skip("browser tests need Chromium: apt-get install chromium")
    # Chromium's own sandbox does not start for root, as which CI runs.
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with playwright.sync_playwright() as running, running.chromium.launch(**options) as browser:
        yield browser


@pytest.fixture
def tab(chromium: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a new tab, logged in."""
    opened = []

    def open_tab(**options: Any) -> Any:
        known = {"username": "anyone", "password": PASSWORD}
        context = chromium.new_context(viewport={"width": 1280, "height": 1000}, http_credentials=known, **options)
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.get_by_role("button", name="Restore").wait_for()
        return page

    yield open_tab
    for context in opened:
        context.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_cases(folder, [Case("", "chelsea", "noise:sigma=25", "noise.png"), Case("", "coffee", None, "jpeg.jpg", 8)])
    for path in list(folder.iterdir()):
        with Image.open(path) as image:
            image.crop((100, 60, 260, 188)).save(path, quality=8)
    deep = np.random.default_rng(0).normal(data.chelsea()[:96, :128] * 257.0, 6000).clip(0, 65535)
    tifffile.imwrite(folder / "deep.tif", deep.astype(np.uint16), photometric="rgb", description="a cat", metadata=None)
    large = np.tile(np.asarray(Image.open(folder / "noise.png")), (10, 10, 1))[:1200, :1600]
    Image.fromarray(large).save(folder / "large.jpg", quality=80)
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:2000])
    return folder


def drop(page: Any, *files: Path) -> None:
    page.set_input_files("#photos input[type=file]", [str(file) for file in files])
    for file in files:
        page.locator("#photos").get_by_text(file.stem).first.wait_for()


def restore(page: Any) -> str:
    """Restores, and gives what the page says at the end."""
    # What an earlier job said may have the same words, and stays until "Waiting for its turn." takes its place.
    page.eval_on_selector_all("#status p", "said => said.forEach(one => one.classList.add('earlier'))")
    page.get_by_role("button", name="Restore").click()
    said = page.locator("#status p:not(.earlier)")
    said.filter(has_text="failed.").or_(said.and_(page.get_by_role("alert"))).first.wait_for()
    return page.locator("#status").inner_text()


def download(page: Any, name: str) -> bytes:
    with page.expect_download() as expected:
        page.locator("#restored").get_by_label(f"Download {name}").or_(
            page.locator(f'#restored a[download="{name}"]')
        ).click()
    return Path(expected.value.path()).read_bytes()


def accessible(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")
    result = axe.Axe().run(page)
    assert not result.response["violations"], result.generate_report()


@pytest.fixture(scope="module")
def model() -> R2R:
    """As `r2r restore` has it."""
    loaded = fast.R2R.from_pretrained()
    assert isinstance(loaded, fast.R2R)
    return loaded.freeze(torch.float32)


def test_downloads_are_what_the_command_writes(
    tab: Callable[..., Any], model: R2R, photos: Path, tmp_path: Path
) -> None:
    page = tab()
    names = ("noise.png", "jpeg.jpg", "deep.tif")
    drop(page, *(photos / name for name in names))
    assert "3 restored" in restore(page)
    restore_files(model, [photos / name for name in names], tmp_path)
    for name in names:
        assert download(page, name) == (tmp_path / name).read_bytes(), name
    with tifffile.TiffFile(tmp_path / "deep.tif") as file:
        assert file.pages.first.dtype == np.uint16
        assert file.pages.first.description == "a cat"

    assert page.get_by_role("row", name="noise").get_by_text("restored").count() == 1
    assert page.get_by_role("table").get_by_text("%").count() == 6
    page.get_by_role("radio", name="deep.tif").check()
    page.locator("#found").get_by_text("deep.tif").wait_for()
    for kind in ("before", "after"):  # a picture stands for the TIFF
        image = page.locator(f"#viewer img.{kind}")
        assert image.evaluate("async (it) => { await it.decode(); return [it.naturalWidth, it.naturalHeight] }") == [
            128,
            96,
        ]


def test_a_person_says_what_is_wrong_and_how_much(
    tab: Callable[..., Any], model: R2R, photos: Path, tmp_path: Path
) -> None:
    page = tab()
    drop(page, photos / "noise.png")
    page.get_by_label("rain").check()
    page.get_by_label("number input for Strength in per cent").fill("40")
    page.keyboard.press("Tab")
    restore(page)
    restore_files(model, [photos / "noise.png"], tmp_path, Settings("derain", 0.4))
    assert download(page, "noise.png") == (tmp_path / "noise.png").read_bytes()


def test_the_slider_moves_and_the_view_zooms(tab: Callable[..., Any], photos: Path) -> None:
    page = tab()
    drop(page, photos / "noise.png")
    restore(page)
    before, pair, stage = (page.locator(f"#viewer .{name}") for name in ("before", "pair", "stage"))
    cut = page.get_by_label("How much of the photo before is shown")

    def shown() -> float:
        hidden = before.evaluate("it => parseFloat(it.style.clipPath.split(' ')[1])")
        width = pair.evaluate("it => it.clientWidth")
        return (width - hidden) / width

    assert shown() == pytest.approx(0.5, abs=0.01)
    cut.focus()
    page.keyboard.press("Home")
    assert shown() < 0.01
    for _ in range(3):
        page.keyboard.press("PageUp")
    assert 0.05 < shown() < 0.5
    box = stage.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=4)
    page.mouse.up()
    assert shown() == pytest.approx(0.75, abs=0.02)

    fits = pair.evaluate("it => it.clientWidth")
    page.get_by_role("button", name="Larger").click()
    assert pair.evaluate("it => it.clientWidth") == pytest.approx(1.5 * fits, rel=0.02)
    stage.focus()
    page.keyboard.press("1")
    assert pair.evaluate("it => it.clientWidth") == 160
    for _ in range(9):
        page.keyboard.press("+")
    assert pair.evaluate("it => it.clientWidth") == 8 * 160
    at = stage.evaluate("it => it.scrollLeft")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("at => document.querySelector('#viewer .stage').scrollLeft > at", arg=at)
    page.wait_for_timeout(500)  # the keyboard scrolls smoothly
    at = stage.evaluate("it => it.scrollLeft")
    page.mouse.move(box["x"] + 60, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 20, middle, steps=4)
    page.mouse.up()
    assert stage.evaluate("it => it.scrollLeft") == pytest.approx(at + 40, abs=2)
    page.keyboard.press("0")
    assert pair.evaluate("it => it.clientWidth") == fits


def test_bad_files_are_told_in_words_and_the_page_lives_on(
    tab: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (2000, 2000)).save(tmp_path / "many.png")
    page = tab()
    page.get_by_role("button", name="Restore").click()
    page.get_by_text("Drop a photo first.").wait_for()
    drop(page, photos / "broken.png", tmp_path / "many.png", photos / "noise.png")
    said = restore(page)
    assert "1 restored" in said
    assert "2 failed" in said
    assert "broken.png: damaged or cut short" in said
    assert "many.png: 2000 x 2000 pixels; at most 3 megapixels are accepted here" in said
    page.get_by_label("Clear").click()
    (tmp_path / "large.bmp").write_bytes(bytes(MAX_SIZE * 10**6 + 1))
    page.set_input_files("#photos input[type=file]", str(tmp_path / "large.bmp"))
    upload = {"files": {"name": "large.bmp", "mimeType": "image/bmp", "buffer": (tmp_path / "large.bmp").read_bytes()}}
    assert page.request.post(f"{page.url}gradio_api/upload", multipart=upload).status == 413  # whatever the page says
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    page.reload()
    drop(page, photos / "noise.png")
    assert "1 restored" in restore(page)


def test_two_tabs_at_once_get_what_is_theirs(
    tab: Callable[..., Any], model: R2R, photos: Path, temporary: Path, tmp_path: Path
) -> None:
    first, second = tab(), tab()
    own = tmp_path / "own.png"
    Image.open(photos / "noise.png").rotate(90, expand=True).save(own)
    drop(first, own, photos / "noise.png")
    drop(second, photos / "jpeg.jpg", photos / "noise.png")
    for page in (first, second):
        page.get_by_role("button", name="Restore").click()
    for page in (first, second):
        page.locator("#status").get_by_text("2 restored").wait_for()
    # As in the second tab: photos of one size go through the network together, which changes the rounding.
    restore_files(model, [own, photos / "jpeg.jpg", photos / "noise.png"], tmp_path / "out")
    assert download(first, "own.png") == (tmp_path / "out" / "own.png").read_bytes()
    assert download(second, "jpeg.jpg") == (tmp_path / "out" / "jpeg.jpg").read_bytes()
    first.close()
    waited = time.monotonic() + 60
    while any(path.name == "own.png" for path in temporary.rglob("*")) and time.monotonic() < waited:
        time.sleep(0.2)
    left = {path.name for path in temporary.rglob("*") if path.is_file() and path.stat().st_size} - {"report.json"}
    assert left == {case.file for case in CASES[:-1]} | {"jpeg.jpg", "noise.png"}  # of the second tab
    assert "2 restored" in restore(second)  # its photos were not taken away, though the first tab had one of them too


def test_a_long_photo_shows_progress_and_is_stopped(tab: Callable[..., Any], photos: Path) -> None:
    page = tab()
    drop(page, photos / "large.jpg", photos / "noise.png")
    page.get_by_role("button", name="Restore").click()
    page.get_by_text("% of it.").wait_for()
    bar = page.get_by_role("progressbar", name="Restoring")
    assert 0 < float(bar.get_attribute("value")) < 0.5
    accessible(page)
    page.get_by_role("button", name="Stop").click()
    page.locator("#status").get_by_text("Stopped. 0 restored").wait_for()


def test_the_page_asks_nobody_else_for_anything(chromium: Any, address: str, tab: Callable[..., Any]) -> None:
    asked: list[str] = []
    refused: list[str] = []
    page = tab()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: refused.append(message.text))
    page.reload()
    page.locator("#examples").get_by_text("jpeg.jpg", exact=True).click()
    page.locator("#photos").get_by_text("jpeg").first.wait_for()
    restore(page)
    assert len(asked) > 20
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not [text for text in refused if "Content Security Policy" in text]
    policy = page.request.get(address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert page.request.get(f"{address}gradio_api/file=http://127.0.0.1/").status == 403


def test_without_the_password_nothing_is_had(address: str) -> None:
    for user in (
        {},
        {"Authorization": "Basic " + base64.b64encode(b"anyone:wrong").decode()},
        {"Authorization": "Basic ?"},
    ):
        for path in ("", "config", "gradio_api/file=/etc/hostname", "gradio_api/upload"):
            with pytest.raises(HTTPError, match="401"):
                urlopen(Request(address + path, headers=user))


def test_a_file_that_is_removed_while_it_is_sent_is_no_error(tmp_path: Path) -> None:
    responses = pytest.importorskip("starlette.responses", reason="the page needs Gradio")
    from r2r.web.guard import Guard

    def status(answer: Any, path: Path) -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": f"/gradio_api/file={path}", "headers": []}
        with ThreadPoolExecutor(1) as apart:  # Playwright has a loop of its own in this thread
            apart.submit(lambda: asyncio.run(Guard(answer)(scope, receive, send))).result()
        assert [message["type"] for message in sent].count("http.response.start") == 1
        return int(sent[0]["status"])

    photo = tmp_path / "photo.png"
    Image.fromarray(data.chelsea()).save(photo)
    begun = responses.FileResponse(photo, stat_result=photo.stat())
    assert status(begun, photo) == 200
    photo.unlink()
    assert status(begun, photo) == 200  # its head was sent
    assert status(responses.FileResponse(photo), photo) == 404
    with pytest.raises(RuntimeError, match="is not a file"):
        status(responses.FileResponse(tmp_path), tmp_path)


def test_it_is_used_with_the_keyboard_alone(tab: Callable[..., Any], photos: Path) -> None:
    page = tab()
    focused = "document.activeElement.innerText || document.activeElement.getAttribute('aria-label')"
    reached: list[str] = []
    while not reached or reached[-1] != "jpeg.jpg":
        page.keyboard.press("Tab")
        reached.append(str(page.evaluate(focused)).strip())
        assert len(reached) < 40, reached
    page.keyboard.press("Enter")
    page.locator("#photos").get_by_text("jpeg").first.wait_for()
    while reached[-1] != "Restore":
        page.keyboard.press("Tab")
        reached.append(str(page.evaluate(focused)).strip())
        assert len(reached) < 80, reached
    page.keyboard.press("Enter")
    page.locator("#status").get_by_text("1 restored").wait_for()
    while not reached[-1].startswith("How much of the photo before"):
        page.keyboard.press("Tab")
        reached.append(str(page.evaluate(focused)).strip())
        assert len(reached) < 120, reached
    page.keyboard.press("End")
    assert page.locator("#viewer .cut").input_value() == "100"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_labels_and_roles_are_right(
    tab: Callable[..., Any], photos: Path, scheme: str, tmp_path: Path
) -> None:
    page = tab(color_scheme=scheme)
    accessible(page)
    page.locator("#examples").get_by_text("haze.png", exact=True).click()
    page.locator("#photos").get_by_text("haze").first.wait_for()
    restore(page)
    accessible(page)
    if scheme == "light":
        page.locator("#viewer img.after").evaluate("it => it.decode()")
        wanted = os.environ.get(SCREENSHOT)
        path = Path(wanted) if wanted else tmp_path / "web.png"
        page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_24_megapixels_stay_within_the_memory(chromium: Any, tiny_model: R2R, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    photo = np.tile(data.coffee(), (10, 10, 1))[:4000, :6000]
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=80)
    (tmp_path / "temporary").mkdir()
    with serving(tmp_path / "temporary", "--memory", 1.6, "--model", tmp_path / "model") as (found, process):
        context = chromium.new_context(http_credentials={"username": "", "password": PASSWORD})
        page = context.new_page()
        page.goto(found)
        page.get_by_role("button", name="Restore").wait_for()
        drop(page, tmp_path / "photo.jpg")
        page.set_default_timeout(500_000)
        assert "1 restored" in restore(page)
        assert "tiles" in page.locator("#found caption").inner_text()
        shown = page.locator("#viewer img.after")
        assert shown.evaluate("async (it) => { await it.decode(); return it.naturalWidth }") == 6000
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
        assert int(peak) * 1024 < 1.6e9
        context.close()


def refused(*options: object, code: str = "from r2r.cli import main; main()") -> str:
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'r2r'; {code}", "web", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_a_job_that_waits_when_its_tab_is_closed_does_nothing(tiny_model: R2R, tmp_path: Path) -> None:
    sessions = Sessions(tiny_model, tmp_path / "served", memory=None, max_pixels=10**6)
    photo = tmp_path / "photo.png"
    Image.fromarray(data.chelsea()[:48, :64]).save(photo)
    assert [progress.done for progress in sessions.restore("open", [photo], ["derain"], 1.0)][-1] == 1
    sessions.close("open")
    sessions.close("other")
    assert list(sessions.restore("open", [photo], ["derain"], 1.0)) == []
    assert list(sessions.restore("other", [photo], ["derain"], 1.0)) == []
    assert [path for path in (tmp_path / "served").rglob("*") if path.is_file()] == []
    assert photo.exists()  # an example, which belongs to no tab


def test_bad_input_is_told_in_one_line() -> None:
    assert "--host 0.0.0.0 lets others reach the page: give --password too" in refused("--host", "0.0.0.0")
    assert "no address of this machine" in refused("--host", "no such host")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused("--port", taken.getsockname()[1])
    assert "cannot be had (Address already in use); choose another one with --port" in said
    without = "sys.modules['gradio'] = None; from r2r.cli import main; main()"
    said = refused("--port", free_port(), code=without)
    assert said == "error: this needs the package gradio: pip install 'r2r-restore[web]'"
