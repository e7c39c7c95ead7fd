"""setup.py in copies of the project: what a failed build leaves behind, and the CUDA part on a small source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copied = tmp_path / "project"
    copied.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copied)
    (copied / "README.md").write_text("A copy.\n")
    ignored = shutil.ignore_patterns("__pycache__", "_C*")
    for name in ("csrc", "r2r_kernels"):
        shutil.copytree(ROOT / name, copied / name, ignore=ignored)
    (copied / "r2r").mkdir()
    (copied / "r2r/__init__.py").touch()
    return copied


def run(project: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def imported(built: Path, program: str) -> str:
    """What a program prints that finds the package in `built`, and none that is installed for editing."""
    only = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__module__', '')"
    return run(built, "-c", f"{only}.startswith('__editable__')]\n{program}")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def build(project: Path, **environment: str) -> Path:
    run(project, "setup.py", "build", "--build-lib", "built", **environment)
    return project / "built"


def test_a_failed_compile_leaves_a_package_that_works_and_says_why(project: Path) -> None:
    (project / "csrc/common/tensors.h").write_text("#error this does not compile\n")
    built = build(project)
    assert not list(built.glob("r2r_kernels/_C*.so"))
    assert (built / "r2r_kernels/_C_missing.txt").read_text().startswith("compiling it failed: ")
    program = (
        "import torch, r2r_kernels.functional as F, r2r_kernels.env as env\n"
        "x = torch.randn(1, 4, 2, 2)\n"
        "assert torch.equal(F.simple_gate(x), x[:, :2] * x[:, 2:]) and F.simple_gate(x).shape == (1, 2, 2, 2)\n"
        "print(env.facts()['native operators'])\n"
    )
    said = imported(built, program)
    assert "no: compiling it failed: " in said
    assert said.count("UserWarning: r2r_kernels runs on plain PyTorch, slower: no native operators: compiling") == 1


def test_no_compiler_is_told(project: Path) -> None:
    built = build(project, PATH=str(Path(sys.executable).parent), CXX="")
    assert (built / "r2r_kernels/_C_missing.txt").read_text() == "no C++ compiler was found (set CXX)\n"
    built = build(project, CXX="/none")
    assert (built / "r2r_kernels/_C_missing.txt").read_text() == "CXX=/none was not found\n"


def test_a_later_build_that_works_takes_the_reason_away(project: Path) -> None:
    sources = project / "csrc"
    shutil.rmtree(sources)
    sources.mkdir()
    module = '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.attr("torch") = R2R_TORCH; }\n'
    (sources / "registration.cpp").write_text("#error not yet\n")
    assert (build(project) / "r2r_kernels/_C_missing.txt").exists()
    (sources / "registration.cpp").write_text(module)
    built = build(project)
    assert not (built / "r2r_kernels/_C_missing.txt").exists()
    assert len(list(built.glob("r2r_kernels/_C*.so"))) == 1


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is absent")
def test_cuda_sources_are_compiled_where_nvcc_is(project: Path) -> None:
    sources = project / "csrc"
    shutil.rmtree(sources)
    sources.mkdir()
    (sources / "registration.cpp").write_text(
        "#include <pybind11/pybind11.h>\nint launch();\n"
        'PYBIND11_MODULE(_C, m) { m.attr("architectures") = R2R_CUDA_ARCHITECTURES; m.def("launch", &launch); }\n'
    )
    (sources / "probe_cuda.cu").write_text(
        "__global__ void nothing() {}\n"
        "int launch() { nothing<<<1, 1>>>(); return static_cast<int>(cudaGetLastError()); }\n"
    )
    built = build(project, TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")
    reason = built / "r2r_kernels/_C_missing.txt"
    assert not reason.exists(), reason.read_text()
    program = "import torch, r2r_kernels._C as c; print(c.architectures, isinstance(c.launch(), int))"
    assert "8.0 9.0+PTX True" in imported(built, program)


def test_the_source_distribution_holds_csrc(project: Path) -> None:
    run(project, "setup.py", "-q", "sdist", "--dist-dir", "dist")
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"csrc/{name}" for name in files(ROOT / "csrc")} | {"setup.py", "constraints.txt"} <= names


def test_a_build_without_a_compiler_holds_csrc_too(project: Path) -> None:
    built = build(project, CXX="/none")
    assert files(ROOT / "csrc") == files(built / "r2r_kernels/csrc")
