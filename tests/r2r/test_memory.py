"""`--memory` is a limit of the whole process, measured as the most that it held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from r2r import R2R
from r2r.device import resident_memory

# Not the whole of ru_maxrss: a process that is started by fork begins with what its parent held.
PROGRAM = """
import re, sys, threading, time, psutil
from pathlib import Path
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, psutil.Process().memory_info().rss)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
from r2r.cli import main
try:
    main()
finally:
    print("peak", peak, file=sys.stderr)
"""


def peak_of(*arguments: object) -> tuple[int, str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "restore", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    peak = int(done.stderr.split("peak ")[1]) if "peak " in done.stderr else 0
    return done.returncode, done.stdout + done.stderr, peak


@pytest.mark.skipif(sys.platform != "linux", reason="only the GNU C library can give back what was freed")
def test_what_was_freed_does_not_count() -> None:
    """A server restores photo after photo; each would leave less memory to the next."""
    before = resident_memory()
    held = [torch.zeros(2**14) for _ in range(4000)]  # 64 KiB each, so from the heap
    assert resident_memory() - before > 200e6
    last = held[-1]  # keeps the top of the heap in use
    del held
    assert resident_memory() - before < 20e6
    assert last.sum() == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 40 megapixels."""
    pixels = np.tile(skimage.data.astronaut(), (11, 15, 1))[:5400, :7400]
    path = tmp_path_factory.mktemp("large") / "large.jpg"
    Image.fromarray(pixels).save(path, quality=90)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_40_megapixels_stay_within_1_gigabyte(tiny_model: R2R, tmp_path: Path, large: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    code, said, peak = peak_of(large, "--out", tmp_path / "out", "--model", tmp_path / "model", "--memory", 1)
    assert code == 0, said
    assert peak < 1e9
    with Image.open(tmp_path / "out" / "large.jpg") as image:
        assert image.size == (7400, 5400)


def test_a_photo_that_cannot_be_held_is_told_before_it_is_read(tiny_model: R2R, tmp_path: Path, large: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    code, said, peak = peak_of(large, "--out", tmp_path / "out", "--model", tmp_path / "model", "--memory", 0.7)
    assert code == 1
    assert "failed" in said
    assert "of --memory" in said
    assert peak < 0.7e9
