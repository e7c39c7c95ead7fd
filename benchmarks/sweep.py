"""Find the launch configurations of the Triton kernels on this GPU: python -m benchmarks.sweep [--time-limit S]

For each kernel, dtype, bound of channels and size (28 x 28 alone, and what fills the chip): from what is in use, the
candidates that the kernel's module names, then configurations next to the best (one number halved or doubled) while
that helps. Only what answers as before counts. Where the two sizes want different ones, entries are kept apart by
pixels. Writes r2r_kernels/configs/<architecture>.json after each kernel. With `--rows`, the file that
`benchmarks.kernels` wrote, what is furthest from its limit comes first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import kernels as measured
from benchmarks import timing
from benchmarks.on_gpu import read
from benchmarks.race import TOLERANCE, apart
from benchmarks.rivals import tensors_of
from r2r.files import atomic_path
from r2r_kernels import triton as kernels
from r2r_kernels.triton import configs

Config = dict[str, int]

_ELEMENTS = 2**26  # of x where the chip is to be full: several times the L2 cache
_FEW = 4096  # pixels: below, another entry may be better
_BLOCKS = 28  # of the model's 36 blocks have 28 x 28 pixels at 224 x 224
_GAIN = 0.98  # what is not this much better is noise


class Job(NamedTuple):
    """One entry of the table that is tuned: the kernel, "16-bit" or "float32", bound of the channels, bound of the
    pixels."""

    kernel: str
    size: str
    bound: str
    pixels: str

    def channels(self, table: dict[str, Any]) -> int:
        if self.bound != "more":
            return int(self.bound)
        others = [int(other) for other in table[self.kernel][self.size] if other != "more"]
        return 2 * max(others) if others else 64

    def shape(self, channels: int) -> tuple[int, int, int, int]:
        if self.pixels != "more":
            return 1, channels, 28, 28
        side = max(16, math.isqrt(_ELEMENTS // channels) // 16 * 16)
        return 1, channels, side, side


def search(
    start: Config | None, candidates: Iterable[Config], cost: Callable[[Config | None], float]
) -> tuple[Config | None, float, float]:
    """The best configuration, its cost, and that of `start`; cost is infinite for what does not run. A start of None is
    another way to the same answer."""
    known: dict[str, float] = {}

    def cached(config: Config | None) -> float:
        name = json.dumps(config, sort_keys=True)
        if name not in known:
            known[name] = cost(config)
        return known[name]

    first = cached(start)
    best, least = start, first
    for config in candidates:
        if cached(config) < _GAIN * least:
            best, least = config, cached(config)
    improved = True
    while improved and best is not None:
        improved = False
        for config in neighbours(best):
            if cached(config) < _GAIN * least:
                best, least, improved = config, cached(config), True
    return best, least, first


def neighbours(config: Config) -> list[Config]:
    """One number halved or doubled; none below 1, at most 16 warps and 5 stages."""
    most = {"num_warps": 16, "num_stages": 5}
    numbers = {key: value for key, value in config.items() if key != "ATTEND"}
    changed = [(key, value) for key, old in numbers.items() for value in (old // 2, 2 * old)]
    return [{**config, key: value} for key, value in changed if 1 <= value <= most.get(key, 1024)]


def candidates(kernel: str) -> list[Config]:
    """What the kernel's module names."""
    operator, _, part = kernel.partition(".")
    module = importlib.import_module(f"r2r_kernels.triton.{operator}")
    return [dict(one) for one in module.CANDIDATES[part]]


def call_of(job: Job, channels: int, device: torch.device, shape: tuple[int, int, int, int]) -> Callable[[], Any]:
    """What launches the kernel, with little else."""
    operator, _, part = job.kernel.partition(".")
    dtype = torch.float32 if job.size == "float32" else torch.float16 if device.type == "cpu" else torch.bfloat16
    if operator == "naf_block":
        if part == "unfold":
            return measured._operator("naf_block", shape, True)(device, dtype)
        return measured._part(part, shape)(device, dtype)
    if operator in ("bank_retrieve", "slot_conv"):
        sizes = (1, 5, 53, max(1, channels // 8), channels, 8) if device.type == "cuda" else (1, 2, 16, 2, 4, 3)
        return measured._bank(job.kernel, *sizes)(device, dtype)
    if operator == "local_mean_2d":
        return measured._operator(operator, shape, False)(device, dtype)
    return measured._operator(operator, shape, part.endswith("backward"))(device, dtype)


def jobs(table: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[Job]:
    """All entries of the table, by how far the kernel is from its limit where `rows` tell."""
    found = []
    for kernel, sizes in table.items():
        for size, bounds in sizes.items():
            more = ["128", "256"] if kernel == "naf_block.gated" and size == "16-bit" else []
            for bound in dict.fromkeys([*bounds, *more]):
                found += [Job(kernel, size, bound, pixels) for pixels in (str(_FEW), "more")]
    lost: dict[tuple[str, str], float] = {}
    for row in rows:
        if "us" in row and "limit_us" in row:
            _, channels, height, width = map(int, row["size"].split("x"))
            deep = height * width < _FEW and row["size"].startswith("1x")
            name = {"naf_block.depthwise": "depthwise_gate.forward"}.get(row["name"], row["name"].replace(" ", "."))
            name = name if "." in name or name == "local_mean_2d" else f"{name}.forward"
            place = name, f"{channels} {_FEW if deep else 'more'}"
            lost[place] = (row["us"] - row["limit_us"]) * (_BLOCKS if deep and channels == 256 else 1)

    def gain(job: Job) -> float:
        channels = "256" if job.bound == "more" else job.bound
        return lost.get((job.kernel, f"{channels} {job.pixels}"), 0.0) if job.size == "16-bit" else -1.0

    return iter(sorted(found, key=gain, reverse=True))


def placed(bounds: dict[str, Any], bound: str, pixels: str, config: Config | None) -> dict[str, Any]:
    """The entries of a kernel, bound of the channels -> bound of the pixels -> configuration, with one replaced, or
    left out where it is None. What is set for all sizes leaves the entry for few pixels as it was."""
    entry = dict(configs.by_pixels(bounds[bound])) if bound in bounds else {}
    if pixels == "more" and "more" in entry:
        entry.setdefault(str(_FEW), entry["more"])
    entry.pop(pixels, None)
    if config is not None:
        entry[pixels] = config
    changed = {**bounds, bound: _ordered(entry)}
    return _ordered({one: value for one, value in changed.items() if value})


def _ordered(bounded: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(bounded.items(), key=lambda item: math.inf if item[0] == "more" else int(item[0])))


class Sweep:
    """The search of one job after the other, on one device."""

    def __init__(self, device: torch.device, up: Callable[[], bool]) -> None:
        self.device, self.up = device, up
        self.arch = configs.architecture(device)
        self.table: dict[str, Any] = configs.table(self.arch)

    def use(self, job: Job, before: dict[str, Any], config: Config | None) -> None:
        self.table[job.kernel][job.size] = placed(before, job.bound, job.pixels, config)
        configs._bounds.cache_clear()

    def tune(self, job: Job) -> str:
        """Put the best configuration into the table; what was found, in a line."""
        before = self.table[job.kernel].get(job.size, {})
        channels = job.channels(self.table)
        call = call_of(job, channels, self.device, job.shape(channels))
        wanted = [t.clone() for t in tensors_of(call())]
        tolerance = TOLERANCE["float32" if job.size == "float32" else "bfloat16"]

        def cost(config: Config | None) -> float:
            if self.up():
                return math.inf
            self.use(job, before, config)
            try:
                if not apart(tensors_of(call()), wanted, None) < tolerance:
                    return math.inf
                contender = timing.Contender({"": call})
                _, once = timing.observe(contender, self.device)
                one = timing.measure({"": contender}, {"": once}, self.device, timing.Effort(0.03, 5, 20))[""]
            except Exception as problem:  # too much shared memory, a shape the kernel does not take
                self.stop_if_broken(problem)
                return math.inf
            return timing.percentile(one.samples[""], 50)

        number = _FEW if job.pixels != "more" else 2**62
        current = configs.within(configs.by_pixels(before[job.bound]), number) if job.bound in before else None
        try:
            best, least, first = search(current, candidates(job.kernel), cost)
        except BaseException:
            self.table[job.kernel][job.size] = before
            raise
        self.use(job, before, best)
        return f"{first * 1e6:.0f} -> {least * 1e6:.0f} us {best}"

    def stop_if_broken(self, problem: Exception) -> None:
        """After some CUDA errors nothing works in this process any more: no later figure would mean anything."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.zeros(1, device=self.device).item()
            except Exception:
                said = f"the GPU answers no more, after {type(problem).__name__}: {problem}"
                raise SystemExit(said) from problem


def sweep(device: torch.device, out: Path, time_limit: float, rows: list[dict[str, Any]]) -> None:
    """Search configurations and write those found into `out`, entry by entry, until the time is up."""
    start = time.monotonic()
    one = Sweep(device, lambda: time.monotonic() - start > time_limit)
    own = configs.FOLDER / f"{one.arch}.json"
    found: dict[str, Any] = json.loads(own.read_text()) if own.exists() else {}
    for job in jobs(one.table, rows):
        if one.up():
            print("the time is up", flush=True)
            return
        try:
            print(" ".join(job), one.tune(job), flush=True)
        except Exception as problem:
            one.stop_if_broken(problem)
            print(f"{' '.join(job)}: not tuned: {type(problem).__name__}: {problem}"[:160], flush=True)
            continue
        found[job.kernel] = {**found.get(job.kernel, {}), job.size: one.table[job.kernel][job.size]}
        with atomic_path(out / f"{one.arch}.json") as path:
            path.write_text(json.dumps(found, indent=2) + "\n")


def practise() -> None:
    """On a CPU, in Triton's interpreter: the kernel of each operator runs once, with its first candidate too."""
    device = torch.device("cpu")
    one = Sweep(device, lambda: False)
    seen = set()
    for job in jobs(one.table, []):
        if job.kernel in seen or job.size == "float32":
            continue
        seen.add(job.kernel)
        before = one.table[job.kernel][job.size]
        for config in (None, candidates(job.kernel)[0]):
            if config is not None:
                one.use(job, before, config)
            call_of(job, 8, device, (1, 8, 3, 4))()
        one.table[job.kernel][job.size] = before
        configs._bounds.cache_clear()
        print(" ".join(job), "ran", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds")
    parser.add_argument("--out", type=Path, help="folder; by default r2r_kernels/configs")
    parser.add_argument("--rows", type=Path, help="a file of benchmarks.kernels: what is furthest from its limit first")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter: run each kernel once")
    given = parser.parse_args(argv)
    if kernels.reason() or not (torch.cuda.is_available() or given.dry):
        print(f"nothing to sweep: {kernels.reason() or 'no GPU'}", file=sys.stderr)
        return 2
    rows = read(given.rows) if given.rows else []
    out = given.out or configs.FOLDER
    out.mkdir(parents=True, exist_ok=True)
    if given.dry:
        practise()
    else:
        sweep(torch.device("cuda"), out, given.time_limit, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
