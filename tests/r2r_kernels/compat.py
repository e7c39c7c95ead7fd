"""make compat: the package with every PyTorch and Triton that it supports, on one machine without a GPU.

python -m tests.r2r_kernels.compat [FOLDER] [torch-2.11.0 triton-3.6.0 ...]

PyTorch's headers are unpacked from its smallest wheel, that for macOS. CUDA's compiler and Triton are wheels too. All
are kept in FOLDER (build/compat), some 800 MB. With the headers of each PyTorch `setup.py` builds the extension, CUDA
included. That has to load into the PyTorch installed here and to pass the operators' tests there. What it asks of
PyTorch has to be in the library of those headers. With each Triton the kernels are compiled ahead of time for all
architectures. All of it takes an hour on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TORCHES = ("2.10.0", "2.11.0", "2.13.0", "2.14.1")
TRITONS = ("3.6.0", "3.7.1")
NVCC = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-cuda-runtime": "13.0.96",
    "nvidia-cuda-cccl": "13.0.85",
}
MACOS = ["--python-version", "3.12", *(f"--platform=macosx_{version}_0_arm64" for version in (11, 12, 13, 14))]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def unpacked(package: str, version: str, folder: Path, *options: str) -> Path:
    """The folder of a wheel's files; downloaded where it is not there yet."""
    to = folder / f"{package}-{version}"
    if not to.exists():
        wheels = folder / "wheels" / package
        shutil.rmtree(wheels, ignore_errors=True)
        pip: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            wheels,
        ]
        run(*pip, *options, f"{package}=={version}")
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(to.with_suffix(".part"))
        shutil.rmtree(wheels)
        to.with_suffix(".part").rename(to)
    return to


def cuda_compiler(folder: Path) -> Path:
    """nvcc with all that it needs beside it."""
    for package, version in NVCC.items():
        shutil.copytree(unpacked(package, version, folder), folder / "cuda", dirs_exist_ok=True)
    (nvcc,) = (folder / "cuda").rglob("bin/nvcc")
    for tool in (*nvcc.parent.iterdir(), *nvcc.parents[1].glob("nvvm/bin/*")):
        if tool.is_file():
            tool.chmod(0o755)  # zipfile forgets it
    return nvcc


def check_torch(version: str, folder: Path) -> str:
    wheel = unpacked("torch", version, folder, *MACOS) / "torch"
    headers = folder / f"headers-{version}/torch"
    shutil.rmtree(headers.parent, ignore_errors=True)
    headers.mkdir(parents=True)
    (headers / "__init__.py").touch()
    shutil.copy(wheel / "version.py", headers)
    (headers / "include").symlink_to(wheel / "include")
    (headers / "lib").symlink_to(Path(torch.__file__).parent / "lib")

    built = folder / f"built-{version}"
    shutil.rmtree(built, ignore_errors=True)
    run(
        sys.executable, "setup.py", "build", "--build-lib", built, "--build-temp", folder / "objects",
        PYTHONPATH=str(headers.parent), NVCC=str(cuda_compiler(folder)),
    )  # fmt: skip
    missing = built / "r2r_kernels/_C_missing.txt"
    if missing.exists():
        raise SystemExit(f"torch {version}: {missing.read_text()}")
    (extension,) = (built / "r2r_kernels").glob("_C*.so")

    names = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", extension).splitlines()]
    asked = [name for name in names if name.startswith(("aoti_torch", "torch_"))]
    library = (wheel / "lib/libtorch_cpu.dylib").read_bytes()
    absent = [name for name in asked if b"\0_%s\0" % name.encode() not in library]
    if absent or not asked:
        raise SystemExit(f"torch {version} has no {', '.join(absent)}")

    shutil.copytree(ROOT / "tests", built / "tests", dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", built)
    said = run(
        sys.executable, "-c", "from r2r_kernels import env; print(env.facts()['  built with torch'])", cwd=built,
        PYTHONPATH=str(built),
    )  # fmt: skip
    assert said.strip() == version, said
    operators = ("gated_conv", "layer_norm_2d", "naf_block")
    tests = [f"tests/r2r_kernels/test_{name}.py" for name in (*operators, "contract")]
    chosen = f"({' or '.join(operators)}) and not opcheck and not caches"
    command = (sys.executable, "-m", "pytest", "-q", "-k", chosen, *tests)
    passed = run(*command, cwd=built, OMP_NUM_THREADS="1")
    return f"{len(asked)} symbols found; with torch {torch.__version__}: {passed.splitlines()[-1]}"


def check_triton(version: str, folder: Path) -> str:
    where = unpacked("triton", version, folder)
    for tool in where.glob("triton/backends/nvidia/bin/*"):
        tool.chmod(0o755)
    tests = ["tests/r2r_kernels/triton/test_aot.py"]
    return run(sys.executable, "-m", "pytest", "-q", *tests, PYTHONPATH=str(where)).splitlines()[-1]


def main() -> None:
    folder, *wanted = sys.argv[1:] or [str(ROOT / "build/compat")]
    for package, versions, check in (("torch", TORCHES, check_torch), ("triton", TRITONS, check_triton)):
        for version in versions:
            if not wanted or f"{package}-{version}" in wanted:
                print(f"{package} {version}: {check(version, Path(folder).resolve())}", flush=True)


if __name__ == "__main__":
    main()
