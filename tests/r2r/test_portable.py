"""What only Unix has is not needed, nor what only training and the demo need; starting is quick."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from r2r import R2R

AS_ON_WINDOWS = """
import os, sys
import psutil  # its form for Linux needs what is hidden here
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix_ipc"):
    sys.modules[name] = None
for name in ("sysconf", "sched_getaffinity", "getuid", "geteuid", "mkfifo", "fork"):
    if hasattr(os, name):
        delattr(os, name)
"""
WITHOUT_EXTRAS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("matplotlib", "sklearn", "tensorboard", "pillow_heif", "rawpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
MAIN = """
from r2r.cli import main
main()
"""


def python(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="backslashreplace",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.fromarray(data.chelsea()[:48, :64]).save(tmp_path / "photos" / "größe.png")
    return tmp_path / "photos"


def test_a_photo_is_restored_without_what_windows_and_plain_installs_lack(
    tiny_model: R2R, tmp_path: Path, photo: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    program = AS_ON_WINDOWS + WITHOUT_EXTRAS + MAIN
    done = python(
        program, "restore", photo, "--out", tmp_path / "out", "--model", tmp_path / "model", "--eager",
        PYTHONIOENCODING="cp1252",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "größe.png").exists()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (("demo", "--train", "--out", "{}"), "matplotlib|sklearn", "demo"),
        (("train", "tasks=[a]"), "tensorboard", "train"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    tmp_path: Path, command: tuple[str, ...], package: str, extra: str
) -> None:
    done = python(WITHOUT_EXTRAS + MAIN, *(word.format(tmp_path) for word in command))
    assert done.returncode == 2
    lines = [f"error: this needs the package {one}: pip install 'r2r-restore[{extra}]'\n" for one in package.split("|")]
    assert done.stderr in lines, done.stderr


def test_the_package_tells_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "r2r", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == python("import r2r; print(r2r.__version__)").stdout.strip()


def test_help_needs_no_large_import() -> None:
    done = python(
        "import sys; sys.argv = ['r2r', '--help']\nimport r2r.cli\n"
        "large = {'torch', 'numpy', 'PIL', 'cv2', 'huggingface_hub', 'skimage'} & sys.modules.keys()\n"
        "assert not large, large\n"
    )
    assert done.returncode == 0, done.stderr


def test_restoring_imports_nothing_that_it_does_not_need() -> None:
    done = python(
        "import sys, r2r.restoration\n"
        "large = {'matplotlib', 'sklearn', 'tensorboard', 'pandas', 'skimage', 'omegaconf', 'torch._dynamo'}\n"
        "large &= sys.modules.keys()\n"
        "assert not large, large\n"
    )
    assert done.returncode == 0, done.stderr
