"""Memory formats. Inside, activations are rows: [N, H, W, C] without gaps (channels_last). Imports no Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether results for x [N, C, H, W] are channels_last: where neighbouring channels are nearer than neighbouring
    columns, of views too (a slice of the channels of a channels_last tensor)."""
    return x.stride(1) < x.stride(3)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for x [N, C, H, W]."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def as_rows(x: Tensor) -> Tensor:
    """x [N, C, H, W] of any strides -> the same values as contiguous [N, H, W, C] on a 16-byte boundary.

    No copy of an x that is channels_last, unless it is a view that begins off such a boundary: there the kernels would
    need narrow loads, and the wide ones do not fit the registers then.
    """
    rows = x.permute(0, 2, 3, 1).contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """rows [N, H, W, C] -> [N, C, H, W] in the memory format of `like`."""
    return rows.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(like))
