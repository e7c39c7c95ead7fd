from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from r2r.data.images import write_rgb
from r2r.data.layouts import (
    LAYOUTS,
    REPEATS,
    bsd400_wed,
    cdd11,
    cdd11_tasks,
    gopro,
    input_target,
    lol,
    rain100l,
    reside_ots,
    reside_sots,
)
from r2r.errors import InputError


def plant(root: Path, *names: str) -> None:
    """Tiny image files at these paths."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_rgb(root / name, np.zeros((2, 3, 3), np.float32))


def relative(pairs: list, root: Path) -> list[tuple[str, str | None]]:
    return [
        (pair.clean.relative_to(root).as_posix(), pair.degraded and pair.degraded.relative_to(root).as_posix())
        for pair in pairs
    ]


def test_bsd400_and_wed(tmp_path: Path) -> None:
    plant(tmp_path / "Denoise", "100007.jpg", "a8143.jpg", "00012.bmp", "00013.bmp")
    names = tmp_path / "denoise.txt"
    names.write_text("00012.bmp\na100007.jpg\r\n\na8143.jpg\n")
    root = tmp_path / "Denoise"
    assert relative(bsd400_wed(root, names), root) == [("00012.bmp", None), ("100007.jpg", None), ("a8143.jpg", None)]
    assert len(bsd400_wed(root)) == 4
    names.write_text("00012.bmp\n00014.bmp\n")
    with pytest.raises(InputError, match=r"Denoise: 00014\.bmp listed in .*denoise\.txt but not there"):
        bsd400_wed(root, names)


def test_rain100l(tmp_path: Path) -> None:
    plant(tmp_path, "rainy/rain-1.png", "rainy/rain-10.png", "gt/norain-1.png", "gt/norain-10.png")
    expected = [("gt/norain-1.png", "rainy/rain-1.png"), ("gt/norain-10.png", "rainy/rain-10.png")]
    assert relative(rain100l(tmp_path), tmp_path) == expected
    (tmp_path / "rainTrain.txt").write_text("rainy/rain-10.png")
    assert relative(rain100l(tmp_path, tmp_path / "rainTrain.txt"), tmp_path) == expected[1:]
    plant(tmp_path, "rainy/rain-2.png")
    with pytest.raises(InputError, match="no file in gt for rainy/rain-2"):
        rain100l(tmp_path)


def test_reside(tmp_path: Path) -> None:
    plant(tmp_path, "synthetic/part1/0025_0.8_0.04.jpg", "synthetic/part2/3068_1_0.2.jpg")
    plant(tmp_path, "original/0025.jpg", "original/3068.jpg")
    expected = [
        ("original/0025.jpg", "synthetic/part1/0025_0.8_0.04.jpg"),
        ("original/3068.jpg", "synthetic/part2/3068_1_0.2.jpg"),
    ]
    assert relative(reside_ots(tmp_path), tmp_path) == expected
    (tmp_path / "hazy_outside.txt").write_text("synthetic/part2/3068_1_0.2.jpg\n")
    assert relative(reside_ots(tmp_path, tmp_path / "hazy_outside.txt"), tmp_path) == expected[1:]
    plant(tmp_path, "input/0001_0.8_0.2.jpg", "target/0001.png")
    assert relative(reside_sots(tmp_path), tmp_path) == [("target/0001.png", "input/0001_0.8_0.2.jpg")]


def test_gopro_and_lol(tmp_path: Path) -> None:
    plant(tmp_path / "Deblur", "blur/GOPR0372_07_00_000047.png", "sharp/GOPR0372_07_00_000047.png")
    assert gopro(tmp_path / "Deblur")[0].clean == tmp_path / "Deblur/sharp/GOPR0372_07_00_000047.png"
    for clean in ("high", "gt"):
        plant(tmp_path / "Enhance", "low/2.png", f"{clean}/2.png")
        assert lol(tmp_path / "Enhance")[0].clean == tmp_path / "Enhance" / clean / "2.png"
    plant(tmp_path / "test", "input/1.png", "target/1.png")
    assert relative(input_target(tmp_path / "test"), tmp_path / "test") == [("target/1.png", "input/1.png")]


def test_cdd11(tmp_path: Path) -> None:
    plant(tmp_path, "clear/000001.png", "low_haze/000001.png", "snow/000001.png")
    assert relative(cdd11(tmp_path, "low_haze"), tmp_path) == [("clear/000001.png", "low_haze/000001.png")]
    assert cdd11_tasks("low_haze_snow") == ("lowlight", "dehaze", "desnow")
    with pytest.raises(InputError, match="no such folder"):
        cdd11(tmp_path, "rain")


def test_pairs_of_a_layout_must_be_of_one_size(tmp_path: Path) -> None:
    plant(tmp_path, "blur/1.png")
    (tmp_path / "sharp").mkdir()
    write_rgb(tmp_path / "sharp/1.png", np.zeros((5, 3, 3), np.float32))
    with pytest.raises(InputError, match="size differs"):
        gopro(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"weights.bin\n", b"\xff\xfe\x00"])
def test_lists_that_are_none(tmp_path: Path, content: bytes) -> None:
    plant(tmp_path, "1.png")
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"list\.txt: "):
        bsd400_wed(tmp_path, tmp_path / "list.txt")


def test_published_numbers_of_samples() -> None:
    """Three and five tasks, from the sizes of the data sets."""
    images = {"denoise": 400 + 4744, "derain": 200, "dehaze": 72135, "deblur": 2103, "lowlight": 485}
    shown = {tasks: {name: images[name] * times for name, times in table.items()} for tasks, table in REPEATS.items()}
    assert shown[3] == {"denoise": 3 * 3 * 5144, "derain": 24000, "dehaze": 72135}
    assert shown[5] == {"denoise": 46296, "derain": 16000, "dehaze": 72135, "deblur": 63090, "lowlight": 29100}


def test_layouts_have_their_functions_names() -> None:
    assert LAYOUTS["reside_ots"] is reside_ots
    assert len(LAYOUTS) == 8
