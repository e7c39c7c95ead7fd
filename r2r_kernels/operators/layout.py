"""The memory formats of activations: a result has the format of its operator's first argument. Imports no Triton.

Kernels read activations without gaps: [N, C, H, W] (contiguous), or rows [N, H, W, C] (channels_last).
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether results for x [N, C, H, W] are channels_last.

    They are where neighbouring channels lie nearer than neighbouring columns. This holds for views too, such as a slice
    of the channels of a channels_last tensor.
    """
    return x.stride(1) < x.stride(3)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for x [N, C, H, W]."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def dense(x: Tensor, like: Tensor) -> Tensor:
    """x [N, C, H, W] without gaps, in the memory format of results for `like`; no copy where it is so already."""
    return x.contiguous(memory_format=memory_format(like))


def empty(like: Tensor, channels: int) -> Tensor:
    """A new tensor [N, channels, H, W] for a result for `like` [N, C, H, W]."""
    n, _, h, w = like.shape
    return torch.empty((n, channels, h, w), dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def as_rows(x: Tensor) -> Tensor:
    """x [N, C, H, W] of any strides -> the same values as contiguous [N, H, W, C] on a 16-byte boundary.

    It copies an x that is channels_last only if x is a view that begins off such a boundary. From there the kernels
    would need narrow loads, and wide ones do not fit the registers then.
    """
    rows = x.permute(0, 2, 3, 1).contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """rows [N, H, W, C] -> [N, C, H, W] in the memory format of results for `like`."""
    return rows.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(like))
