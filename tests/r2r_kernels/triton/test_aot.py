"""Every kernel is compiled for GPUs that are not here: it must fit their registers and shared memory.

`python -m tests.r2r_kernels.triton.test_aot` writes `budget-<version of Triton>.json` anew: registers of a thread and
bytes of shared memory of a program, for each kernel that a test compiles. Another version allocates in another way, and
one without a budget is held to the limits of the GPUs alone. R2R_AOT=full compiles all channels for all architectures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from tests.r2r_kernels.triton import aot
from tests.r2r_kernels.triton.conftest import INTERPRETED
from tests.r2r_kernels.triton.launches import LAUNCHES

BUDGET = Path(__file__).with_name(f"budget-{triton.__version__.rpartition('.')[0]}.json")

# Channels: one for each configuration, those below a power of two without any hint (masks, odd sizes, unaligned views).
CHANNELS = {
    "layer_norm_2d": (7, 64, 512),
    "simple_gate": (7, 64),
    "depthwise_gate": (7, 64),
    "naf_block": (7, 32, 64, 100, 256, 512),
    "gated_feed_forward": (7, 32, 64, 100, 256, 512),
    "upsample_add": (7, 64),
    "local_mean_2d": (7, 64),
    "bank_retrieve": (7, 512),
    "slot_conv": (7, 64),
}
FLOAT32 = {
    "naf_block": (7, 100),
    "gated_feed_forward": (100,),
    "layer_norm_2d": (100,),
    "simple_gate": (100,),
    "upsample_add": (100,),
}
# Height and width of two images: many pixels, and so few that another configuration may be taken.
SIZES = ((64, 48), (28, 28))
EVERY = (7, 16, 32, 48, 64, 100, 128, 256, 512, 1024)


def _matrix() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    for arch in aot.TARGETS:
        for operator, channels in CHANNELS.items():
            if os.environ.get("R2R_AOT") == "full":
                yield arch, operator, "bfloat16", EVERY
                yield arch, operator, "float32", EVERY
            elif arch in ("sm_90", "gfx942"):
                yield arch, operator, "bfloat16", channels
                if operator in FLOAT32:
                    yield arch, operator, "float32", FLOAT32[operator]
            elif operator != "depthwise_gate":  # its kernels are in naf_block too
                yield arch, operator, "bfloat16", (64, 512) if operator == "naf_block" else (64,)


def usages(
    arch: str, operator: str, dtype: str, channels: tuple[int, ...], patch: pytest.MonkeyPatch
) -> Iterator[tuple[str, aot.Usage]]:
    """What each kernel of an operator costs, by a name that says what was compiled."""
    for count in channels:
        seen: dict[str, dict[str, Any]] = {}
        for size in SIZES:
            with aot.captured(arch, patch) as launches:
                LAUNCHES[operator](count, getattr(torch, dtype), size)
            aligned = (True, False) if os.environ.get("R2R_AOT") == "full" else (count % 16 == 0,)
            for launch in launches:
                layout = " NCHW" if launch.arguments.get("LAST") is False else ""
                for hints in aligned:
                    plain = f"{operator}: {launch.name}{layout} C={count} {dtype}{' aligned' if hints else ''}"
                    name = plain if size == SIZES[0] else f"{plain} few pixels"
                    if name not in seen and seen.get(plain) != launch.choices:
                        seen[name] = launch.choices
                        yield name, aot.compiled(launch, arch, hints)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("arch", "operator", "dtype", "channels"), list(_matrix()))
def test_fits(arch: str, operator: str, dtype: str, channels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    for name, usage in usages(arch, operator, dtype, channels, monkeypatch):
        assert usage.spilled == 0, f"{name} on {arch} spills {usage.spilled}"
        assert usage.shared <= aot.SHARED[arch], f"{name} on {arch}: {usage.shared} bytes of shared memory"
        if name in budget.get(arch, {}):
            registers, shared = budget[arch][name]
            assert usage.registers <= registers, f"{name} on {arch}: {usage.registers} registers, budget {registers}"
            assert usage.shared <= shared, f"{name} on {arch}: {usage.shared} bytes of shared memory, budget {shared}"


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("operator", LAUNCHES)
@pytest.mark.parametrize("size", [(1, 1), (65536, 65536)], ids=["one pixel", "2^32 pixels"])
def test_extreme_sizes_compile(operator: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of 1 is compiled as a constant, one of 2^31 or more as 64 bits."""
    with aot.captured("sm_90", monkeypatch) as launches:
        LAUNCHES[operator](64, torch.bfloat16, size)
    assert launches
    for launch in launches:
        assert aot.compiled(launch, "sm_90", aligned=False).spilled == 0, launch.name


def write_budget() -> None:
    budget: dict[str, dict[str, list[int]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for arch, operator, dtype, channels in _matrix():
            costs = dict(usages(arch, operator, dtype, channels, patch))
            for name, usage in costs.items():
                print(f"{arch:7} {name:60} {usage.registers:4} registers {usage.shared:7} bytes", flush=True)
                if usage.spilled:
                    print(f"    SPILLS {usage.spilled}", flush=True)
            table = {name: [usage.registers, usage.shared] for name, usage in costs.items()}
            budget[arch] = {**budget.get(arch, {}), **table}
    rows = [
        f'  "{arch}": {{\n' + ",\n".join(f'    "{name}": {cost}' for name, cost in table.items()) + "\n  }"
        for arch, table in budget.items()
    ]
    BUDGET.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    write_budget()
