"""Restoring one photo of any size within a memory budget: whole, or in tiles that share one query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r2r.device import device_of, free_memory
from r2r.errors import InputError
from r2r.model import R2R, Features, Task

# Tiles share this many pixels; those nearest to a tile's edge, where it sees zero padding, do not count.
OVERLAP = 64
_MARGIN = 16
_SMALLEST_TILE = 192

# Peak of the eager float32 forward beyond the weights, in floats for each pixel and channel of the first level.
# Measured as the growth of a process at 512^2 and 1024^2: 21, 20 at width 8; 21, 15 at width 16; 18, 14 at width 32.
# The kernels take less (9 on a CPU), but the fast model is to cut the same tiles, so that its answers are the same.
_FLOATS_PER_PIXEL = 21

# The default budget of a tile. Constant, so that a photo gives the same result on most machines, and no larger, as the
# eager model's time for a pixel doubles on a CPU from tiles of 512^2 to 1536^2.
DEFAULT_MEMORY = 2 * 2**30


@dataclass(frozen=True, eq=False)
class RestoredPhoto:
    """`pixels` float32 [H, W, 3] in [0, 1]; `tasks` that took part; `scores` of all tasks; number of `tiles`."""

    pixels: np.ndarray
    tasks: tuple[str, ...]
    scores: dict[str, float]
    tiles: int


@torch.inference_mode()
def restore_photo(model: R2R, pixels: np.ndarray, task: Task = None, memory: int | None = None) -> RestoredPhoto:
    """Restore one photo, float32 [H, W, 3] in [0, 1], H, W >= 1, blind or told the task (see `R2R.restore`).

    memory: bytes that the activations may take; by default half of what is free on the model's device, of which those
    of one tile take at most 2 GiB. A photo that needs more is restored in overlapping tiles, blended without seams,
    after a first pass over them has assembled one query for the whole photo: every tile gets its part of the same
    readout. Features of that pass are kept as far as the memory reaches; those of other tiles are made again. What
    still differs from one piece is the network's channel attention, whose means are taken over a tile.
    Raises InputError for other arrays, NaN, values outside [0, 1], and a budget too small for the smallest tile.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InputError(f"a photo must be [H, W, 3] with H, W >= 1, got {list(pixels.shape)}")
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError("a photo must hold values in [0, 1], got others or NaN")
    # Views of [H, W, 3] here and below: a large photo is held twice, before and after, and no more.
    lq = torch.from_numpy(np.require(pixels, np.float32, ["C", "W"])).permute(2, 0, 1)[None]
    device = device_of(model)
    side = tile_side(model, memory)
    height, width = (size + -size % model.stride for size in lq.shape[2:])
    if height * width <= side * side:
        image, chosen, scores = model.restore(lq.contiguous().to(device), task)
        tiles = 1
    else:
        budget = free_memory(device) // 2 if memory is None else memory
        image, chosen, scores, tiles = _restore_tiled(model, lq, side, task, budget)
    taking_part = chosen[0] if chosen.dtype == torch.bool else torch.arange(len(model.tasks), device=device) == chosen
    return RestoredPhoto(
        image[0].clamp_(0, 1).permute(1, 2, 0).contiguous().cpu().numpy(),
        tuple(name for name, taken in zip(model.tasks, taking_part.tolist(), strict=True) if taken),
        dict(zip(model.tasks, scores[0].tolist(), strict=True)),
        tiles,
    )


def tile_side(model: R2R, memory: int | None = None) -> int:
    """Side in pixels of the largest square that `memory` bytes restore at once. Raises InputError for too few."""
    bytes_per_pixel = _bytes_per_pixel(model)
    least = _SMALLEST_TILE**2 * bytes_per_pixel
    if memory is None:
        memory = max(least, min(DEFAULT_MEMORY, free_memory(device_of(model)) // 2))
    if memory < least:
        raise InputError(f"memory of {memory} bytes; this model needs {least} or more")
    return math.isqrt(memory // bytes_per_pixel) // model.stride * model.stride


def _bytes_per_pixel(model: R2R) -> int:
    return 4 * _FLOATS_PER_PIXEL * model.intro.out_channels


class _Window(NamedTuple):
    """One tile along one axis: pixels [start, stop), and the weight of each of them in the blend."""

    start: int
    stop: int
    weight: Tensor


def _windows(length: int, side: int, stride: int) -> list[_Window]:
    """Evenly spread windows over `length`: as few of `side` pixels as cover it, then no larger than it takes; multiples
    of `stride`. The weights sum to 1 everywhere."""
    number = 1 if side >= length else math.ceil((length - OVERLAP) / (side - OVERLAP))
    enough = math.ceil((length + (number - 1) * OVERLAP) / number / stride) * stride
    side = min(side, length, max(enough, _SMALLEST_TILE))
    starts = [(length - side) * index // max(number - 1, 1) // stride * stride for index in range(number)]
    weights = torch.zeros(number, length)
    for weight, start in zip(weights, starts, strict=True):
        before = torch.arange(side) + 0.5 - _MARGIN if start > 0 else torch.full((side,), torch.inf)
        after = (
            (torch.arange(side) + 0.5 - _MARGIN).flip(0) if start + side < length else torch.full((side,), torch.inf)
        )
        weight[start : start + side] = torch.minimum(before, after).clamp(0, OVERLAP - 2 * _MARGIN)
    weights /= weights.sum(0)
    return [_Window(start, start + side, w[start : start + side]) for start, w in zip(starts, weights, strict=True)]


def _restore_tiled(model: R2R, lq: Tensor, side: int, task: Task, budget: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """image [1, 3, H, W] on the CPU, chosen task, scores, and the number of tiles. Of the budget in bytes, what a tile
    leaves is for features of the first pass."""
    device, stride = device_of(model), model.stride
    height, width = (size + -size % stride for size in lq.shape[2:])
    tiles = [(y, x) for y in _windows(height, side, stride) for x in _windows(width, side, stride)]

    def cut(y: _Window, x: _Window) -> Tensor:  # short at the photo's right and lower border, where it is padded
        return lq[:, :, y.start : y.stop, x.start : x.stop].contiguous().to(device)

    def cells(window: _Window) -> tuple[slice, Tensor]:
        """The window on the grid of the deepest features."""
        weight = F.avg_pool1d(window.weight[None], stride)[0]
        return slice(window.start // stride, window.stop // stride), weight.to(device)

    query = torch.zeros(1, model.bank.keys.shape[2], height // stride, width // stride, device=device)
    kept: dict[int, Features] = {}
    room = budget - _bytes_per_pixel(model) * max((y.stop - y.start) * (x.stop - x.start) for y, x in tiles)
    for number, (y, x) in enumerate(tiles):
        (rows, row_weight), (columns, column_weight) = cells(y), cells(x)
        features = model.encode(cut(y, x))
        key, _ = model.query(features.deep)
        query[:, :, rows, columns] += key * row_weight[:, None] * column_weight
        size = sum(part.nbytes for part in (features.deep, *features.skips))
        if size <= room:
            kept[number] = features
            room -= size
    match = model.match(query, task)
    readout = F.adaptive_avg_pool2d(match.readout, (height // stride, width // stride))

    image = torch.zeros_like(lq)
    for number, (y, x) in enumerate(tiles):
        tile = cut(y, x)
        features = kept.pop(number) if number in kept else model.encode(tile)
        _, value = model.query(features.deep)
        restored = model.decode(tile, features, value, readout[:, :, cells(y)[0], cells(x)[0]]).cpu()
        y_size, x_size = restored.shape[2:]
        weight = y.weight[:y_size, None] * x.weight[:x_size]
        image[:, :, y.start : y.start + y_size, x.start : x.start + x_size] += restored * weight
    return image, match.task, match.scores, len(tiles)
