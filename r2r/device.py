"""Where a model runs: the choice of a device, and the memory that is free there."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from r2r.errors import InputError

_UNKNOWN_MEMORY = 4 * 2**30  # what is taken to be free where nothing tells


def pick_device(name: str) -> torch.device:
    """ "auto": a GPU where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def device_of(module: nn.Module) -> torch.device:
    """The device that holds the module: that of its first parameter or buffer."""
    return next(chain(module.parameters(), module.buffers())).device


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, or to this process on a CPU; 4 GiB where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # a container's limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return min(free, default=_UNKNOWN_MEMORY)
