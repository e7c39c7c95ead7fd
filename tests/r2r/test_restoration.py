"""Files of every kind are restored, and folders of them with a true report."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms, JpegImagePlugin

from r2r import R2R, InputError, restoration
from r2r.data.images import (
    ACCEPTED,
    read_photo,
    read_rgb,
    to_float,
    write_photo,
    write_rgb,
)
from r2r.data.metadata import Metadata
from r2r.inputs import plan_outputs
from r2r.report import REPORT, FileResult
from r2r.restoration import Settings, restore_files, restore_stream
from r2r.tiling import restore_photo
from tests.conftest import TINY, fill_randomly
from tests.r2r.photos import photo_of

PHOTO = skimage.data.astronaut()[:400, 60:480] / np.float32(255)
SMALL = PHOTO[:40, 100:150]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def test_too_little_memory(tiny_model: R2R, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"memory of 1e-06 GB for the network; this model needs 0\.0124 GB or"):
        restore_photo(tiny_model, PHOTO, memory=1000)
    write_rgb(tmp_path / "a.png", SMALL)
    with pytest.raises(InputError, match=r"--memory of 1e-06 GB, of which the program takes \d+\.\d; memory of"):
        restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", Settings(memory=1000))
    assert not (tmp_path / "out").exists()


def finding_nothing(tiny_model: R2R) -> R2R:
    model = R2R(**{**tiny_model.config, "mixtures": True})
    model.load_state_dict(tiny_model.state_dict())
    model.bank.offset -= 1000
    return model.eval()


def test_photos_with_nothing_wrong_are_copied(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    model = finding_nothing(tiny_model)
    for name in ("a.jpg", "b.png", "c.tif"):
        write_rgb(photos / name, SMALL)
        os.utime(photos / name, (1.5e9, 1.5e9))
    report = restore_files(model, [photos], out)
    assert [file.tasks for file in report.files] == [()] * 3
    for path in photos.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
        assert (out / path.name).stat().st_mtime == 1.5e9
    restore_files(model, [photos / "b.png"], tmp_path / "other", Settings(file_format="JPEG"))
    with Image.open(tmp_path / "other" / "b.jpg") as converted:
        assert converted.format == "JPEG"
    restore_files(model, [photos / "b.png"], tmp_path / "told", Settings("derain"))
    assert (tmp_path / "told" / "b.png").read_bytes() != (photos / "b.png").read_bytes()


def test_strength_is_part_of_what_was_asked_for(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "a.png", SMALL)
    outputs = {}
    for strength in (1.0, 0.0, 0.5):  # into one folder: another strength is another result
        report = restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", Settings(strength=strength))
        assert report.unchanged == 0
        outputs[strength] = to_float(read_photo(tmp_path / "out" / "a.png").pixels)
    assert np.abs(outputs[0.0] - SMALL).max() < 1 / 255
    inside = (outputs[1.0] > 0.01) & (outputs[1.0] < 0.99)  # where nothing was clipped
    assert np.abs(outputs[0.5] - (outputs[0.0] + outputs[1.0]) / 2)[inside].max() < 2 / 255
    with pytest.raises(InputError, match="strength"):
        restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", Settings(strength=1.5))


def test_files_keep_what_they_are(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = np.linspace(0, 1, 50, dtype=np.float32)[None].repeat(40, 0)
    grey = SMALL[..., [1, 1, 1]]
    kinds = {
        "deep.png": photo_of("png", SMALL, bits=16),
        "deep.tif": photo_of("tif", SMALL, bits=16, metadata=Metadata(icc=icc)),
        "grey.jpg": photo_of("jpg", grey, grey=True),
        "sub/rgba.png": photo_of("png", SMALL, alpha, metadata=Metadata(icc=icc)),
        "sub/turned.jpg": photo_of("jpg", SMALL, orientation=6, metadata=Metadata(exif=exif(6))),
    }
    for name, photo in kinds.items():
        write_photo(photos / name, photo)
    report = restore_files(tiny_model, [photos], out)
    assert (report.failed, report.complete) == (0, True)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == sorted([*kinds, REPORT])
    for name, photo in kinds.items():
        given, made = read_photo(photos / name), read_photo(out / name)
        assert (made.bit_depth, made.grey, made.orientation) == (photo.bit_depth, photo.grey, photo.orientation), name
        assert made.metadata == given.metadata, name
        assert (made.alpha is None) == (photo.alpha is None), name
        if made.alpha is not None and given.alpha is not None:
            assert np.array_equal(made.alpha, given.alpha)  # untouched
        visible = None if given.alpha is None else given.alpha > 0
        expected = to_float(restore_photo(tiny_model, given.pixels, visible=visible).pixels)
        tolerance = {".jpg": 0.02, ".png": 0.5 / 255, ".tif": 0.5 / 65535}[Path(name).suffix]
        error = np.abs(to_float(made.pixels) - expected)
        assert (error.mean() if name.endswith(".jpg") else error.max()) < 1.01 * tolerance, name
    with Image.open(out / "sub/turned.jpg") as image:  # rows as in the input, turned by its tag
        assert (image.size, image.getexif()[274]) == ((50, 40), 6)


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
    assert broken["error"].startswith("damaged or cut short")
    assert broken["tasks"] == []
    assert not (out / "b.png").exists()
    assert (last["height"], last["width"], last["error"]) == (17, 3, None)
    assert good["output"] == str(out / "a.png")
    assert good["tasks"] == [max(good["scores"], key=good["scores"].get)]
    assert set(good["scores"]) == set(tiny_model.tasks)
    assert good["seconds"] > 0


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_a_true_report_and_goes_on_where_it_stopped(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    names = [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        write_rgb(photos / name, SMALL[number // 2 :])  # two of a size go together
    with pytest.raises(KeyboardInterrupt):
        restore_files(tiny_model, [photos], out, progress=interrupted)
    stopped = json.loads((out / REPORT).read_text())
    done = [Path(result["output"]).name for result in stopped["files"]]
    assert stopped["complete"] is False
    assert done == names[: len(done)]
    assert 1 <= len(done) < len(names)
    assert sorted(path.name for path in out.iterdir()) == [*done, REPORT]
    before = {name: (out / name).stat().st_ino for name in done}

    again: list[str] = []
    report = restore_files(tiny_model, [photos], out, progress=lambda result, total: again.append(result.input))
    assert again == [str(photos / name) for name in names[len(done) :]]
    assert (report.unchanged, report.restored, report.failed) == (len(done), len(names) - len(done), 0)
    assert {name: (out / name).stat().st_ino for name in done} == before
    written = json.loads((out / REPORT).read_text())
    assert sorted(Path(result["output"]).name for result in written["files"]) == names
    assert written["complete"] is True


def test_what_has_changed_is_done_again_and_overwrite_does_all(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("a.png", "b.png", "c.png"):
        write_rgb(photos / name, SMALL)

    def done(overwrite: bool = False, **how: Any) -> list[str]:
        seen: list[str] = []
        restore_files(
            tiny_model, [photos], out, Settings(**how), overwrite, lambda one, total: seen.append(Path(one.input).name)
        )
        return seen

    assert done() == ["a.png", "b.png", "c.png"]
    assert done() == []
    os.utime(photos / "a.png", ns=(1, 1))
    write_rgb(photos / "b.png", SMALL[:30])
    assert done() == ["a.png", "b.png"]
    (out / "c.png").unlink()
    assert done() == ["c.png"]
    assert done(overwrite=True) == ["a.png", "b.png", "c.png"]
    assert done(task="derain") == ["a.png", "b.png", "c.png"]
    assert done(task="derain", file_format="JPEG", quality=80) == ["a.png", "b.png", "c.png"]
    assert done(task="derain", file_format="JPEG", quality=80) == []
    with torch.no_grad():
        tiny_model.intro.weight[0, 0, 0, 0] += 1
    assert done(task="derain", file_format="JPEG", quality=80) == ["a.png", "b.png", "c.png"]
    text = (out / REPORT).read_text()
    (out / REPORT).write_text(text[: text.rindex("b.png")])
    for name in ("b.jpg", "c.jpg"):  # of which nothing is known now
        with pytest.raises(InputError, match=rf"{name} is there, and was not made of"):
            done(task="derain", file_format="JPEG", quality=80)
        (out / name).unlink()
    assert done(task="derain", file_format="JPEG", quality=80) == ["b.png", "c.png"]
    numbers = re.sub(r'"name": "[^"]*"', '"name": 5', (out / REPORT).read_text())
    for damaged in (b"\xff\x00nonsense", numbers.encode()):
        (out / REPORT).write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.jpg is there, and was not made of .*a\.png"):
            done(task="derain", file_format="JPEG", quality=80)
    assert done(overwrite=True, task="derain", file_format="JPEG", quality=80) == ["a.png", "b.png", "c.png"]


def test_the_report_is_true_while_the_run_goes_on(tiny_model: R2R, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(4):
        write_rgb(photos / f"{number}.png", SMALL)
    (photos / "film.gif").touch()

    def look(result: FileResult, total: int) -> None:
        now = json.loads((out / REPORT).read_text())
        assert result.input in [one["input"] for one in now["files"]]
        assert now["complete"] is False
        assert now["skipped"] == [{"input": str(photos / "film.gif"), "reason": f".gif is not read; {ACCEPTED}"}]
        assert all(Path(one["output"]).exists() for one in now["files"])

    report = restore_files(tiny_model, [photos], out, progress=look)
    assert len(report.files) == len(json.loads((out / REPORT).read_text())["files"]) == 4


def test_an_answer_that_is_not_finite_is_no_picture(tiny_model: R2R, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.ending.weight.fill_(3e38)
    write_rgb(tmp_path / "a.png", SMALL)
    report = restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out")
    assert report.files[0].error is not None
    assert report.files[0].error.startswith("the model's answer is not finite")
    assert not (tmp_path / "out" / "a.png").exists()


def test_an_output_that_cannot_be_written_is_reported(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "a.png", SMALL)
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    report = restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out")
    assert report.failed == 1
    assert report.files[0].error == f"cannot write {tmp_path / 'out' / 'a.png'}: Is a directory"


def test_a_task_without_slots_is_never_likely(tiny_model: R2R, tmp_path: Path) -> None:
    tiny_model.bank.counts[1] = 0
    write_rgb(tmp_path / "a.png", SMALL)
    restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out")
    scores = json.loads((tmp_path / "out" / REPORT).read_text())["files"][0]["scores"]
    assert scores["derain"] == 0
    assert scores["denoise"] > 0


def test_the_plan_keeps_folders_and_skips_what_lies_in_out(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/sub/b.jpg", "in/out/a.png", "single.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "in" / "out"
    plan = plan_outputs([tmp_path / "in", tmp_path / "single.tif", tmp_path / "in" / "a.png"], out)
    assert plan.files == [
        (tmp_path / "in/a.png", out / "a.png"),
        (tmp_path / "in/sub/b.jpg", out / "sub/b.jpg"),
        (tmp_path / "single.tif", out / "single.tif"),
    ]
    assert plan.skipped == []


def test_same_names_from_several_inputs_keep_their_folders(tmp_path: Path) -> None:
    for name in ("one/a.png", "one/b.png", "two/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "out"
    both = [tmp_path / "one", tmp_path / "two"]
    assert [target for _, target in plan_outputs(both, out).files] == [
        out / "one/a.png", out / "one/b.png", out / "two/a.png",
    ]  # fmt: skip
    files = [tmp_path / "one/a.png", tmp_path / "two/a.png"]
    assert [target for _, target in plan_outputs(files, out).files] == [out / "one/a.png", out / "two/a.png"]


def test_another_format_changes_the_suffix_and_keeps_names_apart(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.tif", "c.webp"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    out = tmp_path / "out"
    names = [target.name for _, target in plan_outputs([tmp_path / "in"], out, "WEBP").files]
    assert names == ["a.jpg.webp", "a.png.webp", "b.webp", "c.webp"]


def test_what_is_left_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    (photos / "closed").mkdir(parents=True)
    for name in ("a.png", "anim.gif", "notes.txt", ".hidden.png", "closed/b.png"):
        (photos / name).touch()
    os.mkfifo(photos / "pipe.png")
    (photos / "loop.png").symlink_to(photos / "loop.png")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    (photos / "around").symlink_to(photos, target_is_directory=True)
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # the superuser may read all folders
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    plan = plan_outputs([photos], tmp_path / "out")
    assert [source.name for source, _ in plan.files] == ["a.png"]
    reasons = {Path(one.input).name: one.reason for one in plan.skipped}
    assert reasons == {
        "around": "a link to a folder, which is not followed",
        "closed": "cannot be read: Permission denied",
        "anim.gif": f".gif is not read; {ACCEPTED}",
        "pipe.png": "a pipe, socket or device, which is not opened",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "gone.png": "cannot be read: No such file or directory",
    }
    with pytest.raises(InputError, match=r"pipe\.png: a pipe, socket or device, which is not opened"):
        plan_outputs([photos / "pipe.png"], tmp_path / "out")


def test_plans_that_would_lose_something_are_refused(tiny_model: R2R, tmp_path: Path) -> None:
    for name in ("one/a.png", "two/a.png", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rgb(tmp_path / name, SMALL) if name.endswith("png") else (tmp_path / name).touch()
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    before = (one / "a.png").read_bytes()
    for inputs, target, line in (
        ([one / "a.png"], one, r"one/a\.png would be replaced by an output"),
        ([two / "a.png", one], one, r"one/a\.png is there, and was not made of .*two/a\.png; give"),
        ([one], one, r"one: the results go there; give another folder"),
        ([one], tmp_path, r"one: the results go there"),
        ([two], one / "a.png", r"one/a\.png is a file; results go to a folder"),
        ([tmp_path / "empty"], out, "empty: no image in it; accepted: PNG"),
        ([tmp_path / "empty/notes.txt"], out, r"notes\.txt: not an image; accepted: PNG"),
        ([tmp_path / "nowhere"], out, "nowhere: no such file or folder"),
        ([], out, "no input; accepted: image files"),
    ):
        with pytest.raises(InputError, match=line):
            restore_files(tiny_model, inputs, target)
    assert (one / "a.png").read_bytes() == before
    assert not out.exists()


def test_results_of_other_photos_are_not_replaced(tiny_model: R2R, tmp_path: Path) -> None:
    monday, tuesday, out = tmp_path / "monday", tmp_path / "tuesday", tmp_path / "out"
    for path in (monday / "a.png", tuesday / "b.png"):
        write_rgb(path, SMALL)

    def restored(*inputs: Path, overwrite: bool = False, **how: Any) -> list[int]:
        report = restore_files(tiny_model, inputs, out, Settings(**how), overwrite)
        return [report.restored, report.unchanged]

    def refused(*inputs: Path, target: str = "a.png", **how: Any) -> None:
        before = {path: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(InputError, match=rf"out/{target} is there, and was not made of .*; give another --out, or"):
            restored(*inputs, **how)
        assert before == {path: path.read_bytes() for path in out.iterdir()}

    assert restored(monday) == [1, 0]
    assert restored(tuesday) == [1, 0]  # names that are free
    assert restored(monday) == [0, 1]  # which another run's report still knows
    write_rgb(tuesday / "a.png", SMALL)
    refused(tuesday)
    refused(tuesday / "a.png", strength=0.5)
    assert restored(tuesday / "b.png", strength=0.5) == [1, 0]
    assert restored(tuesday / "b.png", monday, strength=0.5) == [1, 1]
    write_rgb(out / "own.png", SMALL)
    write_rgb(monday / "own.png", SMALL)
    refused(monday, target="own.png")
    assert restored(tuesday, overwrite=True) == [2, 0]
    refused(monday / "a.png")  # it is Tuesday's now
    assert restored(tuesday) == [0, 2]
    write_rgb(tuesday / "c.png", SMALL)
    assert restored(tuesday / "c.png", file_format="WEBP") == [1, 0]
    (tuesday / "c.png").rename(tuesday / "c.bmp.png")
    Image.fromarray(skimage.data.chelsea()[:40, :50]).save(tuesday / "c.bmp")
    refused(tuesday / "c.bmp", target="c.webp", file_format="WEBP")


def test_photos_are_known_by_any_of_their_names(
    tiny_model: R2R, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rgb(tmp_path / "photos/a.png", SMALL)
    write_rgb(tmp_path / "photos/more/b.png", SMALL)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    assert restore_files(tiny_model, ["photos"], "out").restored == 2
    for photos, out in (
        ("link", "out"),
        ("photos/../link/", "./photos/../out"),
        (tmp_path / "photos", tmp_path / "out"),
    ):
        report = restore_files(tiny_model, [photos], out)
        assert (report.restored, report.unchanged) == (0, 2)
        assert [one.output for one in report.files] == [str(Path(out, name)) for name in ("a.png", "more/b.png")]
    assert restore_files(tiny_model, ["photos/a.png"], "out").unchanged == 1
    (tmp_path / "out").rename(tmp_path / "moved")
    assert restore_files(tiny_model, ["photos"], "moved").unchanged == 2
    assert restore_files(tiny_model, ["photos/more"], "moved").restored == 1  # to another name


def test_what_a_killed_run_had_not_recorded_is_done_again(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "photos/a.png", SMALL)
    write_rgb(tmp_path / "photos/b.png", SMALL)
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        restore_files(tiny_model, [tmp_path / "photos"], out, by=killed)
    write_rgb(out / "a.png", SMALL)  # as if it had been written, and the process killed then
    assert restore_files(tiny_model, [tmp_path / "photos"], out).restored == 2
    assert json.loads((out / REPORT).read_text())["pending"] == []


def test_two_runs_at_once_into_one_folder_are_refused(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "a.png", SMALL)
    write_rgb(tmp_path / "b.png", SMALL)
    seen: list[str] = []

    def meanwhile(result: FileResult, total: int) -> None:
        with pytest.raises(InputError, match=r"out: another run writes there; wait for its end"):
            restore_files(tiny_model, [tmp_path / "b.png"], tmp_path / "out")
        assert restore_files(tiny_model, [tmp_path / "b.png"], tmp_path / "other").restored == 1
        seen.append(result.input)

    assert restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", progress=meanwhile).restored == 1
    assert len(seen) == 1
    assert restore_files(tiny_model, [tmp_path / "b.png"], tmp_path / "out").restored == 1


def test_two_photos_never_become_one(tiny_model: R2R, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "a.jpg", "a.png.webp"):
        write_rgb(photos / name, SMALL)
    with pytest.raises(
        InputError, match=r"a\.png and .*a\.png\.webp would both become .*out/a\.png\.webp; restore them"
    ):
        restore_files(tiny_model, [photos], tmp_path / "out", Settings(file_format="WEBP"))
    write_rgb(tmp_path / "other/sub/b.png", SMALL)
    write_rgb(tmp_path / "other/a.png", SMALL)
    (tmp_path / "link").symlink_to("other/sub")
    report = restore_files(tiny_model, [tmp_path / "link/../a.png", photos / "a.png"], tmp_path / "out")
    assert len({one.output for one in report.files}) == 2


def test_earlier_results_are_no_input(tiny_model: R2R, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_rgb(photos / "a.png", SMALL)
    restore_files(tiny_model, [photos], photos / "restored")
    write_rgb(photos / "restored/own.png", SMALL)
    for number, inputs in enumerate(([photos], sorted(photos.iterdir()))):
        report = restore_files(tiny_model, inputs, tmp_path / f"other{number}")
        assert sorted(Path(one.output).name for one in report.files) == ["a.png", "own.png"]
        assert [(Path(one.input).name, one.reason) for one in report.skipped] == [
            ("restored", f"the results of an earlier run in it ({REPORT})")
        ]
    assert restore_files(tiny_model, [photos / "restored"], tmp_path / "again").restored == 2  # as it was named
    report = restore_files(tiny_model, sorted(photos.iterdir()), photos / "restored")
    assert (report.unchanged, report.skipped) == (1, [])


def test_a_link_and_its_photo_are_two_files(tiny_model: R2R, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_rgb(photos / "b.png", SMALL)
    (photos / "a.png").symlink_to("b.png")
    report = restore_files(tiny_model, [photos, photos / "b.png", photos], tmp_path / "out")
    assert [Path(one.output).name for one in report.files] == ["a.png", "b.png"]


def test_what_is_no_image_does_not_stop_the_others(tiny_model: R2R, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_rgb(photos / "a.png", SMALL)
    for name in ("b.gif", "c.txt"):
        (photos / name).touch()
    (photos / "empty").mkdir()
    os.mkfifo(photos / "d.png")
    (photos / "e.png").symlink_to("nowhere")
    report = restore_files(tiny_model, sorted(photos.iterdir()), tmp_path / "out")
    assert report.restored == 1
    reasons = {Path(one.input).name: one.reason.partition(";")[0] for one in report.skipped}
    assert reasons == {
        "b.gif": ".gif is not read",
        "c.txt": "not an image",
        "d.png": "a pipe, socket or device, which is not opened",
        "e.png": "cannot be read: No such file or directory",
        "empty": "no image in it",
    }


def test_at_strength_0_files_stay_what_they_are(tiny_model: R2R, tmp_path: Path) -> None:
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "a.jpg", quality=50)
    for settings in (Settings(strength=0), Settings("derain", strength=0)):
        restore_files(tiny_model, [tmp_path / "a.jpg"], tmp_path / "out", settings)
        assert (tmp_path / "out/a.jpg").read_bytes() == (tmp_path / "a.jpg").read_bytes()
        stream = io.BytesIO()
        restore_stream(tiny_model, str(tmp_path / "a.jpg"), stream, settings)
        assert stream.getvalue() == (tmp_path / "a.jpg").read_bytes()
    restore_files(tiny_model, [tmp_path / "a.jpg"], tmp_path / "out", Settings(strength=0, file_format="PNG"))
    assert Image.open(tmp_path / "out/a.png").format == "PNG"


def test_a_bad_task_and_an_empty_bank_are_told_before_any_work(tiny_model: R2R, tmp_path: Path) -> None:
    write_rgb(tmp_path / "a.png", SMALL)
    with pytest.raises(InputError, match="unknown task 'desnow'; the model knows denoise, derain, dehaze"):
        restore_files(tiny_model, [tmp_path / "a.png"], tmp_path / "out", Settings("desnow"))
    new = R2R(tasks=("a",), width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1), memory_blocks=(1, 1), capacity=5)
    with pytest.raises(InputError, match="the bank is empty"):
        restore_files(new, [tmp_path / "a.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many photos went through the network together, each time that several did."""
    counts: list[int] = []
    original = restoration.restore_together

    def counted(model: R2R, some: list[np.ndarray], *rest: Any) -> list[Any]:
        counts.append(len(some))
        return original(model, some, *rest)

    monkeypatch.setattr(restoration, "restore_together", counted)
    return counts


def test_small_photos_of_one_size_go_through_the_network_together(
    tiny_model: R2R, tmp_path: Path, together: list[int]
) -> None:
    """Each comes out as it does alone, and where the batch fails each is tried alone."""
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for name, size in (("a", (24, 40)), ("b", (24, 40)), ("c", (24, 40)), ("d", (40, 24))):
        write_rgb(photos / f"{name}.png", rng.random((*size, 3), np.float32))
        restore_files(tiny_model, [photos / f"{name}.png"], tmp_path / f"alone-{name}")
    assert not together
    report = restore_files(tiny_model, [photos], tmp_path / "out")
    assert together == [3]
    assert [Path(one.input).stem for one in report.files] == ["a", "b", "c", "d"]
    for one in report.files:
        name = Path(one.output).name
        (alone,) = json.loads((tmp_path / f"alone-{name[0]}" / REPORT).read_text())["files"]
        assert (list(one.tasks), one.tiles) == (alone["tasks"], 1)
        np.testing.assert_allclose(read_rgb(one.output), read_rgb(alone["output"]), atol=1.1 / 255)

    with torch.no_grad():
        tiny_model.intro.weight.fill_(torch.nan)
    together.clear()
    report = restore_files(tiny_model, [photos], tmp_path / "broken")
    assert together == [3]
    assert [one.error is not None and "not finite" in one.error for one in report.files] == [True] * 4


def test_what_is_done_again_goes_through_the_network_with_the_same_photos(
    tiny_model: R2R, tmp_path: Path, together: list[int]
) -> None:
    """As a batch of another size may round in another way; what was done stays."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(20):  # 16 are looked at together
        write_rgb(photos / f"{number:02}.png", SMALL)
    restore_files(tiny_model, [photos], out)
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    inodes = {path.name: path.stat().st_ino for path in out.glob("*.png")}
    together.clear()
    (out / "03.png").unlink()
    (out / "05.png").unlink()
    seen: list[str] = []
    report = restore_files(tiny_model, [photos], out, progress=lambda one, total: seen.append(f"{one.output} {total}"))
    assert seen == [f"{out / name} 2" for name in ("03.png", "05.png")]
    assert (together, report.unchanged) == ([16], 18)
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")} == times
    kept = {name: inode for name, inode in inodes.items() if name not in ("03.png", "05.png")}
    assert {name: (out / name).stat().st_ino for name in kept} == kept


def tables(file: Path | io.BytesIO) -> dict[int, list[int]]:
    """The quantisation of a JPEG."""
    with Image.open(file) as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        return image.quantization


def test_a_jpeg_whose_compression_was_the_fault_is_not_compressed_like_that_again(tmp_path: Path) -> None:
    model = R2R(tasks=("denoise", "dejpeg"), **TINY)
    fill_randomly(model)
    poor = tmp_path / "poor.jpg"
    Image.fromarray(skimage.data.astronaut()[:64, 100:180]).save(poor, quality=20)
    for task in ("denoise", "dejpeg"):
        restore_files(model, [poor], tmp_path / task, Settings(task))
    assert tables(tmp_path / "denoise/poor.jpg") == tables(poor)
    fine = tables(tmp_path / "dejpeg/poor.jpg")
    assert sum(fine[0]) < sum(tables(poor)[0]) / 5

    stream = io.BytesIO()
    restore_stream(model, str(poor), stream, Settings("dejpeg"))
    assert tables(stream) == fine
