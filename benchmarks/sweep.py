"""Find the launch configurations of the Triton kernels on this GPU: python -m benchmarks.sweep [--time-limit S]

For each kernel, dtype and bound of channels in `r2r_kernels/configs/default.json`: from what is in use, the candidates
that the kernel's module names, then configurations next to the best (one number halved or doubled) while that helps.
Only what answers as before counts. Writes r2r_kernels/configs/<architecture>.json after each kernel.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import timing
from benchmarks.race import TOLERANCE, apart
from benchmarks.rivals import DepthwiseGate, forward, forward_backward, seeds, tensors_of
from benchmarks.sizes import images, settle
from r2r.files import atomic_path
from r2r_kernels import triton as kernels
from r2r_kernels.nn import LayerNorm2d, NAFBlock, SimpleGate
from r2r_kernels.triton import configs

Config = dict[str, int]
Search = tuple[Config, float, float]

_ELEMENTS = 2**26  # of x: several times the L2 cache
_GAIN = 0.98  # what is not this much better is noise

# Operator -> its module for c channels, and the channels of its input
CALLS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "layer_norm_2d": (LayerNorm2d, 1),
    "simple_gate": (lambda c: SimpleGate(), 2),
    "depthwise_gate": (lambda c: DepthwiseGate(c, eager=False), 2),
    "naf_block": (NAFBlock, 1),
}


def search(start: Config, candidates: Iterable[Config], cost: Callable[[Config], float]) -> Search:
    """The best configuration, its cost, and that of `start`; cost is infinite for what does not run."""
    known: dict[str, float] = {}

    def cached(config: Config) -> float:
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
    while improved:
        improved = False
        for config in neighbours(best):
            if cached(config) < _GAIN * least:
                best, least, improved = config, cached(config), True
    return best, least, first


def neighbours(config: Config) -> list[Config]:
    """One number halved or doubled; none below 1, at most 16 warps and 5 stages."""
    most = {"num_warps": 16, "num_stages": 5}
    changed = [{**config, key: value} for key, old in config.items() for value in (old // 2, 2 * old)]
    return [one for one in changed if all(1 <= value <= most.get(key, 1024) for key, value in one.items())]


def candidates(kernel: str, config: Config) -> list[Config]:
    """What the kernel's module names, as far as it takes the same arguments."""
    module = importlib.import_module(f"r2r_kernels.triton.{kernel.partition('.')[0]}")
    named: Any = getattr(module, "CANDIDATES", [])
    if isinstance(named, dict):
        named = named.get(kernel, [])
    return [dict(one) for one in named if set(one) == set(config)]


def call_of(kernel: str, channels: int, dtype: str, device: torch.device) -> timing.Contender | None:
    """The operator that launches the kernel, with its backward pass where that does; None for an unknown operator."""
    operator = kernel.partition(".")[0]
    if operator not in CALLS:
        return None
    build, times = CALLS[operator]
    side = max(16, math.isqrt(_ELEMENTS // (times * channels)) // 16 * 16)
    module = settle(build(channels), device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images((1, times * channels, side, side), device, dtype).contiguous(memory_format=torch.channels_last)
    if "backward" not in kernel:
        return timing.Contender({"": functools.partial(forward, module, [x])})
    wanted = [x.requires_grad_(), *module.parameters()]
    run = functools.partial(forward_backward, module, [x], wanted, seeds(module, [x]))
    return timing.Contender({"": run})


def sweep(device: torch.device, out: Path, time_limit: float) -> None:
    """Search all configurations and write those found into `out`, kernel by kernel, until the time is up."""
    arch, start = configs.architecture(device), time.monotonic()
    table = configs.table(arch)
    found: dict[str, dict[str, dict[str, Config]]] = {}

    def up() -> bool:
        return time.monotonic() - start > time_limit

    for kernel, sizes in table.items():
        for size, bounds in sizes.items():
            dtype = "float32" if size == "float32" else "bfloat16"
            for bound, config in bounds.items():
                largest = max((int(other) for other in bounds if other != "more"), default=32)
                channels = 2 * largest if bound == "more" else int(bound)
                contender = None if up() else call_of(kernel, channels, dtype, device)
                if contender is None:
                    print(f"{kernel} {size} {bound}: {'the time is up' if up() else 'no call is known'}", flush=True)
                    continue
                answers, once = timing.observe(contender, device)
                wanted = tensors_of(answers)

                def cost(tried: Config) -> float:
                    if up():
                        return math.inf
                    bounds[bound] = tried  # noqa: B023  (called before the loop goes on)
                    configs._lookup.cache_clear()
                    try:
                        answer = tensors_of(contender.phases[""]())  # noqa: B023
                        if not apart(answer, wanted, None) < TOLERANCE[dtype]:  # noqa: B023
                            return math.inf
                        one = timing.measure({"": contender}, {"": once}, device, timing.Effort(0.05, 5, 20))[""]  # noqa: B023
                    except Exception:  # too much shared memory, a shape the kernel does not take
                        return math.inf
                    return timing.percentile(one.samples[""], 50)

                best, least, first = search(config, candidates(kernel, config), cost)
                bounds[bound] = best
                configs._lookup.cache_clear()
                print(f"{kernel} {size} {bound}: {first * 1e6:.0f} -> {least * 1e6:.0f} us {best}", flush=True)
            found.setdefault(kernel, {})[size] = bounds
        with atomic_path(out / f"{arch}.json") as path:
            path.write_text(json.dumps(found, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds")
    parser.add_argument("--out", type=Path, help="folder; by default r2r_kernels/configs")
    given = parser.parse_args(argv)
    if kernels.reason() or not torch.cuda.is_available():
        print(f"nothing to sweep: {kernels.reason() or 'no GPU'}", file=sys.stderr)
        return 2
    sweep(torch.device("cuda"), given.out or configs.FOLDER, given.time_limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
