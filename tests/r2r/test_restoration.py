"""Files of every kind are restored, and folders of them with a true report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms

from r2r import R2R, InputError
from r2r.data.images import Photo, read_photo, write_photo, write_rgb
from r2r.restoration import REPORT, plan_outputs, restore_files
from r2r.tiling import restore_photo

PHOTO = skimage.data.astronaut()[:400, 60:480] / np.float32(255)
SMALL = PHOTO[:40, 100:150]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


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
