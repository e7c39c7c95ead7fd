"""The sizes of images that the operators are measured at, [n, c, h, w] of a NAF block's input, and what is in them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Size = tuple[int, int, int, int]
M = TypeVar("M", bound=nn.Module)


def _levels(n: int, height: int, width: int, number: int) -> list[Size]:
    return [(n, 32 << level, height >> level, width >> level) for level in range(number)]


# The five levels of the model at 224 x 224, and its first three at 1088 x 1920; batches that fill a GPU
FULL = _levels(1, 224, 224, 5) + _levels(1, 1088, 1920, 3)
GPU = _levels(32, 224, 224, 5) + _levels(4, 1088, 1920, 3)
QUICK = [FULL[0], FULL[3]]


def images(size: Size, device: torch.device, dtype: str) -> Tensor:
    """Normally distributed, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))


def settle(module: M, device: torch.device, dtype: str) -> M:
    """The module on its device, with random parameters where they start at 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_(std=0.3)
    return module.to(device, getattr(torch, dtype))


def name(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def direction(backward: bool) -> str:
    return "forward + backward" if backward else "forward"
