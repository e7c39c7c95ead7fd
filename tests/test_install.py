"""`pip install .` in a new environment gives a package with kernels. Slow: it downloads PyTorch and compiles twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = (
    "import torch, r2r_kernels.functional as F, r2r_kernels.env as env\n"
    "x = torch.randn(1, 4, 2, 2)\n"
    "assert torch.equal(F.simple_gate(x), x[:, :2] * x[:, 2:])\n"
    "print(env.facts()['native operators'])\n"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git holds, without anything that was built here."""
    copied = tmp_path_factory.mktemp("project")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copied / name)
    return copied


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(project: Path, *command: object, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
    done = subprocess.run(
        [*map(str, command)], cwd=project.parent, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pinned(name: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def test_pip_install_in_a_new_environment_without_pytorch(project: Path, python: Path) -> None:
    # The pinned version, as in `make`: the newest one may be too new for the driver, or larger.
    run(project, python, "-m", "pip", "install", "-q", "-c", project / "constraints.txt", project,
        PIP_CONSTRAINT=str(project / "constraints.txt"), NVCC="/none")  # fmt: skip
    assert run(project, python, "-c", PROGRAM).startswith("yes"), run(project, python, "-c", PROGRAM)
    assert "matplotlib" not in run(project, python, "-m", "pip", "list")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="environments come without setuptools")
def test_pip_install_without_isolation_with_the_setuptools_that_an_environment_comes_with(
    project: Path, python: Path
) -> None:
    run(project, python, "-m", "pip", "install", "-q", pinned("torch"), pinned("ninja"), pinned("pybind11"), "wheel")
    run(project, python, "-m", "pip", "uninstall", "-q", "-y", "r2r-restore")
    command = ("install", "-q", "--no-build-isolation", "-c", project / "constraints.txt", project)
    run(project, python, "-m", "pip", *command, NVCC="/none", CXX="g++ -m64" if sys.platform == "linux" else "c++")
    assert run(project, python, "-c", PROGRAM).startswith("yes")
