"""Damaged photos, configs and weights: never a traceback, never a file outside `--out`, never a changed original."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from r2r import R2R
from r2r.cli import main

PICTURE = Image.fromarray(skimage.data.astronaut()[:40, :50])
SUFFIXES = (".png", ".jpg", ".tif", ".webp", ".bmp", ".ppm", ".avif")
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def encoded(suffix: str) -> bytes:
    file, tags = io.BytesIO(), Image.Exif()
    tags[271], tags[274] = "Camera", 6
    how: dict[str, Any] = {} if suffix in (".bmp", ".ppm") else {"exif": tags.tobytes()}
    PICTURE.save(file, Image.registered_extensions()[suffix], **how)
    return file.getvalue()


FILES = {suffix: encoded(suffix) for suffix in SUFFIXES}


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some of them changed, cut off, or doubled; the start, where sizes stand, more often."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not changed:
            break
        place = draw(st.integers(0, min(200, len(changed) - 1)) | st.integers(0, len(changed) - 1))
        kind = draw(st.sampled_from(("byte", "word", "cut", "double", "insert")))
        if kind == "byte":
            changed[place] = draw(st.integers(0, 255))
        elif kind == "word":
            changed[place : place + 4] = struct.pack("<I", draw(st.sampled_from((0, 1, 2**16, 2**31 - 1, 2**32 - 1))))
        elif kind == "cut":
            del changed[place:]
        elif kind == "double":
            changed += changed[place:]
        else:
            changed[place:place] = draw(st.binary(max_size=20))
    return bytes(changed)


def run(folder: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and all output of `r2r`; whatever else is raised is a failure of the test."""
    said, handler, before = io.StringIO(), signal.getsignal(signal.SIGTERM), sys.argv
    sys.argv = ["r2r", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
        code: Any = 0
    except SystemExit as ending:
        code = ending.code or 0
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    return code, said.getvalue()


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tiny_model: R2R, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    return tmp_path


@FUZZ
@given(data=st.data())
def test_damaged_photos(place: Path, data: st.DataObject) -> None:
    for path in (place / "photos").iterdir():
        path.unlink()
    for number, suffix in enumerate(data.draw(st.lists(st.sampled_from(SUFFIXES), min_size=1, max_size=3))):
        name = data.draw(st.sampled_from(SUFFIXES)) if data.draw(st.booleans()) else suffix
        (place / "photos" / f"{number}{name}").write_bytes(data.draw(damaged(FILES[suffix])))
    kept = everything(place / "photos") | everything(place / "model")
    out = place / "out"
    formats = data.draw(st.sampled_from(((), ("--format", "jpg"), ("--format", "tiff"), ("--format", "webp"))))
    code, said = run(
        place, "restore", place / "photos", "--out", out, "--model", place / "model", "--overwrite", *formats
    )
    assert code in (0, 1), said
    assert everything(place / "photos") | everything(place / "model") == kept
    assert {path.name for path in place.iterdir()} <= {"photos", "model", "out"}
    report = json.loads((out / "report.json").read_text())
    assert report["complete"]
    assert len(report["files"]) == len(list((place / "photos").iterdir()))
    for one in report["files"]:
        if one["error"] is None:
            with Image.open(one["output"]) as image:
                image.load()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_damaged_configs(place: Path, data: st.DataObject) -> None:
    config_path = place / "model" / "config.json"
    original = place / "config.original"
    if not original.exists():
        original.write_bytes(config_path.read_bytes())
        PICTURE.save(place / "photos" / "a.png")
    config = json.loads(original.read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[key] = data.draw(VALUES)
    config_path.write_text(json.dumps(config))
    code, said = run(
        place, "restore", place / "photos", "--out", place / "out", "--model", place / "model", "--overwrite"
    )
    assert code in (0, 2), said
    assert code == 0 or said.startswith("error: "), said
    assert len(said.splitlines()) == 1 or code == 0, said


@FUZZ
@given(data=st.data())
def test_damaged_weights(place: Path, data: st.DataObject) -> None:
    path = place / "model" / "model.safetensors"
    original = place / "weights.original"
    if not original.exists():
        original.write_bytes(path.read_bytes())
        PICTURE.save(place / "photos" / "a.png")
    raw = original.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    whole = data.draw(st.booleans())
    header = raw[: 8 + length]
    path.write_bytes(data.draw(damaged(header)) + raw[8 + length :] if not whole else data.draw(damaged(raw)))
    code, said = run(
        place, "restore", place / "photos", "--out", place / "out", "--model", place / "model", "--overwrite"
    )
    assert code in (0, 1, 2), said
    assert "Traceback" not in said
    if code == 0:
        pixels = np.asarray(Image.open(place / "out" / "a.png"))
        assert pixels.shape == (40, 50, 3)
