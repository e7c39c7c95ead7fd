"""Builds `r2r_kernels._C` from csrc/ with ninja; everything else is in pyproject.toml.

The extension uses PyTorch's stable C++ interface: it is compiled against the headers of the PyTorch of this environment
(also under pip's build isolation, without importing it) and loads with every torch >= 2.10. Without PyTorch, a compiler
or success the install is pure Python, and `r2r_kernels/_C_missing.txt` says why. CXX, NVCC, TORCH_CUDA_ARCH_LIST and
MAX_JOBS are honoured.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
FILES = sorted(p.relative_to(ROOT).as_posix() for p in CSRC.rglob("*") if p.is_file())
SOURCES = [file for file in FILES if file.endswith((".cpp", ".cu"))]  # compiled once
HEADERS = [file for file in FILES if file.endswith((".h", ".cuh"))]
# OP-inl.h beside OP.h has the kernels of an operator: compiled once for each instruction set. Other files are included.
KERNELS = [file for file in HEADERS if file.endswith("-inl.h") and file.replace("-inl.h", ".h") in HEADERS]

# Link order matters: of code that is not specific to an instruction set, the linker keeps the first copy. So the
# sources come first, then the kernels, those of the least capable instruction set first.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma"
    INSTRUCTION_SETS["avx512"] = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + " -mavx512bf16"
# Code hoisting makes products that two branches share before the branch, more of them than there are registers.
FLAGS = "-std=c++20 -O3 -fno-code-hoisting -fno-math-errno -fno-trapping-math -fPIC -fvisibility=hidden"
FLAGS += " -Wall -Wextra -Wno-psabi"
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable interface of torch 2.10
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # as far as nvcc knows them, the last also as PTX
JOB_BYTES = 2 << 30  # memory that one compiler may take


class BuildError(Exception):
    """Why there will be no extension, in one line."""


def find_torch() -> tuple[Path, str]:
    """Folder and version of the PyTorch of this environment. pip's build isolation hides it from imports only."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
            return folder, found.group(1) if found else "unknown"
    raise BuildError(
        "PyTorch >= 2.10 was not installed where the package was built; install it, then this package again"
    )


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX may hold a launcher before it and flags behind, as in "ccache g++ -m64"."""
    wanted = os.environ.get("CXX")
    for command in (shlex.split(wanted),) if wanted else (["c++"], ["g++"]):
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    raise BuildError(f"CXX={wanted} was not found" if wanted else "no C++ compiler was found (set CXX)")


def host_compiler(command: list[str]) -> str:
    """What of `find_compiler` nvcc takes: the compiler itself, with its flags passed on."""
    words = [word for word in command if not word.startswith("-")]
    flags = [f"-Xcompiler {in_command(word)}" for word in command if word.startswith("-")]
    return " ".join([f"-ccbin {in_command(words[-1])}", *flags])


def find_nvcc() -> Path | None:
    path = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(path, os.X_OK):
        return None
    # What is on the path may be a script elsewhere: ask nvcc where it lives.
    shown = subprocess.run([path, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", shown)
    return Path(top.group(1)) if top else None


def known_architectures(nvcc: Path) -> str:
    """Those of CUDA_ARCHITECTURES that this nvcc compiles for, as a list for `cuda_flags`."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [one for one in CUDA_ARCHITECTURES if f"sm_{one.replace('.', '')}" in listed]
    return ";".join(known or CUDA_ARCHITECTURES) + "+PTX"


def cuda_flags(architectures: str) -> str:
    """Code generation flags for a list such as "8.0;9.0+PTX"."""
    flags = []
    for item in re.split(r"[;, ]+", architectures.strip()):
        number, *suffix = item.removesuffix("+PTX").partition(".")
        number += suffix[-1]
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if item.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def jobs() -> int:
    if limit := os.environ.get("MAX_JOBS"):
        return max(1, int(limit))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        memory = JOB_BYTES
    return max(1, min(processors, memory // JOB_BYTES))


def in_command(path: str | Path) -> str:
    """A path as the shell takes it, in a command of a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def in_build(path: str | Path) -> str:
    """A path as ninja takes it among inputs and outputs; it quotes $in and $out itself."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def compile_extension(output: Path, work: Path) -> None:
    """Write the ninja file, run it, and leave the extension at `output`."""
    import pybind11  # a build requirement: not there when setup.py is only read

    torch, version = find_torch()
    compiler = find_compiler()
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise BuildError("ninja was not found")
    cuda_sources = [source for source in SOURCES if source.endswith(".cu")]
    cuda = find_nvcc() if cuda_sources else None
    architectures = (os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures(cuda / "bin/nvcc")) if cuda else ""

    shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    facts = {
        "COMPILER": (shown or compiler)[0],
        "FLAGS": FLAGS,
        "TORCH": version,
        "CUDA_ARCHITECTURES": architectures,
    }
    # pybind11 before PyTorch's copy of it, which up to torch 2.11 refuses to be included beside the stable interface.
    includes: list[str | Path] = [pybind11.get_include(), torch / "include", sysconfig.get_path("include")]
    common = " ".join([TARGET, *(f"-isystem {in_command(folder)}" for folder in includes)])
    lines = [
        f"cxx = {' '.join(map(in_command, compiler))}",
        f"rule cxx\n  command = $cxx -MMD -MF $out.d {FLAGS} $flags -x c++ -c $in -o $out\n  depfile = $out.d",
        f"rule link\n  command = $cxx -shared $in -o $out -L{in_command(torch / 'lib')} -ltorch_cpu $libraries",
    ]
    libraries = ""
    if cuda:
        program = f"{in_command(cuda / 'bin/nvcc')} {host_compiler(compiler)}"
        nvcc = f"{program} -std=c++20 -O3 -Xcompiler -fPIC {cuda_flags(architectures)}"
        lines.append(
            f"rule nvcc\n  command = {nvcc} -MD -MF $out.d {common} -DUSE_CUDA -c $in -o $out\n  depfile = $out.d"
        )
        folders = " ".join(f"-L{in_command(cuda / name)}" for name in ("lib64", "lib"))
        libraries = f"{folders} -lcudart_static -ldl -lrt -lpthread"

    objects: list[str] = []

    def compiled(source: str, target: str, rule: str, flags: str) -> None:
        lines.append(f"build {target}: {rule} {in_build((ROOT / source).resolve())}\n  flags = {flags}")
        objects.append(target)

    for source in SOURCES:
        if source.endswith(".cpp"):
            named = facts if source == "csrc/registration.cpp" else {}
            flags = common + "".join(f" -DR2R_{key}='\"{value}\"'" for key, value in named.items())
            compiled(source, f"{Path(source).stem}.o", "cxx", flags)
        elif cuda:
            compiled(source, f"{Path(source).stem}_cuda.o", "nvcc", "")
    for isa, flags in INSTRUCTION_SETS.items():
        for source in KERNELS:  # they know nothing of PyTorch
            compiled(source, f"{Path(source).stem}_{isa}.o", "cxx", f"-DR2R_ISA={isa} {flags}")
    lines.append(f"build {in_build(output.name)}: link {' '.join(objects)}\n  libraries = {libraries}")
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")

    done = subprocess.run([ninja, "-C", str(work), "-j", str(jobs())], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise BuildError(f"compiling it failed: {(errors or ['see the build log'])[0].strip()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work / output.name, output)


def tell(line: str) -> None:
    """Say it in the build's log, and, as pip shows no log where a build ends well, on the terminal itself."""
    print(line, file=sys.stderr)
    with suppress(OSError), open("CON" if os.name == "nt" else "/dev/tty", "w") as terminal:
        terminal.write(f"\n{line}\n")


class BuildExtension(build_ext):
    """Compiles the one extension, or says in the package why there is none."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folders = [Path(self.build_lib, "r2r_kernels"), output.parent]
        if self.inplace:
            folders.append(ROOT / "r2r_kernels")
        else:
            shutil.copytree(CSRC, Path(self.build_lib, "r2r_kernels/csrc"), dirs_exist_ok=True)
        for folder in folders:  # nothing of an earlier build may speak for this one
            (folder / "_C_missing.txt").unlink(missing_ok=True)
            (folder / output.name).unlink(missing_ok=True)
        try:
            compile_extension(output, Path(self.build_temp).resolve() / "ninja")
        except (BuildError, ImportError, OSError) as error:
            tell(f"r2r_kernels: no native operators: {error}")
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "_C_missing.txt").write_text(f"{error}\n")


setup(
    license="Apache-2.0",
    ext_modules=[Extension("r2r_kernels._C", SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    package_data={
        "r2r_kernels": ["_C_missing.txt", "configs/*"],
        "r2r.weights": ["default/*"],
        "r2r.web": ["*.css", "*.js"],
    },
)
