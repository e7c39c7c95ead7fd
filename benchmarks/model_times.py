"""The model and a training step: python -m benchmarks.model_times ROWS [--dry] [--max-autotune]

Appends a line to ROWS for each rival, with what its answers are apart from those of plain PyTorch in float32: the
model at 224 x 224, one photo and 32 of them, and a training step of 16 + 16 crops of 128 x 128, in bfloat16. With
`--max-autotune` only one photo by `torch.compile(mode="max-autotune")`, which compiles for minutes and so is a piece of
its own. `--dry`: a small model and small images on a CPU, no times.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import rivals
from benchmarks.kernels import write
from benchmarks.race import TOLERANCE, apart
from benchmarks.rivals import Rival, Unavailable, tensors_of
from benchmarks.timing import QUICK, Contender

DTYPE = torch.bfloat16


def measure(
    name: str,
    size: str,
    rival: Rival,
    truth: list[torch.Tensor],
    baseline: torch.Tensor,
    allowed: float,
    rows: Path,
    dry: bool,
) -> float:
    """Writes what was found; how far the answers are from the truth, 0 where there are none."""
    device = torch.device("cpu" if dry else "cuda")
    row: dict[str, Any] = {"name": f"{name}: {rival.name}", "size": size}
    distance = 0.0
    try:
        contender = rival.prepare()
        answers = [t.detach().float() for phase in contender.phases.values() for t in tensors_of(phase())]
        distance = apart(answers[: len(truth)], truth, baseline)
        # A row of its own before the time: were that to hang, this would stand.
        write(rows, **row, error=distance, **({"right": distance <= allowed} if "ours" in rival.name else {}))
        if dry:
            return distance
        torch.cuda.reset_peak_memory_stats(device)
        times = [_once(contender) for _ in range(12)][2:]
        peak = torch.cuda.max_memory_allocated(device)
        write(rows, **row, us=statistics.median(times) * 1e3, note=f"peak {peak / 1e6:.0f} MB")
    except Unavailable as why:
        write(rows, **row, note=str(why))
    except Exception as problem:
        traceback.print_exc()
        write(rows, **row, note=f"{type(problem).__name__}: {problem}"[:120])
    if not dry:
        torch.cuda.empty_cache()
    return distance


def _once(contender: Contender) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for call in contender.phases.values():
        call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def photos(rows: Path, dry: bool, max_autotune: bool) -> None:
    device, preset = torch.device("cpu" if dry else "cuda"), "tiny" if dry else "base"
    for number, side in ((1, 32), (2, 32)) if dry else ((1, 224), (32, 224)):
        lq = torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        exact = rivals.build_model(rivals.CHANNELS_LAST, preset, device, torch.float32)
        with torch.inference_mode():
            truth = [exact(lq)]
        found = rivals.inference_rivals(preset, lq, DTYPE)
        wanted = [one for one in found if (one.name == rivals.MAX_AUTOTUNE) == max_autotune]
        allowed = TOLERANCE["bfloat16"]  # or twice as far as eager is, as in benchmarks.race
        for rival in wanted:
            if rival.name == rivals.COMPILE:
                continue  # what max-autotune does is faster; there is no time for both
            distance = measure("model", f"{number}x3x{side}x{side}", rival, truth, lq, allowed, rows, dry)
            if rival.name == rivals.EAGER:
                allowed = max(allowed, 2 * distance)
        if max_autotune:
            return


def training(rows: Path, dry: bool) -> None:
    device, preset = torch.device("cpu" if dry else "cuda"), "tiny" if dry else "base"
    number, side = (10, 64) if dry else (32, 128)
    generator = torch.Generator().manual_seed(0)
    hq = torch.rand(number, 3, side, side, generator=generator)
    lq = (hq + 0.1 * torch.randn(hq.shape, generator=generator)).clamp(0, 1)
    batch = [x.to(device) for x in (lq, hq, torch.arange(number) % (number // 2) % len(rivals.TASKS))]
    steps: Callable[..., list[Rival]] = rivals.training_rivals
    exact = next(one for one in steps(preset, device, torch.float32, batch) if one.name == rivals.CHANNELS_LAST)
    truth = [t.detach().float() for t in tensors_of(next(iter(exact.prepare().phases.values()))())]
    allowed, size, half = TOLERANCE["bfloat16"], f"{number}x3x{side}x{side}", batch[0][: number // 2]
    for rival in steps(preset, device, DTYPE, batch, effort=QUICK):
        if "compile" not in rival.name:
            distance = measure("training step", size, rival, truth, half, allowed, rows, dry)
            if rival.name == rivals.EAGER:
                allowed = max(allowed, 2 * distance)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.model_times", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--max-autotune", action="store_true")
    given = parser.parse_args(argv)
    photos(given.rows, given.dry, given.max_autotune)
    if not given.max_autotune:
        training(given.rows, given.dry)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
