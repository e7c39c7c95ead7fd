"""Exported files are run where they are to run, in ONNX Runtime and OpenVINO, and give the model's answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from r2r import R2R, InputError
from r2r.export import METADATA, export, metadata
from tests.conftest import TINY, fill_randomly

pytestmark = pytest.mark.timeout(1800)  # tracing takes a minute of processor time

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

SIZES = (
    (1, 48, 64),
    (3, 33, 70),
    (2, 96, 17),
    (1, 32, 32),
    (1, 17, 130),
    (1, 128, 128),
    (4, 65, 40),
    (1, 560, 40),
    (2, 5, 9),
    (1, 1, 1),
)
TASKS = ("denoise", "derain", "dehaze")
DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDE, BROWSER = DOCS / "deploy.md", DOCS / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made(**sizes: Any) -> R2R:
    """A model that finds several things, one, or nothing in random images."""
    torch.manual_seed(0)
    model = R2R(tasks=TASKS, **{**TINY, "mixtures": True, **sizes})
    fill_randomly(model)
    model.bank.offset -= torch.tensor([2.0, 1.27, 2.1])  # what random images score, more or less
    return model.eval()


@pytest.fixture(scope="module")
def model() -> R2R:
    return made()


@pytest.fixture(scope="module")
def file(model: R2R, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export(model, path)
    return path


def onnx_runtime(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return lambda lq: session.run(None, {"lq": lq})[0]


def openvino(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda lq: compiled(lq)[0]


def agrees(model: R2R, run: Callable[[np.ndarray], np.ndarray], half: bool = False, atol: float = 1e-5) -> None:
    found: set[tuple[bool, ...]] = set()
    torch.manual_seed(1)
    for place, (number, height, width) in enumerate(SIZES, 1):
        lq = torch.rand(number, 3, height, width) * place / len(SIZES)
        lq = lq.half().float() if half else lq
        given = lq.half() if half else lq
        restored = run(given.numpy())
        assert restored.dtype == (np.float16 if half else np.float32)
        wanted = model.restore(lq)
        found.update(map(tuple, wanted.task.tolist()))
        np.testing.assert_allclose(restored, wanted.image.numpy(), rtol=0, atol=atol)
    assert {0, len(TASKS)} < set(map(sum, found))  # nothing, everything, and something


@pytest.mark.parametrize("runtime", [onnx_runtime, openvino])
def test_onnx_gives_the_models_answers_at_any_size(
    model: R2R, file: Path, runtime: Callable[[Path], Callable[[np.ndarray], np.ndarray]]
) -> None:
    agrees(model, runtime(file))


def test_onnx_names_its_axes_and_says_what_it_is(model: R2R, file: Path) -> None:
    read = onnx.load(file)
    onnx.checker.check_model(read, full_check=True)
    assert next(one.version for one in read.opset_import if not one.domain) >= 18
    for value, name in ((read.graph.input[0], "lq"), (read.graph.output[0], "restored")):
        assert value.name == name
        sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        assert sizes == ["batch", 3, "height", "width"]
    about = {one.key: one.value for one in read.metadata_props}
    assert about == metadata(model)
    assert about["tasks"] == ",".join(TASKS)
    assert about["fingerprint"] == model.fingerprint()


@pytest.mark.slow
def test_half_precision_is_near(model: R2R, tmp_path: Path) -> None:
    export(model, tmp_path / "half.onnx", half=True)
    agrees(model, onnx_runtime(tmp_path / "half.onnx"), half=True, atol=0.005)
    assert next(model.parameters()).dtype == torch.float32  # the model itself stays as it is


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        {"window": 32},
        {"smooth_tasks": ["derain"]},
        {"light_tasks": ["derain"]},
        {"strengths": {"derain": 0.6, "dehaze": 0.1}},
    ],
    ids=["windows", "smooth tasks", "tasks of light", "strengths"],
)
def test_what_models_do_when_they_restore_is_exported_too(tmp_path: Path, what: Any) -> None:
    special = made(**what)
    export(special, tmp_path / "special.onnx")
    for runtime in (onnx_runtime, openvino):
        agrees(special, runtime(tmp_path / "special.onnx"))


@pytest.mark.slow
def test_a_program_says_what_it_is_and_gives_the_models_answers(model: R2R, tmp_path: Path) -> None:
    export(model, tmp_path / "model.pt2")
    extra = {METADATA: ""}
    loaded = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra[METADATA]) == metadata(model)
    agrees(model, lambda lq: loaded(torch.from_numpy(lq)).detach().numpy())
    runs("PyTorch without this package", tmp_path)


@pytest.mark.parametrize("runtime", ["ONNX Runtime", "OpenVINO"])
def test_the_guides_snippets_run(file: Path, runtime: str) -> None:
    runs(runtime, file.parent)


def runs(section: str, folder: Path) -> None:
    """Runs a section's snippet of the guide beside the exported file."""
    text = GUIDE.read_text(encoding="utf-8").split(f"## {section}\n", 1)[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.fromarray(data.coffee()[:50, :70]).save(folder / "photo.png")
    (folder / "restored.png").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "restored.png") as restored:
        assert restored.size == (70, 50)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write, as Linux has")
def test_a_file_that_cannot_be_written_costs_no_tracing(model: R2R, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r2r.export.program", lambda model: pytest.fail("work began that would have been lost"))
    with pytest.raises(InputError, match=r"cannot write .*model\.pt2"):
        export(model, "/proc/self/model.pt2")


def test_missing_packages_are_named(model: R2R, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r2r.export.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"ONNX needs onnx and onnxscript: pip install 'r2r-restore\[onnx\]'"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def browser_page(file: Path, tmp_path: Path) -> Iterator[Any]:
    """docs/browser with a model's file, in Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need Playwright")
    packages = BROWSER / "node_modules"
    if CHROMIUM is None or not packages.is_dir():
        pytest.skip("needs Chromium, and onnxruntime-web: npm install --prefix docs/browser")
    for one in (BROWSER / "index.html", packages, file):
        (tmp_path / one.name).symlink_to(one)
    handler = partial(Quiet, directory=str(tmp_path))
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with playwright.sync_playwright() as running, running.chromium.launch(**options) as browser:
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            yield page
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_page_restores_as_python_does(model: R2R, browser_page: Any, tmp_path: Path) -> None:
    photo = data.coffee()[:256, :256]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    asked: list[str] = []
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.set_input_files("#photo", str(tmp_path / "photo.png"))
    browser_page.get_by_text("photo.png: restored in").wait_for(timeout=120_000)
    with browser_page.expect_download() as download:
        browser_page.click("#download")
    restored = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    lq = torch.from_numpy(photo / np.float32(255)).permute(2, 0, 1)[None]
    wanted = (255 * model.restore(lq).image[0].permute(1, 2, 0).clamp(0, 1)).round().int().numpy()
    assert np.abs(wanted - photo).mean() > 5  # the model does something
    assert np.abs(restored - wanted).max() <= 1
    assert all(url.startswith((browser_page.url, "blob:")) for url in asked)

    (tmp_path / "no.png").write_text("no image")
    browser_page.set_input_files("#photo", str(tmp_path / "no.png"))
    browser_page.get_by_text("Failed: no.png: no image that this browser knows").wait_for()
