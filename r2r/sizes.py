"""Sizes that are computed from sizes, in a program that is exported for all of them."""

from __future__ import annotations

from typing import Any

import torch


def settled(size: int, least: int) -> int:
    """The size, which is `least` or more. While a program is exported it becomes a number of which no more than that is
    known: the tracer would otherwise carry the expression through every layer, which takes it minutes, and ask
    questions of it that hold for some sizes only."""
    if not torch.compiler.is_exporting():
        return size
    known: Any = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(known >= least)
    return known
