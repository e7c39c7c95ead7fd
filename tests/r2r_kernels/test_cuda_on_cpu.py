"""The CUDA operators as C++ (`cuda_on_cpu/`), in a process of its own: their tests, watched by the sanitizers of
addresses (global, shared and local memory beside what is there) and of alignment (16 bytes that do not lie on 16)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r2r_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = "gated_conv and not spill and not opcheck and not caches"
TESTS = ("tests/r2r_kernels/test_gated_conv.py", "tests/r2r_kernels/test_contract.py")
STAND_IN = Path(__file__).with_name("cuda_on_cpu")
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover"
# Fibres share static variables, which a function cannot tell from its own.
FLAGS = f"-std=c++20 -O1 -fPIC -shared -fno-ipa-reference -Wno-unknown-pragmas -Wno-psabi {SANITIZERS}"


def runtime(compiler: str, sanitizer: str) -> str:
    """The library that has to be in the process before all others; GCC says where it is."""
    name = f"lib{sanitizer}.so"
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if found in ("", name):
        pytest.skip(f"the compiler has no {name}")
    return found


def test_gated_conv(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or not extension.available():
        pytest.skip("g++ is needed, and the extension")
    preload = f"{runtime(compiler, 'asan')} {runtime(compiler, 'ubsan')}"
    # In one folder, so that the stand-in for cuda.cuh is the one that they include.
    for source in (*(ROOT / "csrc").glob("*.cu*"), *STAND_IN.glob("*.c*")):
        shutil.copy(source, tmp_path)
    package = Path(torch.__file__).parent
    includes = ["-I", str(ROOT / "csrc"), "-isystem", str(package / "include")]
    made = tmp_path / "operators.so"
    command = [compiler, *FLAGS.split(), "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes]
    command += [str(tmp_path / "operators.cpp"), "-o", str(made), f"-L{package / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    environment = os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "R2R_CUDA_ON_CPU": str(made),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("R2R_KERNELS", None)
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "tests.r2r_kernels.cuda_on_cpu.plugin"]
    pytest_ += ["-p", "no:cacheprovider", "-m", "not gpu", "-k", CHOSEN, *TESTS]
    done = subprocess.run(pytest_, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "gated_conv.cu" in done.stderr + done.stdout  # PyTorch says whose operators it took
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
