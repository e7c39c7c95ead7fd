"""What a method costs, measured alike for all of them: each in a process of its own, on one image."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from r2r.device import device_name, peak_memory, resident_memory, synchronise
from r2r.errors import InputError
from r2r.methods import Kind, Method, checked
from r2r.presets import PRESETS

SIZE = 224
"""Height and width of the image, as in the paper's table."""
PAPER = "R2R as published: 19.7 M parameters, 12 GMAC, 846 MB (its paper)"


@dataclass(frozen=True)
class Complexity:
    """parameters: those of the modules that ran, None where none did; buffers: bytes that these modules hold beside
    them, such as R2R's bank. gmacs: 10^9 multiply-accumulates, as PyTorch's flop counter sees convolutions, products
    and attention. seconds: the median of runs that take a second in all, after one to warm up. memory: the most bytes
    that were taken beyond what PyTorch itself takes: weights, activations, workspaces. device: in words."""

    parameters: int | None
    buffers: int
    gmacs: float
    seconds: float
    memory: int
    device: str


def image(device: torch.device, size: int = SIZE) -> Tensor:
    """[1, 3, size, size], always the same."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


@torch.inference_mode()
def measure(method: Method, device: torch.device, size: int = SIZE) -> Complexity:
    """In this process, which should have run no other method: the peak of its memory is taken as the method's."""
    resting = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()
    restore = method.load(device)
    given = image(device, size)

    def seconds() -> float:
        synchronise(device)
        start = time.perf_counter()
        checked(method.name, restore(given), given)
        synchronise(device)
        return time.perf_counter() - start

    seconds()
    times = [seconds()]
    while len(times) < 20 and sum(times) < 1:
        times.append(seconds())
    memory = peak_memory(device) - resting
    with _running() as modules, FlopCounterMode(display=False) as counter:
        restore(given)
    parameters = {id(x): x.numel() for module in modules for x in module.parameters()}
    buffers = {id(x): x.nbytes for module in modules for x in module.buffers()}
    return Complexity(
        sum(parameters.values()) if parameters else None,
        sum(buffers.values()),
        counter.get_total_flops() / 2e9,
        statistics.median(times),
        max(memory, 0),
        device_name(device),
    )


def measure_apart(method: Method, device: torch.device, size: int = SIZE) -> Complexity:
    """`measure` in a new process. Raises InputError as loading does."""
    job = json.dumps({"method": asdict(method), "device": str(device), "size": size})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-m", "r2r.complexity", job], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise InputError(line.removeprefix("error: ") if done.returncode == 2 else f"{method.name}: {line}")
    return Complexity(**json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[tuple[str, Complexity | None]], size: int = SIZE) -> Table:
    """For the terminal; a method that does not run has no figures."""
    device = next((one.device for _, one in rows if one), "")
    shown = Table("method", *HEADINGS, title=f"{size} x {size}, {device}", box=SIMPLE, collapse_padding=True)
    for name, one in rows:
        shown.add_row(name, *cells(one))
    return shown


HEADINGS = ("parameters", "buffers", "GMAC", "seconds", "memory")


def cells(one: Complexity | None) -> list[str]:
    if one is None:
        return ["-"] * len(HEADINGS)
    millions = "-" if one.parameters is None else f"{one.parameters / 1e6:.2f} M"
    buffers, memory = (f"{number / 1e6:.0f} MB" for number in (one.buffers, one.memory))
    return [millions, buffers, f"{one.gmacs:.2f}", f"{one.seconds:.3f}", memory]


def settings(preset: str, tasks: Sequence[str], mixtures: bool = False, eager: bool = False) -> Method:
    """An R2R of a preset, untrained, with a full bank: it costs what a trained one does. Raises InputError."""
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; accepted: {', '.join(PRESETS)}")
    sizes = {**PRESETS[preset], "tasks": list(tasks), "mixtures": mixtures}
    name = f"{preset}, {len(tasks)} tasks{', mixtures' if mixtures else ''}"
    return Method(name, Kind.SIZES, sizes=sizes, eager=eager)


@contextmanager
def _running() -> Iterator[list[nn.Module]]:
    """The modules whose forward pass begins within the block."""
    modules: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: modules.append(module))
    try:
        yield modules
    finally:
        handle.remove()


def _main(job: dict[str, Any]) -> None:
    one = job["method"]
    method = Method(**{**one, "kind": Kind(one["kind"])})
    print(json.dumps(asdict(measure(method, torch.device(job["device"]), job["size"]))))


if __name__ == "__main__":
    try:
        _main(json.loads(sys.argv[1]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
