"""Photos are restored whole, whatever their size and kind, and folders of them with a true report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms

from r2r import R2R, InputError, restoration
from r2r.data.images import Photo, read_photo, write_photo, write_rgb
from r2r.restoration import REPORT, plan_outputs, restore_files, restore_photo

PHOTO = skimage.data.astronaut()[:400, 60:480] / np.float32(255)
SMALL = PHOTO[:40, 100:150]


def memory_for(side: int) -> int:
    """Just enough memory for the fixture's models to restore tiles of this side."""
    return 84 * 4 * side**2  # 84 bytes for each pixel and channel of the first level, of which they have 4


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (17, 3), (1, 70), (48, 64)])
def test_any_size_is_restored_as_the_model_does(tiny_model: R2R, size: tuple[int, int]) -> None:
    pixels = PHOTO[: size[0], : size[1]]
    restored = restore_photo(tiny_model, pixels)
    lq = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    expected = tiny_model.restore(lq)
    assert restored.pixels.dtype == np.float32
    assert restored.pixels.shape == pixels.shape
    assert np.allclose(restored.pixels, expected.image[0].clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-6)
    assert restored.tasks == (tiny_model.tasks[int(expected.task)],)
    assert list(restored.scores.values()) == pytest.approx(expected.scores[0].tolist())
    assert restored.tiles == 1


def test_a_told_task_takes_part(tiny_model: R2R) -> None:
    results = {task: restore_photo(tiny_model, SMALL, task) for task in tiny_model.tasks}
    assert all(result.tasks == (task,) for task, result in results.items())
    assert len({result.pixels.tobytes() for result in results.values()}) == 3


def test_tiles_show_no_seams_and_share_one_query(tiny_model: R2R) -> None:
    whole = restore_photo(tiny_model, PHOTO)
    matched: list[torch.Size] = []
    tiny_model.retrieval.register_forward_hook(lambda module, given, made: matched.append(given[0].shape))
    tiled = restore_photo(tiny_model, PHOTO, memory=memory_for(192))
    assert len(matched) == 1
    assert whole.tiles == 1
    assert tiled.tiles == 9
    change = np.abs(whole.pixels - PHOTO).mean()
    difference = np.abs(tiled.pixels - whole.pixels)
    assert change > 0.02  # the model does something that tiles could get wrong
    assert difference.mean() < 0.01 * change
    assert difference.max() < 0.1 * change
    assert tiled.tasks == whole.tasks
    assert list(tiled.scores.values()) == pytest.approx(list(whole.scores.values()), rel=0.01)


@pytest.mark.parametrize("length", [192, 208, 640, 896, 1024, 4000, 6000])
@pytest.mark.parametrize("side", [192, 208, 544, 880])
def test_windows_cover_a_side_and_repeat_no_more_than_their_overlap(length: int, side: int) -> None:
    windows = restoration._windows(length, side, 16)
    total = torch.zeros(length)
    for start, stop, weight in windows:
        assert 0 <= start < stop <= length
        assert min(side, length, restoration._SMALLEST_TILE) <= stop - start <= side
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(length))
    shared = [before.stop - after.start for before, after in itertools.pairwise(windows)]
    assert all(overlap >= restoration.OVERLAP for overlap in shared)
    if windows[0].stop > restoration._SMALLEST_TILE:
        assert sum(window.stop - window.start for window in windows) <= length + len(windows) * (
            restoration.OVERLAP + 16
        )


def test_without_channel_attention_a_tiled_query_and_result_are_those_of_the_whole(tiny_model: R2R) -> None:
    # With attention that does not depend on the image a tile differs from the whole only through its borders, which
    # the overlap keeps out but for the deepest levels' reach.
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if ".sca." in name and name.endswith("weight"):
                parameter.zero_()
    whole = restore_photo(tiny_model, PHOTO)
    tiled = restore_photo(tiny_model, PHOTO, memory=memory_for(224))
    assert tiled.tiles > 1
    assert np.abs(tiled.pixels - whole.pixels).max() < 2e-3
    assert list(tiled.scores.values()) == pytest.approx(list(whole.scores.values()), rel=1e-3)


def test_a_strip_needs_no_tiles_and_a_long_one_is_cut_along_one_side(tiny_model: R2R) -> None:
    memory = memory_for(192)
    assert restore_photo(tiny_model, PHOTO[:64], memory=memory).tiles == 1
    strip = np.tile(PHOTO[:100], (1, 2, 1))
    tiled = restore_photo(tiny_model, strip, memory=memory)
    assert tiled.tiles > 1
    assert np.abs(tiled.pixels - restore_photo(tiny_model, strip).pixels).mean() < 2e-3


def test_what_the_first_pass_made_is_kept_as_far_as_the_memory_reaches(
    tiny_model: R2R, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = memory_for(192)
    wanted = restore_photo(tiny_model, PHOTO, memory=tile)
    encoded: list[torch.Size] = []
    tiny_model.encoder.register_forward_hook(lambda module, given, made: encoded.append(given[0].shape))
    monkeypatch.setattr(restoration, "_DEFAULT_MEMORY", tile)
    # From 4 channels, doubled on each of five levels, a tile's features are 7.75 floats a pixel: four times that.
    for kept, number in ((0, 18), (4 * 31 * 192**2, 14), (2**32, 9)):
        encoded.clear()
        monkeypatch.setattr(restoration, "_free_memory", lambda device, kept=kept: 2 * (tile + kept))
        restored = restore_photo(tiny_model, PHOTO)
        assert len(encoded) == number
        assert (restored.tiles, restored.pixels.tobytes()) == (9, wanted.pixels.tobytes())


def test_mixtures_name_every_task_that_took_part(tiny_model: R2R) -> None:
    model = R2R(**{**tiny_model.config, "mixtures": True})
    model.load_state_dict(tiny_model.state_dict())
    with torch.no_grad():
        query, _ = model.query(model.encode(torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)[None]).deep)
        model.bank.keys.copy_(torch.nn.functional.adaptive_avg_pool2d(query, model.bank.size))
        model.bank.keys[1].neg_()  # a task that is the very opposite of this photo's
    for memory, tiles in ((None, 1), (memory_for(192), 9)):
        restored = restore_photo(model.eval(), PHOTO, memory=memory)
        assert restored.tasks == ("denoise", "dehaze")
        assert (restored.scores["denoise"] > 0) > (restored.scores["derain"] > 0)
        assert restored.tiles == tiles
    mask = torch.tensor([[True, True, False]])
    assert restore_photo(model, SMALL, mask).tasks == ("denoise", "derain")


@pytest.mark.parametrize(
    ("pixels", "line"),
    [
        (PHOTO[..., 0], r"must be \[H, W, 3\].*got \[400, 420\]"),
        (PHOTO[:0], r"H, W >= 1, got \[0, 420, 3\]"),
        (PHOTO[:8] * 2, r"in \[0, 1\]"),
        (PHOTO[:8] * np.float32(np.nan), r"in \[0, 1\], got others or NaN"),
    ],
)
def test_bad_pixels(tiny_model: R2R, pixels: np.ndarray, line: str) -> None:
    with pytest.raises(InputError, match=line):
        restore_photo(tiny_model, pixels)


def test_too_little_memory(tiny_model: R2R, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="memory of 1000 bytes; this model needs 12386304 or more"):
        restore_photo(tiny_model, PHOTO, memory=1000)
    write_rgb(tmp_path / "a.png", SMALL)
    with pytest.raises(InputError, match="memory of 1000 bytes"):
        restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", memory=1000)
    assert not (tmp_path / "out").exists()


def test_files_keep_what_they_are(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = np.linspace(0, 1, 50, dtype=np.float32)[None].repeat(40, 0)
    grey = SMALL[..., [1, 1, 1]]
    kinds = {
        "deep.png": Photo(SMALL, bit_depth=16),
        "deep.tif": Photo(SMALL, bit_depth=16, icc=icc),
        "grey.jpg": Photo(grey, grey=True),
        "sub/rgba.png": Photo(SMALL, alpha=alpha, icc=icc),
        "sub/turned.jpg": Photo(SMALL, orientation=6, exif=exif(6)),
    }
    for name, photo in kinds.items():
        write_photo(photos / name, photo.pixels, photo)
    report = restore_files(tiny_model, [photos], out)
    assert (report.failed, report.complete) == (0, True)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == sorted([*kinds, REPORT])
    for name, photo in kinds.items():
        given, made = read_photo(photos / name), read_photo(out / name)
        assert (made.bit_depth, made.grey, made.orientation) == (photo.bit_depth, photo.grey, photo.orientation), name
        assert (made.icc, made.exif) == (given.icc, given.exif), name
        assert (made.alpha is None) == (photo.alpha is None), name
        if made.alpha is not None and given.alpha is not None:
            assert np.array_equal(made.alpha, given.alpha)  # untouched
        expected = restore_photo(tiny_model, given.pixels).pixels
        expected = expected.mean(axis=2, keepdims=True) if photo.grey else expected
        tolerance = {".jpg": 0.02, ".png": 0.5 / 255, ".tif": 0.5 / 65535}[Path(name).suffix]
        error = np.abs(made.pixels - expected)
        assert (error.mean() if name.endswith(".jpg") else error.max()) < 1.01 * tolerance, name
    with Image.open(out / "sub/turned.jpg") as image:  # rows as in the input, turned by its tag
        assert (image.size, image.getexif()[274]) == ((40, 50), 6)


def test_a_broken_file_is_reported_and_does_not_stop_the_rest(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_rgb(photos / "a.png", SMALL)
    write_rgb(photos / "c.png", SMALL[:17, :3])
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes()[:500])
    seen = []
    report = restore_files(tiny_model, [photos], out, progress=lambda result, total: seen.append((result.input, total)))
    assert report.failed == 1
    assert seen == [(str(photos / name), 3) for name in ("a.png", "b.png", "c.png")]
    written = json.loads((out / REPORT).read_text())
    assert written["complete"] is True
    good, broken, last = written["files"]
    assert broken["error"].startswith(f"{photos / 'b.png'}: damaged or cut short")
    assert broken["tasks"] == []
    assert not (out / "b.png").exists()
    assert (last["height"], last["width"], last["error"]) == (17, 3, None)
    assert good["output"] == str(out / "a.png")
    assert good["tasks"] == [max(good["scores"], key=good["scores"].get)]
    assert set(good["scores"]) == set(tiny_model.tasks)
    assert good["seconds"] > 0


def test_an_interrupted_run_leaves_a_true_report_and_no_half_file(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("a.png", "b.png", "c.png"):
        write_rgb(photos / name, SMALL)
    restore_files(tiny_model, [photos], out)  # whose report must not outlive the next run

    def interrupt(*_: object) -> None:
        killed_now = json.loads((out / REPORT).read_text())
        assert killed_now == {"files": [], "complete": False}
        raise KeyboardInterrupt

    for name in ("a.png", "b.png", "c.png"):
        (out / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        restore_files(tiny_model, [photos], out, progress=interrupt)
    written = json.loads((out / REPORT).read_text())
    assert written["complete"] is False
    assert [Path(result["output"]).name for result in written["files"]] == ["a.png"]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", REPORT]


def test_an_output_that_cannot_be_written_is_reported(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "a.png", SMALL)
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    report = restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out")
    assert report.failed == 1
    assert report.files[0].error == f"cannot write {tmp_path / 'out' / 'a.png'}: Is a directory"


def test_scores_of_an_empty_task_are_null_in_the_report(tiny_model: R2R, tmp_path: Path) -> None:
    tiny_model.bank.counts[1] = 0
    write_rgb(tmp_path / "a.png", SMALL)
    restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out")
    scores = json.loads((tmp_path / "out" / REPORT).read_text())["files"][0]["scores"]
    assert scores["derain"] is None
    assert scores["denoise"] is not None


def test_the_plan_keeps_folders_and_skips_what_lies_in_out(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/sub/b.jpg", "in/out/a.png", "single.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "in" / "out"
    plan = plan_outputs([tmp_path / "in", tmp_path / "single.tif", tmp_path / "in" / "a.png"], out)
    assert plan == [
        (tmp_path / "in/a.png", out / "a.png"),
        (tmp_path / "in/sub/b.jpg", out / "sub/b.jpg"),
        (tmp_path / "single.tif", out / "single.tif"),
    ]


def test_plans_that_would_lose_something_are_refused(tiny_model: R2R, tmp_path: Path) -> None:
    for name in ("one/a.png", "two/a.png", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rgb(tmp_path / name, SMALL) if name.endswith("png") else (tmp_path / name).touch()
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    before = (one / "a.png").read_bytes()
    for inputs, target, line in (
        ([one, two], out, r"one/a\.png and .*two/a\.png would both be written to .*out/a\.png"),
        ([one / "a.png"], one, r"one/a\.png would be replaced by an output"),
        ([one / "a.png", two / "a.png"], one, "would both be written"),
        ([two / "a.png", one], one, r"one: no image in it"),
        ([tmp_path / "empty"], out, "empty: no image in it; accepted: .png"),
        ([tmp_path / "empty/notes.txt"], out, r"notes\.txt: not an image; accepted: \.png"),
        ([tmp_path / "nowhere"], out, "nowhere: no such file or folder"),
        ([], out, "no input; accepted: image files"),
    ):
        with pytest.raises(InputError, match=line):
            restore_files(tiny_model, inputs, target)
    assert (one / "a.png").read_bytes() == before
    assert not out.exists()


def test_a_bad_task_and_an_empty_bank_are_told_before_any_work(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "a.png", SMALL)
    with pytest.raises(InputError, match="unknown task 'desnow'; the model knows denoise, derain, dehaze"):
        restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", task="desnow")
    new = R2R(tasks=("a",), width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1), memory_blocks=(1, 1), capacity=5)
    with pytest.raises(InputError, match="the bank is empty"):
        restore_files(new, [tmp_path / "a.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
