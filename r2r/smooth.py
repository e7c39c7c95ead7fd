"""Faults that vary smoothly over a photo, such as haze: removed in a small copy, and from there in the photo itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r2r_kernels.reference import area_resize, local_mean_2d

# Pixels of the longer side of the copy in which faults are looked for, and of the smaller one in which they are undone.
# Measured for haze with the weights that come along: docs/blind.md.
SIDE, UNDONE_SIDE = 512, 256
_WINDOW = 17  # pixels of the smaller copy over which one gain and one offset hold
_EPSILON = 3e-5  # variance of values in [0, 1] below which the gain goes to 0; thick haze leaves little more


class Layer(NamedTuple):
    """What lies over photos smoothly. `task` bool [N, T]: smooth tasks that were found, or told; `scores` [N, T] of the
    small copies. The photo without it is gain * photo + offset, both [N, 3, h, w]; None where no photo has any."""

    task: Tensor
    scores: Tensor
    gain: Tensor | None
    offset: Tensor | None

    def taken_off(self, part: Tensor, whole: Sequence[int], top: int = 0, left: int = 0) -> Tensor:
        """A part [N, 3, H, W] of photos of the height and width `whole`, from `top` and `left` on, without the layer.
        Photos in which none was found stay as they are."""
        if self.gain is None or self.offset is None:
            return part
        height, width = part.shape[2:]
        down = _interpolating(whole[0], self.gain.shape[2], part)[top : top + height]
        across = _interpolating(whole[1], self.gain.shape[3], part)[left : left + width]
        gain, offset = (down @ x @ across.T for x in (self.gain, self.offset))
        return torch.where(self.task.any(1)[:, None, None, None], (gain * part + offset).clamp(0, 1), part)


def small_size(height: int, width: int, side: int = SIDE) -> tuple[int, int]:
    """Height and width of a photo's small copy."""
    longest = torch.sym_max(height, width)
    side = torch.sym_min(longest, side)
    return tuple(torch.sym_max(1, (length * side + longest // 2) // longest) for length in (height, width))


def small_copy(photos: Tensor, side: int = SIDE) -> Tensor:
    """[N, 3, H, W] -> [N, 3, h, w], each value the mean of the area it covers."""
    height, width = photos.shape[2:]
    return area_resize(photos, *small_size(height, width, side))


def gain_and_offset(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Of each window, the ones with which gain * before + offset is nearest to `after`, all [N, 3, h, w]: the fast
    guided filter (He and Sun, 2015)."""

    def mean(x: Tensor) -> Tensor:
        return local_mean_2d(x, (_WINDOW, _WINDOW))

    before_mean, after_mean = mean(before), mean(after)
    covariance = mean(before * after) - before_mean * after_mean
    variance = mean(before.square()) - before_mean.square()
    gain = covariance / (variance + _EPSILON)
    return mean(gain), mean(after_mean - gain * before_mean)


def _interpolating(pixels: int, cells: int, like: Tensor) -> Tensor:
    """[pixels, cells], rows that sum to 1: linear interpolation between the centres of cells, as a matrix."""
    place = (torch.arange(pixels, device=like.device) + 0.5) * cells / pixels - 0.5
    distance = (place.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - distance).clamp(min=0)
