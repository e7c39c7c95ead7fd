"""Where a model runs: the choice of a device, and the memory that is free there."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

import psutil
import torch
from torch import nn

from r2r.errors import InputError

_DEVICES = ("cpu", "cuda", "mps")

_TRIMMED_FROM, _MOST_MAPPED = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of mallopt(3)


def pick_device(name: str) -> torch.device:
    """ "auto": a GPU where there is one (CUDA, ROCm or Apple's). Raises InputError for a device that is not there."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}; accepted: auto, {', '.join(_DEVICES)}, cuda:1 ...") from error
    if device.type not in _DEVICES or (device.type != "cuda" and device.index):
        raise InputError(f"device {name!r}; accepted: auto, {', '.join(_DEVICES)}, cuda:1 ...")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def device_of(module: nn.Module) -> torch.device:
    """The device that holds the module: that of its first parameter or buffer."""
    return next(chain(module.parameters(), module.buffers())).device


def device_name(device: torch.device) -> str:
    """In words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def synchronise(device: torch.device) -> None:
    """Wait for what was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, or to this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # a container's limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return min(free)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were taken so far: on a GPU by tensors, on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, ValueError, IndexError):  # Linux; getrusage starts from what the parent's process held
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Have this process keep what tensors free, for the next ones. The C library gives large ones back to the system;
    fetching their pages anew takes a fifth of the time of restoring a photo. The process grows by a tenth to a quarter,
    as not every block fits again (docs/notes/performance.md). Only glibc can do this; elsewhere nothing changes."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_MOST_MAPPED, 0)  # blocks come from the heap, whatever their size
            library.mallopt(_TRIMMED_FROM, 2**31 - 1)


def resident_memory() -> int:
    """Bytes that this process holds now. The C library keeps freed memory; it is given back first, where that can be
    done."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss
