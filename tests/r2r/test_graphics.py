"""Screenshots, charts and cartoons are told from photos, and nothing is looked for in them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from skimage import data

from r2r import R2R
from r2r.graphics import is_graphic
from r2r.restoration import restore_files
from r2r.terminal import RestorationDisplay
from r2r.tiling import restore_photo, restore_together
from tests.conftest import finding_nothing, whole_and_tiled

PHOTOS = {"coffee": data.coffee(), "chelsea": data.chelsea(), "rocket": data.rocket(), "retina": data.retina()[:600]}


def screenshot(dark: bool = False) -> np.ndarray:
    image = Image.new("RGB", (640, 400), (30, 30, 36) if dark else "white")
    draw = ImageDraw.Draw(image)
    for line in range(30):
        draw.text((20, 12 * line + 10), "The quick brown fox jumps over it. " * 2, fill=(200, 200, (line * 37) % 255))
    return np.array(image)


def cartoon() -> np.ndarray:
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (450, 350), (120, 190, 240))
    for x, y, radius, *colour in rng.integers(0, [450, 350, 60, 255, 255, 255], (30, 6)).tolist():
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
    return np.array(image)


def table() -> np.ndarray:
    """Its rows are 16 pixels apart, as the blocks of a JPEG file are."""
    image = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(image)
    for row in range(0, 400, 16):
        draw.rectangle((0, row, 640, row + 7), fill=(238, 238, 255))
        draw.text((20, row), "1.25   17.0   33.1   48.2   ", fill=(20, 20, 20))
    return np.array(image)


def product() -> np.ndarray:
    """A photo before a white background."""
    image = np.full((600, 800, 3), 255, np.uint8)
    image[150:450, 250:550] = data.astronaut()[:300, :300]
    return image


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=pixels.shape) * sigma
    return (pixels + noise).clip(0, 255).round().astype(np.uint8)


GRAPHICS = {"screenshot": screenshot(), "dark": screenshot(dark=True), "cartoon": cartoon(), "table": table()}


@pytest.mark.parametrize("name", GRAPHICS)
def test_graphics_are_graphics_in_every_form(name: str) -> None:
    pixels = GRAPHICS[name]
    assert is_graphic(pixels)
    assert is_graphic(pixels.astype(np.uint16) * 257)
    assert is_graphic(pixels.astype(np.float32) / 255)
    assert is_graphic(np.asfortranarray(pixels))
    assert is_graphic(pixels[:, :, 1:2])
    assert is_graphic(pixels[::-1, 5:])
    assert not is_graphic(noisy(pixels, 3))
    assert not is_graphic(jpeg(pixels, 30))  # what compression did to it may be undone


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_are_none_whatever_became_of_them(name: str) -> None:
    photo = PHOTOS[name]
    ways = [photo, noisy(photo, 3), noisy(photo, 50), (photo * 0.15).round(), (photo * 0.05).round()]
    ways += [photo * 0.1 + 200, np.where(photo > 128, 255, photo)]  # hazy, overexposed
    for pixels in (one.astype(np.uint8) for one in ways):
        assert not is_graphic(pixels)
        for quality in (5, 10, 20, 40, 75, 95):
            compressed = jpeg(pixels, quality)
            if np.ptp(compressed[8:, 8:]):  # of a dark one there may be nothing left
                cut = [compressed[start:, 2 * start :] for start in range(4)]
                assert not any(map(is_graphic, cut))


def test_photos_before_white_are_none_once_something_is_wrong() -> None:
    photo = product()
    assert not is_graphic(noisy(photo, 3))
    assert [quality for quality in (5, 10, 20, 40, 60) if is_graphic(jpeg(photo, quality))] == []


@pytest.mark.parametrize("sigma", [3, 10, 25, 50])
@pytest.mark.parametrize("name", PHOTOS)
def test_a_noisy_photo_that_was_cut_out_is_none(name: str, sigma: float) -> None:
    photo = noisy(PHOTOS[name], sigma)
    height, width = photo.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    inside = (x**2 + y**2 < 0.36)[..., None]
    bars = (abs(x) < 0.3)[..., None]
    for ground in (0, 255):
        assert not is_graphic(np.where(inside, photo, np.uint8(ground)))
        assert not is_graphic(np.where(bars, photo, np.uint8(ground)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (5, 8), (9, 9), (40, 3)])
def test_one_colour_is_one_and_too_little_to_tell_is_none(shape: tuple[int, int]) -> None:
    assert is_graphic(np.zeros((*shape, 3), np.uint8))
    assert is_graphic(np.full((*shape, 1), 0.5, np.float32))
    if np.prod(shape) > 1:
        spot = np.full((*shape, 3), 90, np.uint8)
        spot[-1, -1] = 91
        assert not is_graphic(spot)


def test_what_transparency_hides_does_not_count() -> None:
    drawn, photo = cartoon(), PHOTOS["coffee"][:350, :450]
    visible = np.zeros(photo.shape[:2], bool)
    visible[60:300, 100:350] = True
    both = np.where(visible[..., None], drawn, photo)
    assert not is_graphic(both)
    assert is_graphic(both, visible)
    assert not is_graphic(both, ~visible)
    assert is_graphic(drawn, np.zeros_like(visible))  # nothing is seen


@pytest.fixture
def model() -> R2R:
    """Takes everything for noisy."""
    model = finding_nothing(mixtures=True)
    model.bank.offset[0] += 200
    return model


def test_blind_graphics_stay_as_they_are(model: R2R) -> None:
    pixels, photo = screenshot(), PHOTOS["coffee"][:400, :300].repeat(3, axis=1)[:, :640]
    for given, graphic in ((pixels, True), (photo, False)):
        for restored in whole_and_tiled(model, given) if not graphic else [restore_photo(model, given)]:
            assert restored.graphic == graphic
            assert np.array_equal(restored.pixels, given) == graphic
            assert (restored.tasks, bool(restored.scores)) == (() if graphic else ("denoise",), not graphic)
    first, second = restore_together(model, [pixels, photo], None, [np.empty_like(pixels), np.empty_like(photo)], 1.0)
    assert (first.graphic, second.graphic) == (True, False)
    assert np.array_equal(first.pixels, pixels)
    assert np.abs(second.pixels.astype(int) - restore_photo(model, photo).pixels).max() <= 1
    assert restore_together(model, [pixels], None, [np.empty_like(pixels)], 1.0)[0].graphic


def test_the_file_of_a_graphic_is_copied_and_the_report_says_why(
    model: R2R, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, pixels in (("screen", screenshot()), ("photo", PHOTOS["coffee"]), ("screen too", screenshot(dark=True))):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    display = RestorationDisplay()
    restore_files(model, [tmp_path / "in"], tmp_path / "out", progress=display.show)
    for name, same in (("screen", True), ("screen too", True), ("photo", False)):
        given, written = ((tmp_path / folder / f"{name}.png").read_bytes() for folder in ("in", "out"))
        assert (given == written) == same
    files = json.loads((tmp_path / "out" / "report.json").read_text())["files"]
    assert {Path(one["input"]).stem: one["graphic"] for one in files} == {
        "screen": True,
        "screen too": True,
        "photo": False,
    }
    said = capsys.readouterr().out
    assert said.count("a graphic, left as it is in ") == 2
    assert said.count("denoise (denoise 100%") == 1


def test_a_graphic_is_restored_where_somebody_asks_or_the_model_always_names_a_task(model: R2R) -> None:
    pixels = screenshot()
    told = restore_photo(model, pixels, "denoise")
    assert (told.tasks, told.graphic) == (("denoise",), False)
    assert not np.array_equal(told.pixels, pixels)
    single = finding_nothing()
    assert len(restore_photo(single, pixels).tasks) == 1


def test_the_border_of_a_photo_with_transparency_makes_no_graphic_of_it(model: R2R) -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (400, 600, 3)).astype(np.uint8)
    visible = rng.random(photo.shape[:2]) < 0.002
    visible |= np.roll(visible, 1, axis=0) | np.roll(visible, 1, axis=1)
    nearest = distance_transform_edt(~visible, return_distances=False, return_indices=True)
    assert is_graphic(photo[tuple(nearest)])  # which is what the model sees
    restored = restore_photo(model, photo, visible=visible)
    assert (restored.graphic, restored.tasks) == (False, ("denoise",))
    screen = screenshot()
    hidden = np.ones(screen.shape[:2], bool)
    hidden[:, 600:] = False
    left = restore_photo(model, screen, visible=hidden)
    assert left.graphic
    assert np.array_equal(left.pixels, screen)
