"""Launch configurations: tile sizes and warps of each kernel, from `r2r_kernels/configs/<architecture>.json`.

A file maps kernel -> "16-bit" | "float32" -> upper bound of the channels ("32", "64", ... or "more") -> the keyword
arguments of the launch, or upper bound of the pixels of all images -> these. `default.json` is complete; a file named
after an architecture ("sm_90", "gfx942") replaces what it names of it. Nothing is tuned while a program runs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]
Entry = Config | dict[str, Config]  # of some channels: for all sizes, or by pixels

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
def table(arch: str) -> dict[str, dict[str, dict[str, Entry]]]:
    """All configurations for an architecture."""
    kernels = json.loads((FOLDER / "default.json").read_text())
    own = FOLDER / f"{arch}.json"
    if own.is_file():
        for kernel, dtypes in json.loads(own.read_text()).items():
            kernels[kernel] = {**kernels[kernel], **dtypes}
    return kernels


def within(bounded: dict[str, Any], number: int) -> Any:
    """What stands at the first bound that is not below the number; None where all are."""
    return next((value for bound, value in bounded.items() if bound == "more" or number <= int(bound)), None)


def by_pixels(entry: Entry) -> dict[str, Config]:
    """An entry as bound of the pixels -> configuration."""
    config: Any = entry
    return config if any(isinstance(value, dict) for value in config.values()) else {"more": config}


@functools.cache
def _bounds(kernel: str, channels: int, size: str, arch: str) -> dict[str, Config]:
    entry = within(table(arch)[kernel].get(size, {}), channels)
    return {} if entry is None else by_pixels(entry)


def lookup(kernel: str, channels: int, x: torch.Tensor, pixels: int) -> Config | None:
    """The configuration of a kernel for that many channels and pixels and the dtype and device of x; None where it has
    none."""
    size = "float32" if x.dtype == torch.float32 else "16-bit"
    found: Config | None = within(_bounds(kernel, channels, size, architecture(x.device)), pixels)
    return found


def require(kernel: str, channels: int, x: torch.Tensor, pixels: int = 0) -> Config:
    """As `lookup`, for kernels that take any number of channels; `pixels` where their entries differ by it."""
    config = lookup(kernel, channels, x, pixels)
    assert config is not None, kernel
    return config
