"""Retrieval from the bank, blind: by batch, and by tasks. Each image of a batch matches the task of its number."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.published import PublishedRetrieval
from benchmarks.race import Race
from benchmarks.rivals import operator_rivals
from benchmarks.sizes import direction
from benchmarks.timing import Effort
from r2r_kernels.nn import BankRetrieval

SLOTS, KEY, VALUE, SIDE = 53, 64, 512, 8  # the model's


@pytest.mark.grid(
    quick={"tasks": [5], "batch": [1, 8], "backward": [False]},
    everyday={"tasks": [5], "batch": [1], "backward": [False]},
    full={"tasks": [1, 5, 16, 64], "batch": [1, 8, 32], "backward": [False, True]},
)
def test_bank_retrieve(
    race: Race, tasks: int, batch: int, backward: bool, dtype: str, device: torch.device, effort: Effort
) -> None:
    retrieval(race, tasks, batch, SLOTS, backward, dtype, device, effort, f"bank_retrieve {direction(backward)}")


def retrieval(
    race: Race, tasks: int, batch: int, slots: int, backward: bool, dtype: str, device: torch.device, effort: Effort,
    group: str, growth: tuple[str, float] | None = None,
) -> None:  # fmt: skip
    """growth: where the row stands in a series, which is measured without the rivals that compile."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(tasks, 1, KEY, SIDE, SIDE, generator=generator)
    keys = keys + 0.1 * torch.randn(tasks, slots, KEY, SIDE, SIDE, generator=generator)
    values = torch.rand(tasks, slots, VALUE, SIDE, SIDE, generator=generator)
    query = keys[torch.arange(batch) % tasks, 0]
    query, keys, values = (x.to(device, getattr(torch, dtype)) for x in (query, keys, values))
    counts = torch.full((tasks,), slots, device=device)
    module = BankRetrieval("published", eager=True)
    race(
        group,
        f"batch {batch}, tasks {tasks}, slots {slots}",
        dtype,
        operator_rivals(
            "bank_retrieve",
            module,
            [query, keys, values, counts],
            PublishedRetrieval(module),
            backward,
            False,
            effort,
            growth is None,
        ),
        roofline.bank_retrieve(
            batch, tasks, slots, KEY * SIDE**2, VALUE * SIDE**2, query.itemsize, min(batch, tasks), backward
        ),
        growth=growth,
        needs=12 * tasks * slots * (KEY + VALUE) * SIDE**2 * query.itemsize,
    )
