"""The first look: photos of installed packages, degraded and restored by the model that comes along, on one page."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from skimage import data

from r2r import R2R, fast
from r2r.compare import figure, write_page
from r2r.data.degradations import parse_degradation
from r2r.data.images import read_rgb
from r2r.files import atomic_path
from r2r.metrics import MAX_PSNR, psnr
from r2r.report import FileResult
from r2r.restoration import restore_files

KINDS = ("degraded", "restored")  # folders of the demo
LARGE = (2000, 3000)  # height and width of the photo that is restored in tiles, as so much does not go in one piece
ROUNDS = 5  # of timing


@dataclass(frozen=True)
class Case:
    """A photo of scikit-image, what is done to it (a degradation's spec, or nothing), and the file it is saved in."""

    title: str
    photo: str
    degradation: str | None
    file: str
    quality: int | None = None


CASES = (
    Case("noise", "chelsea", "noise:sigma=25", "noise.png"),
    Case("noise inside a JPEG file", "coffee", "noise:sigma=25", "noise_in_jpeg.jpg", 85),
    Case("strong JPEG compression", "astronaut", None, "jpeg.jpg", 12),
    Case("rain", "rocket", "rain:density=4,opacity=0.6", "rain.png"),
    Case("haze", "stereo_motorcycle", "haze:beta=1.2", "haze.png"),
    Case("camera shake", "coffee", "blur:extent=10", "blur.png"),
    Case("low light", "stereo_motorcycle", "lowlight:gain=0.2,gamma=1.4", "low_light.png"),
    Case("nothing wrong", "chelsea", None, "nothing.png"),
    Case("six megapixels in tiles, with noise", "coffee", "noise:sigma=20", "large.jpg", 92),
)


@dataclass(frozen=True)
class Shown:
    """A case restored: the file's result, and the PSNR of the degraded and the restored photo in dB."""

    case: Case
    result: FileResult
    before: float
    after: float

    @property
    def found(self) -> str:
        """In words, with how sure the model is."""
        if not self.result.tasks:
            return "nothing wrong: left as it is"
        return ", ".join(f"{task} {self.result.scores[task]:.0%}" for task in self.result.tasks)

    @property
    def said(self) -> str:
        """One line about it."""
        tiles = f", {self.result.tiles} tiles" if (self.result.tiles or 1) > 1 else ""
        return f"{self.found}; {self.before:.1f} -> {self.after:.1f} dB in {self.result.seconds:.1f} s{tiles}"


def run_demo(out: Path, console: Console, model: str | None = None) -> list[Shown]:
    """Write the photos, the restored ones, `index.html` and `contact_sheet.jpg` into `out`. model: another than the one
    that comes along."""
    clean = write_cases(out / "degraded")
    loaded = fast.R2R.from_pretrained(model)
    assert isinstance(loaded, fast.R2R)
    frozen = loaded.freeze(torch.float32)
    shown: list[Shown] = []

    def add(result: FileResult, total: int) -> None:
        case = next(case for case in CASES if case.file == Path(result.input).name)
        if result.error:
            console.print(f"{case.title}: {result.error}", style="red")
            return
        before, after = (_quality(out / kind / case.file, clean[case.file]) for kind in KINDS)
        shown.append(Shown(case, result, before, after))
        console.print(f"{case.title}: {shown[-1].said}", highlight=False)

    files = [out / "degraded" / case.file for case in CASES]
    restore_files(frozen, files, out / "restored", overwrite=True, progress=add)
    draw_sheet(out / "contact_sheet.jpg", out, shown[:-1])
    plain = R2R(**loaded.config).eval()
    plain.load_state_dict(loaded.state_dict())
    ours, eager = _race(frozen, plain)
    speed = f"one photo of 256 x 256: {ours * 1e3:.0f} ms, {eager / ours:.1f} times as fast as plain PyTorch"
    note = (
        "Photos that come with scikit-image, degraded by this program, and restored by the model that comes with the "
        f"package, which was told nothing. Left of the slider: degraded. Right of it: restored. {speed}."
    )
    figures = []
    for one in shown:
        before, after = (out / kind / one.case.file for kind in KINDS)
        figures.append(figure(before, after, out, f"{one.case.title}: {one.said}"))
    write_page(out / "index.html", "What is wrong was found by the model itself", note, figures)
    console.print(speed, highlight=False)
    console.print(f"look at it: {out / 'index.html'}", highlight=False)
    return shown


def write_cases(folder: Path, cases: Sequence[Case] = CASES) -> dict[str, np.ndarray]:
    """Write degraded photos; the clean ones, float32 [H, W, 3] in [0, 1], by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = {}
    for number, case in enumerate(cases):
        photo = getattr(data, case.photo)()
        photo = photo[0] if isinstance(photo, tuple) else photo
        pixels = photo.astype(np.float32) / 255
        if case is CASES[-1]:
            pixels = cv2.resize(pixels, LARGE[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)
        clean[case.file] = pixels
        if case.degradation:
            pixels = parse_degradation(case.degradation)(pixels, np.random.default_rng(number))
        with atomic_path(folder / case.file) as path:
            quality: dict[str, Any] = {} if case.quality is None else {"quality": case.quality}
            Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).save(path, **quality)
    return clean


def draw_sheet(path: Path, folder: Path, shown: Sequence[Shown]) -> None:
    """One picture of all cases: degraded, restored, and what was found."""
    width, height, text, across = 240, 180, 22, 2
    sheet = Image.new("RGB", (across * (2 * width + 12), math.ceil(len(shown) / across) * (height + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        left, top = number % across * (2 * width + 12), number // across * (height + text)
        for place, kind in enumerate(KINDS):
            with Image.open(folder / kind / one.case.file) as photo:
                sheet.paste(ImageOps.fit(photo.convert("RGB"), (width, height)), (left + place * width, top))
        pen.text((left + 2, top + height + 4), f"{one.case.title}; found: {one.found}", fill="black")
    with atomic_path(path) as beside:
        sheet.save(beside, quality=90)


def _quality(path: Path, clean: np.ndarray) -> float:
    image, target = (torch.tensor(x).permute(2, 0, 1) for x in (read_rgb(path), clean))
    return min(float(psnr(image, target)), MAX_PSNR)


@torch.inference_mode()
def _race(ours: R2R, eager: R2R) -> tuple[float, float]:
    """Seconds for a photo of 256 x 256, the medians of rounds in turns."""
    lq = torch.from_numpy(data.chelsea()[:256, :256].astype(np.float32) / 255).permute(2, 0, 1)[None].contiguous()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):  # the first is warming up
        for model, own in zip((ours, eager), times, strict=True):
            start = time.perf_counter()
            model.restore(lq, model.tasks[0])
            own.append(time.perf_counter() - start)
    first, second = (statistics.median(own[1:]) for own in times)
    return first, second
