"""Launch configurations: tile sizes and warps of each kernel, from `r2r_kernels/configs/<architecture>.json`.

A file maps kernel -> "half" | "float32" -> upper bound of the channels ("32", "64", ... or "more") -> the keyword
arguments of the launch. `default.json` is complete; a file named after an architecture ("sm_90", "gfx942") replaces
what it names of it. Nothing is tuned while a program runs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

Config = dict[str, int]

FOLDER = Path(__file__).resolve().parents[1] / "configs"


def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942`, ...; "default" for a device that is no GPU."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def table(arch: str) -> dict[str, dict[str, dict[str, Config]]]:
    """All configurations for an architecture."""
    kernels = json.loads((FOLDER / "default.json").read_text())
    own = FOLDER / f"{arch}.json"
    if own.is_file():
        for kernel, dtypes in json.loads(own.read_text()).items():
            kernels[kernel] = {**kernels[kernel], **dtypes}
    return kernels


@functools.cache
def _lookup(kernel: str, channels: int, size: str, arch: str) -> Config | None:
    bounded = table(arch)[kernel].get(size, {})
    for bound, config in bounded.items():
        if bound == "more" or channels <= int(bound):
            return config
    return None


def lookup(kernel: str, channels: int, x: torch.Tensor) -> Config | None:
    """The configuration of a kernel for that many channels and the dtype and device of x; None where it has none."""
    size = "float32" if x.dtype == torch.float32 else "half"
    return _lookup(kernel, channels, size, architecture(x.device))


def require(kernel: str, channels: int, x: torch.Tensor) -> Config:
    """As `lookup`, for kernels that take any number of channels."""
    config = lookup(kernel, channels, x)
    assert config is not None, kernel
    return config
