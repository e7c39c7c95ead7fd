"""What a small copy shows of a photo: faults that vary smoothly over it, such as haze, and how dark it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r2r.sizes import settled
from r2r_kernels.reference import area_resize, local_mean_2d

# Pixels of the longer side of the copy in which faults are looked for, and of the smaller one in which they are undone.
# Measured for haze with the weights that come along: docs/blind.md.
SIDE, UNDONE_SIDE = 512, 256
_WINDOW = 17  # pixels of the smaller copy over which one gain and one offset hold
_EPSILON = 3e-5  # variance of values in [0, 1] below which the gain goes to 0; thick haze leaves little more

# The mean of the values that a dark photo is brightened to before other tasks than those of light are undone in it, and
# by how much at most, as what is darker still has more noise than photo. Measured: docs/blind.md.
_EXPOSED_MEAN, _MOST_EXPOSURE = 0.25, 16.0

# Logarithms of the odds that a small copy gives a task of light. Above the first the network brightens the photo,
# whatever it is to undo. Below the second the task is not to be found in a photo larger than the copy. Noise tells
# darkness too, and the copy has less of it, so that what is likelier is left to the photo.
_SUSPECTED, _RULED_OUT = -3.0, -1


class Overview(NamedTuple):
    """Of photos, from small copies. `task` bool [N, T]: smooth tasks that were found, or told; `scores` [N, T] of the
    copies. The photo without what lies smoothly over it is gain * photo + offset, both [N, 3, h, w]; None where no
    photo has any. `exposure` [N], 1 or more: how much brighter the model is to see the photo; None where it is 1 for
    all."""

    task: Tensor
    scores: Tensor
    gain: Tensor | None
    offset: Tensor | None
    exposure: Tensor | None

    def taken_off(self, part: Tensor, whole: Sequence[int], top: int = 0, left: int = 0) -> Tensor:
        """A part [N, 3, H, W] of photos of the height and width `whole`, from `top` and `left` on, without what lies
        smoothly over them. Photos in which nothing such was found stay as they are."""
        if self.gain is None or self.offset is None:
            return part
        height, width = part.shape[2:]
        down = _interpolating(whole[0], self.gain.shape[2], part)[top : top + height]
        across = _interpolating(whole[1], self.gain.shape[3], part)[left : left + width]
        gain, offset = (down @ x @ across.T for x in (self.gain, self.offset))
        return torch.where(self.task.any(1)[:, None, None, None], (gain * part + offset).clamp(0, 1), part)

    def settles(self, smooth: Tensor, light: Tensor, told: Tensor | None) -> Tensor:
        """bool [N, T] or [T]: tasks of which the copies' scores count, given those smooth and of light, bool [T], and
        those told, bool [N, T]. All, where no other than smooth ones are told: the photos are then not looked at."""
        settled = smooth if self.exposure is None else smooth | (light & (self.exposure > 1)[:, None])
        return settled if told is None else settled | ~(told & ~smooth).any(1, keepdim=True)

    def exposed(self, part: Tensor) -> Tensor:
        """A part [N, 3, H, W] of photos as the model is to see it, in [0, 1]."""
        return part if self.exposure is None else (part * self.exposure[:, None, None, None]).clamp(max=1)


def small_size(height: int, width: int, side: int = SIDE) -> tuple[int, int]:
    """Height and width of a photo's small copy."""
    longest = torch.sym_max(height, width)
    side = torch.sym_min(longest, side)
    down, across = (torch.sym_max(1, (length * side + longest // 2) // longest) for length in (height, width))
    return settled(down, 1), settled(across, 1)


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


def exposure(small: Tensor, scores: Tensor, told: Tensor | None, whole: Sequence[int]) -> Tensor:
    """[N] as in `Overview`, given small copies of photos of the height and width `whole`, and of the tasks of light the
    copies' scores [N, L] and which are told, bool [N, L]. 1 where one may be found, or is told, and where none is
    suspected, as the photo then stays dark by itself."""
    reduced = torch.sym_min(1, torch.sym_max(*whole) // (SIDE + 1))
    possible = scores > _RULED_OUT * reduced if told is None else told
    brighter = (_EXPOSED_MEAN / small.mean((1, 2, 3))).clamp(max=_MOST_EXPOSURE).clamp(min=1)  # one by one, for ONNX
    return brighter.masked_fill(possible.any(1) | ~(scores > _SUSPECTED).any(1), 1.0)


def _interpolating(pixels: int, cells: int, like: Tensor) -> Tensor:
    """[pixels, cells], rows that sum to 1: linear interpolation between the centres of cells, as a matrix."""
    place = (torch.arange(pixels, device=like.device) + 0.5) * cells / pixels - 0.5
    distance = (place.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - distance).clamp(min=0)
