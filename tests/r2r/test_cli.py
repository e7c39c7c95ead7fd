"""Every command through the installed `r2r`, as a stranger would call it."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data

from r2r import R2R
from r2r.cli import main
from tests.conftest import TINY, fill_randomly

Command = Callable[..., "subprocess.CompletedProcess[str]"]
ENTRY = Path(sys.executable).with_name("r2r")


def r2r(*arguments: object, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; `largest_file` bytes stand for a disk that is full."""

    def limit() -> None:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [str(ENTRY), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, preexec_fn=limit)


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`r2r` in this process, which saves the seconds of a new one's start."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["r2r", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            main()
            code: Any = 0
        except SystemExit as ending:
            code = ending.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, out, err)

    return run


def refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr), result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = R2R(tasks=("denoise", "derain"), **TINY)
    fill_randomly(model)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(data.chelsea()[:48, :64]).save(folder / "cat.png")
    (folder / "more").mkdir()
    Image.fromarray(data.coffee()[:40, :56]).save(folder / "more" / "cup.jpg")
    return folder


def test_help_of_every_command_has_an_example() -> None:
    overview = r2r("--help")
    assert overview.returncode == 0
    commands = "demo train ablate restore web evaluate complexity curves degrade unpack bank convert export env"
    for command in commands.split():
        assert command in overview.stdout
        page = r2r(command, "--help")
        assert page.returncode == 0
        assert f"r2r {command}" in page.stdout.split("Example", 1)[1]


def test_restore_keeps_folders_and_reports(model: Path, photos: Path, tmp_path: Path) -> None:
    result = r2r("restore", photos, "--out", tmp_path / "out", "--model", model)
    assert result.returncode == 0, result.stderr
    assert re.search(r"cat\.png: de(noise|rain) \(denoise -?\d", result.stdout)
    assert "2 restored, 0 failed" in result.stdout
    with Image.open(tmp_path / "out" / "more" / "cup.jpg") as image:
        assert image.size == (56, 40)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {Path(entry["input"]).name for entry in report["files"]} == {"cat.png", "cup.jpg"}

    (photos / "broken.png").write_bytes(b"no image")
    try:
        result = r2r("restore", photos, "--out", tmp_path / "out", "--model", model, "--task", "derain")
    finally:
        (photos / "broken.png").unlink()
    assert result.returncode == 1
    assert "failed" in result.stdout
    assert "2 restored, 1 failed" in result.stdout

    refused(r2r("restore", photos / "none.png", "--out", tmp_path, "--model", model), "no such file")
    refused(r2r("restore", photos, "--out", tmp_path, "--model", tmp_path / "nowhere"), "no such folder")
    refused(r2r("restore", photos, "--out", tmp_path, "--model", model, "--task", "snow"), "unknown task 'snow'")
    refused(r2r("restore", photos, "--out", tmp_path, "--model", model, "--device", "cuda:9"), "cannot be used")


def test_the_same_command_again_skips_what_is_done(inside: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    command = ("restore", photos, "--out", tmp_path / "out", "--model", model)
    assert "2 restored, 0 failed; " in inside(*command).stdout
    planned = inside(*command, "--dry-run", "--format", "png")
    assert f"{photos / 'more' / 'cup.jpg'} -> {tmp_path / 'out' / 'more' / 'cup.png'}\n" in planned.stdout
    assert "2 to restore, 0 unchanged, 0 skipped" in planned.stdout
    assert not (tmp_path / "out" / "more" / "cup.png").exists()
    again = inside(*command, "--log", "json")
    assert again.returncode == 0
    (summary,) = map(json.loads, again.stdout.splitlines())
    assert (summary["restored"], summary["unchanged"]) == (0, 2)
    anew = [json.loads(line) for line in inside(*command, "--log", "json", "--overwrite").stdout.splitlines()]
    assert [Path(line["input"]).name for line in anew[:-1]] == ["cat.png", "cup.jpg"]
    assert anew[-1]["restored"] == 2


def test_another_format_and_quality(inside: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    command = ("restore", photos, "--model", model, "--out")
    sizes = []
    for quality in (95, 30):
        out = tmp_path / str(quality)
        assert inside(*command, out, "--format", "jpg", "--quality", quality).returncode == 0
        sizes.append((out / "cat.jpg").stat().st_size)
    assert sizes[0] > 1.5 * sizes[1]
    refused(inside(*command, tmp_path, "--format", "gif"), r"gif: unknown format '\.gif'; accepted: \.png, \.jpg")
    refused(inside(*command, tmp_path, "--format", "png", "--quality", 9), "--quality: PNG has none")


def test_standard_input_and_output(model: Path, photos: Path) -> None:
    given = (photos / "cat.png").read_bytes()
    command = [str(ENTRY), "restore", "-", "--out", "-", "--model", str(model)]
    done = subprocess.run(command, input=given, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert (image.format, image.size) == ("PNG", (64, 48))


def test_a_page_compares_before_and_after(inside: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert inside("restore", photos, "--out", out, "--model", model, "--compare").returncode == 0
    page = (out / "compare.html").read_text(encoding="utf-8")
    shown = [unquote(address) for address in re.findall(r'src="([^"]+)"', page)]
    assert {(out / address).resolve() for address in shown} == {
        path.resolve() for folder in (photos, out) for path in folder.rglob("c*.???") if path.suffix != ".html"
    }


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name must be text")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_name_is_restored_and_shown(model: Path, photos: Path, tmp_path: Path, encoding: str) -> None:
    names = [b"caf\xe9.png", b"[red]x.png", b"[x.png", b"\x1b[2Jx.png", b":smile:.png", b"\xe5\x86\x99.png",
             b"a\nb.png", b"[b\\.png", b"-.png"]  # fmt: skip
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes((photos / "cat.png").read_bytes())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    command = [str(ENTRY), "restore", str(folder), "--out", str(out), "--model", str(model)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(name for name in os.listdir(os.fsencode(out)) if name != b"report.json") == sorted(names)
    lines = done.stdout.decode(encoding).splitlines()
    assert len(lines) == len(names) + 1  # not wrapped, in a pipe
    assert b"\x1b" not in done.stdout
    for shown in (
        "caf\\udce9.png: ",
        "[red]x.png: ",
        "[x.png: ",
        "\\x1b[2Jx.png: ",
        ":smile:.png: ",
        "a\\nb.png: ",
    ):
        assert any(f"/{shown}" in line for line in lines), shown
    report = json.loads((out / "report.json").read_text())
    assert {os.fsencode(Path(one["input"]).name) for one in report["files"]} == set(names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_true_report(model: Path, photos: Path, tmp_path: Path, number: int) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for index in range(400):
        (folder / f"{index:03}.png").write_bytes((photos / "cat.png").read_bytes())
    command = [str(ENTRY), "restore", str(folder), "--out", str(out), "--model", str(model)]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    assert running.stdout is not None
    running.stdout.readline()  # the first photo is done
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said == "interrupted; what was done so far is kept\n"
    report = json.loads((out / "report.json").read_text())
    assert report["complete"] is False
    assert 1 <= len(report["files"]) < 400
    assert {Path(one["output"]).name for one in report["files"]} | {"report.json"} == {p.name for p in out.iterdir()}


def test_bad_values_are_told_in_one_line(inside: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    command = ("restore", photos, "--out", tmp_path / "out", "--model", model)
    for value in ("nan", "inf", "0", "-1"):
        refused(inside(*command, "--memory", value), rf"--memory {value}.*: accepted are gigabytes, more than 0")
    refused(inside(*command, "--memory", "1e-6"), "this model needs .* or more")
    refused(inside("restore", "-", "--out", tmp_path / "out", "--model", model), "- stands for one photo")
    os.mkfifo(tmp_path / "pipe.png")
    refused(inside("restore", tmp_path / "pipe.png", *command[2:]), "a pipe, socket or device, which is not opened")
    assert not (tmp_path / "out").exists()


def test_the_kernels_and_the_reference_restore_alike(model: Path, photos: Path, tmp_path: Path) -> None:
    pixels = []
    for out, options in (("fast", ()), ("eager", ("--eager",))):
        result = r2r("restore", photos / "cat.png", "--out", tmp_path / out, "--model", model, *options)
        assert result.returncode == 0, result.stderr
        pixels.append(np.asarray(Image.open(tmp_path / out / "cat.png")).astype(int))
    assert abs(pixels[0] - pixels[1]).max() <= 1


def test_degrade_then_evaluate(model: Path, photos: Path, tmp_path: Path) -> None:
    made = r2r("degrade", photos, "--out", tmp_path / "pairs", "--as", "rain", "--seed", "3")
    assert made.returncode == 0, made.stderr
    assert "2 pairs made" in made.stdout
    assert (tmp_path / "pairs" / "degraded" / "more" / "cup.png").exists()
    refused(r2r("degrade", photos, "--out", tmp_path / "pairs", "--as", "noise:sigma=25"), "was not made with these")
    refused(r2r("degrade", photos, "--out", tmp_path / "new", "--as", "sleet"), "sleet")
    before = ("evaluate", "--model", tmp_path / "none", "--task", "derain", "--pairs", tmp_path / "pairs")
    for option in ("--json", "--csv", "--plot"):  # before any work, such as reading the model
        refused(r2r(*before, option, photos), "cannot write .*: Is a directory")

    result = r2r("evaluate", "--model", model, "--task", "derain", "--pairs", tmp_path / "pairs",
                 "--json", tmp_path / "result.json", "--csv", tmp_path / "result.csv", "--save", tmp_path / "saved",
                 "--plot", tmp_path / "confusion.png")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "psnr_y" in result.stdout
    assert len((tmp_path / "result.csv").read_text().splitlines()) == 3
    assert (tmp_path / "saved" / "derain" / "more" / "cup.png").exists()
    assert (tmp_path / "confusion.png").exists()
    assert "GMAC at 224 x 224" in result.stdout
    written = json.loads((tmp_path / "result.json").read_text())
    assert len(written["sets"][0]["images"]) == 2

    several = tmp_path / "sets.yaml"
    several.write_text(
        yaml.safe_dump(
            {
                "sets": [
                    {"name": "rain", "task": "derain", "pairs": str(tmp_path / "pairs")},
                    {"name": "noise 25", "task": "denoise", "clean": str(photos), "sigma": 25},
                ]
            }
        )
    )
    result = r2r("evaluate", several, "--model", model, "--eager")
    assert result.returncode == 0, result.stderr
    assert "noise 25" in result.stdout
    refused(r2r("evaluate", "--model", model), "give a YAML file of sets, or --task")
    theirs = r2r("evaluate", "--task", "derain", "--pairs", tmp_path / "pairs", "--method", tmp_path / "saved")
    assert theirs.returncode == 0, theirs.stderr
    assert "saved" in theirs.stdout
    refused(r2r("evaluate", "--model", model, "--task", "derain", "--pairs", photos), "degraded")
    refused(r2r("evaluate", "--model", model, "--task", "dehaze", "--clean", photos), "unknown task 'dehaze'")


def test_bank_says_which_tasks_are_undone_in_another_way(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mixtures": True, "smooth_tasks": ["derain"], "strengths": {"denoise": 0.25}}
    R2R(("denoise", "derain"), **TINY, **settings).save_pretrained(tmp_path)
    shown = r2r("bank", tmp_path)
    assert "derain: looked for and undone in a small copy of the photo" in shown.stdout
    assert "denoise: 0.25 of what the model changes is mixed in" in shown.stdout


def test_bank_shows_drops_and_takes_over_tasks(model: Path, tmp_path: Path) -> None:
    shown = r2r("bank", model)
    assert shown.returncode == 0, shown.stderr
    assert "derain" in shown.stdout
    assert r2r("bank", model, "--remove", "derain", "--out", tmp_path / "less").returncode == 0
    assert R2R.from_pretrained(tmp_path / "less").tasks == ("denoise",)
    assert r2r("bank", tmp_path / "less", "--add-from", model, "--out", tmp_path / "more").returncode == 0
    assert R2R.from_pretrained(tmp_path / "more").tasks == ("denoise", "derain")
    refused(r2r("bank", model, "--remove", "derain"), "say with --out")
    refused(r2r("bank", model, "--remove", "snow", "--out", tmp_path / "x"), "no task 'snow'")


def test_bank_saves_among_no_other_files(inside: Command, model: Path, photos: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text("mine")
    for folder in (notes, photos, notes / "config.json"):
        refused(
            inside("bank", model, "--remove", "derain", "--out", folder), "holds no model; accepted: a new or empty"
        )
    assert [path.read_text() for path in notes.iterdir()] == ["mine"]
    for _ in range(2):  # a model is replaced by another one
        assert inside("bank", model, "--remove", "derain", "--out", tmp_path / "less").returncode == 0
    refused(inside("bank", model, "--out", tmp_path / "x"), "--out takes a changed model")
    refused(
        inside("bank", "--add-from", model, "--out", tmp_path / "x"), "another backbone than the model that comes along"
    )
    assert not (tmp_path / "x").exists()


def test_train_with_settings_alone_and_again(photos: Path, tmp_path: Path) -> None:
    settings = [
        "tasks=[denoise]", f"data=[{{task: denoise, clean: {photos}}}]", "preset=tiny", "model={width: 4}",
        "pretrain={epochs: 2, steps: 2, crop: 32, batch_size: 2}", "finetune.epochs=0", "workers=0", "log_every=1",
    ]  # fmt: skip
    result = r2r("train", *settings, "--out", tmp_path / "run", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert R2R.from_pretrained(tmp_path / "run" / "last").tasks == ("denoise",)
    again = r2r("train", *settings, "--out", tmp_path / "run", "--device", "cpu", "--eager")
    assert again.returncode == 0
    assert "going on with" in again.stdout
    refused(r2r("train", *settings, "seed=1", "--out", tmp_path / "run"), "holds a run with seed = 0, now it is 1")
    refused(r2r("train", tmp_path / "none.yaml"), "does not exist")
    refused(r2r("train", "epochs=3"), "epochs is no setting; there are pretrain.epochs and finetune.epochs")


def test_a_full_disk_is_named_and_loses_nothing(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert r2r("restore", photos / "cat.png", "--out", out, "--model", model).returncode == 0
    before = (out / "cat.png").read_bytes()
    result = r2r("restore", photos / "cat.png", "--out", out, "--model", model, "--task", "derain", largest_file=2000)
    assert result.returncode == 1
    assert "cannot write" in result.stdout
    assert (out / "cat.png").read_bytes() == before

    settings = [
        "tasks=[denoise]", f"data=[{{task: denoise, clean: {photos}}}]", "preset=tiny", "model={width: 4}",
        "pretrain={epochs: 1, steps: 1, crop: 32, batch_size: 2}", "finetune.epochs=0", "workers=1",
    ]  # fmt: skip
    failed = r2r("train", *settings, "--out", tmp_path / "run", "--device", "cpu", largest_file=100_000)
    refused(failed, r"cannot write .*last\.ckpt")
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".ckpt"]


WITHOUT_THIS_PACKAGE = """
import sys
import torch

program = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
torch.save([program(x) for x in images], sys.argv[3])
assert not any(name.partition(".")[0] in ("r2r", "r2r_kernels") for name in sys.modules)
"""


def test_export_writes_a_program_that_needs_nothing_else(model: Path, tmp_path: Path) -> None:
    result = r2r("export", model, "--out", tmp_path / "model.pt2")
    assert result.returncode == 0, result.stderr
    assert "model.pt2" in result.stdout
    images = [torch.rand(shape) for shape in ((1, 3, 48, 64), (3, 3, 33, 70), (2, 3, 96, 17), (1, 3, 32, 32))]
    torch.save(images, tmp_path / "images.pt")
    files = [tmp_path / name for name in ("model.pt2", "images.pt", "restored.pt")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PACKAGE, *map(str, files)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = R2R.from_pretrained(model)
    with torch.no_grad():
        for lq, got in zip(images, torch.load(files[2]), strict=True):
            torch.testing.assert_close(got, wanted(lq))

    before = (tmp_path / "model.pt2").read_bytes()
    refused(r2r("export", model, "--out", tmp_path / "model.pt2", largest_file=2000), "cannot write")
    assert (tmp_path / "model.pt2").read_bytes() == before
    refused(r2r("export", model, "--out", tmp_path / "model.pth"), r"accepted are files named \*.pt2 and \*.onnx")
    refused(r2r("export", tmp_path / "none", "--out", tmp_path / "model.pt2"), "no such folder")


def test_convert_names_what_is_wrong(tmp_path: Path) -> None:
    refused(r2r("convert", tmp_path / "last.ckpt", "--bank", tmp_path, "--out", tmp_path / "m"), "does not exist")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "last.ckpt")
    refused(r2r("convert", tmp_path / "last.ckpt", "--bank", tmp_path, "--out", tmp_path / "m"), "not a checkpoint")


def test_env_tells_versions() -> None:
    result = r2r("env")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
