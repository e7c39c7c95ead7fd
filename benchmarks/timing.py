"""Timing rivals against each other, round by round, so that what disturbs one disturbs all.

A round takes one sample of every rival, in an order drawn anew; a row is the median, the 20th and the 80th percentile
over the rounds. On a GPU a sample is one call between two events, after the L2 cache was overwritten. On a CPU it is as
many calls as take a millisecond, and data small enough stay in the caches, as they do in a model.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

_LEAST_SAMPLE = 1e-3  # seconds; below this a CPU's clock and Python's loop are felt
_LONG = 60.0  # seconds after which nothing is called just to warm up, or once more


@dataclass(frozen=True)
class Effort:
    """Rounds as they fit into `seconds`, but no fewer than `least` and no more than `most`; one where a round takes
    minutes, which is that in which the contenders were observed. name: of a kind of run. compiles_models: there whole
    models are compiled and exported too, a minute or two each. tunes: also with max-autotune, which takes many."""

    seconds: float
    least: int
    most: int
    name: str = ""
    compiles_models: bool = False
    tunes: bool = False

    def rounds(self, seconds_a_round: float) -> int:
        if seconds_a_round > _LONG:
            return 1
        return max(self.least, min(self.most, int(self.seconds / max(seconds_a_round, 1e-9))))


QUICK = Effort(seconds=1.5, least=3, most=20, name="quick")
EVERYDAY = Effort(seconds=2.5, least=3, most=30, name="everyday", compiles_models=True)
FULL = Effort(seconds=5.0, least=3, most=100, name="full", compiles_models=True, tunes=True)


class Unavailable(Exception):
    """Why a rival is not measured here, in one line."""


@dataclass
class Contender:
    """What is timed: `phases` run one after the other, each with a row of its own. `note` goes into the rows. compiles:
    the first call is unlike the others."""

    phases: dict[str, Call]
    note: str = ""
    compiles: bool = False


@dataclass(frozen=True)
class Observation:
    """One call: seconds by phase, and `peak` bytes beyond what was held before."""

    seconds: dict[str, float]
    peak: int | None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Measurement:
    """Of one contender: seconds a call by phase, one for each round; `peak` bytes beyond what was held before."""

    peak: int | None = None
    iterations: int = 1
    samples: dict[str, list[float]] = field(default_factory=dict)


def measure(
    contenders: dict[str, Contender], first: dict[str, Observation], device: torch.device, effort: Effort
) -> dict[str, Measurement]:
    """Interleaved samples of contenders, whose first calls were observed."""
    measurements, observed, a_round = {}, {}, 0.0
    for name, contender in contenders.items():
        warm = first[name].total > _LONG and not contender.compiles
        one = observed[name] = first[name] if warm else observe(contender, device)[1]
        iterations = 1
        if device.type == "cpu" and len(contender.phases) == 1:
            iterations = max(1, round(_LEAST_SAMPLE / max(one.total, 1e-7)))
        measurements[name] = Measurement(one.peak, iterations, {phase: [] for phase in contender.phases})
        a_round += one.total * iterations
    rounds = effort.rounds(a_round)
    if rounds == 1:
        for name, measured in measurements.items():
            measured.iterations = 1
            measured.samples = {phase: [seconds] for phase, seconds in observed[name].seconds.items()}
        return measurements
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                measured = measurements[name]
                sample = _sample_gpu if device.type == "cuda" else _sample_cpu
                for phase, seconds in sample(contenders[name], measured.iterations, device).items():
                    measured.samples[phase].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return measurements


def _sample_cpu(contender: Contender, iterations: int, device: torch.device) -> dict[str, float]:
    seconds = {}
    for phase, call in contender.phases.items():
        start = time.perf_counter()
        for _ in range(iterations):
            call()
        seconds[phase] = (time.perf_counter() - start) / iterations
    return seconds


def _sample_gpu(contender: Contender, iterations: int, device: torch.device) -> dict[str, float]:
    _scratch(device).zero_()  # the inputs leave the L2, and the launches of short calls are queued behind this
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(contender.phases) + 1)]
    events[0].record()
    for call, event in zip(contender.phases.values(), events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize(device)
    between = zip(contender.phases, events, events[1:], strict=False)
    return {phase: start.elapsed_time(end) / 1e3 for phase, start, end in between}


@cache
def _scratch(device: torch.device) -> torch.Tensor:
    """Several times the L2 cache."""
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 2**26)
    return torch.empty(size, dtype=torch.int8, device=device)


def observe(contender: Contender, device: torch.device) -> tuple[list[Any], Observation]:
    """What each phase of one call answers, and the call."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before: int | None = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = _reset_peak()
    answers, seconds = [], {}
    for phase, call in contender.phases.items():
        start = time.perf_counter()
        answers.append(call())
        synchronize(device)
        seconds[phase] = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _memory("VmHWM")
    peak = None if before is None or after is None else max(0, after - before)
    return answers, Observation(seconds, peak)


def _reset_peak() -> int | None:
    """Give free memory back and set the process's peak to what it holds (Linux); bytes held, None elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


def _memory(name: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
    return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(samples: Sequence[float], percent: int) -> float:
    """With linear interpolation between the ranks."""
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]
