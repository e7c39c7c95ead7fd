"""Ahead-of-time compilation of what the launchers launch, for GPUs that are not here, and what it costs on them.

A launcher is run on meta tensors while `captured` stands in for the launch: it keeps each kernel with its arguments,
from which the signature follows. So what is compiled is what would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from r2r_kernels.triton import configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that a program may have, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int8: "*i8",
}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        operator = self.kernel.__module__.removeprefix("r2r_kernels.triton.").partition(".")[0]
        return f"{operator}.{self.kernel.__name__.lstrip('_')}"

    @property
    def choices(self) -> dict[str, Any]:
        """What is compiled in: constants and options."""
        constants = (parameter.name for parameter in self.kernel.params if parameter.is_constexpr)
        return {name: self.arguments[name] for name in constants} | self.options


class Usage(NamedTuple):
    """Registers of a thread, bytes of shared memory of a program, and bytes or registers that did not fit."""

    registers: int
    shared: int
    spilled: int


@contextmanager
def captured(arch: str, monkeypatch: Any) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, with the configurations of `arch`."""
    launches: list[Launch] = []

    def keep(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        launches.append(Launch(kernel, arguments, {k: v for k, v in keywords.items() if k not in names}, grid))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", keep)
        patch.setattr(configs, "architecture", lambda device: arch)
        yield launches


def compiled(launch: Launch, arch: str, aligned: bool) -> Usage:
    """What a launch costs, compiled as `binary` does."""
    made = binary(launch, arch, aligned)
    return _amd_usage(made) if arch.startswith("gfx") else _nvidia_usage(made)


def binary(launch: Launch, arch: str, aligned: bool) -> Any:
    """Compile with (aligned) or without the hints that sizes, and of the streaming operators pointers, are multiples
    of 16. Launchers of the others see to it that pointers are (`operators.layout.as_rows`)."""
    pointers = aligned or not launch.name.startswith(("layer_norm_2d.", "simple_gate."))
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if pointers:
                hints[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:  # as the launch does
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, int):
            signature[parameter.name] = "i64" if value >= 2**31 else "i32"
        else:
            signature[parameter.name] = "fp32"
        if aligned and isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
            hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=TARGETS[arch], options=launch.options)


def of_extension(path: str | Path, kernel: str, dtype: str, arch: str) -> Usage:
    """What a CUDA kernel of the extension costs, that for this dtype where it is made for several."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-arch", arch, "-res-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: usage for name, usage in re.findall(r"Function (\S+):\s+(REG.*)", report) if kernel in name}
    (usage,) = [usage for name, usage in found.items() if dtype in name or len(found) == 1]
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Usage(number["REG"], number["SHARED"], number["STACK"] + number["LOCAL"])


def disassembly(made: Any, *options: str) -> str:
    """What cuobjdump says of a kernel compiled for an NVIDIA GPU."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _nvidia_usage(made: Any) -> Usage:
    report = disassembly(made, "-res-usage")
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(number["REG"], made.metadata.shared, number["STACK"] + number["LOCAL"])


def _amd_usage(made: Any) -> Usage:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", made.asm["amdgcn"])[1])  # type: ignore[index]

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size")
    return Usage(number("vgpr_count"), made.metadata.shared, spilled)
