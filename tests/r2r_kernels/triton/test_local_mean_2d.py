from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels.triton import local_mean_2d
from tests.r2r_kernels.triton.comparison import assert_as_good


def reference(x: Tensor, window: tuple[int, int]) -> Tensor:
    """TLC's AvgPool2d without its fast approximation: windows inside the image, the border's repeated outwards."""
    height, width = x.shape[2:]
    mean = F.avg_pool2d(x, (min(window[0], height), min(window[1], width)), stride=1)
    down, across = height - mean.shape[2], width - mean.shape[3]
    return F.pad(mean, (across // 2, (across + 1) // 2, down // 2, (down + 1) // 2), mode="replicate")


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (3, 2), (4, 100), (100, 100), (5, 16)])
def test_follows_the_reference(window: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, dy = (torch.randn(1, 3, 5, 17).to(device, dtype) for _ in range(2))
    y, dx = local_mean_2d.forward(x, window), local_mean_2d.backward(dy, window)
    assert y.is_contiguous()
    assert_as_good([y, dx], lambda t: reference(t, window), (x,), (dy,))


def test_walks_meet(device: str) -> None:
    """An axis longer than one walk: the next begins with a window summed anew."""
    x = torch.randn(1, 1, 1, 71, device=device).to(memory_format=torch.channels_last)
    dy = torch.randn_like(x)
    y, dx = local_mean_2d.forward(x, (1, 8)), local_mean_2d.backward(dy, (1, 8))
    assert_as_good([y, dx], lambda t: reference(t, (1, 8)), (x,), (dy,))


def test_empty_batch(device: str) -> None:
    x = torch.empty(0, 3, 5, 7, device=device)
    assert local_mean_2d.forward(x, (3, 3)).shape == x.shape


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    x = torch.randn(1, 8, 16384, 16400, device=gpu, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = local_mean_2d.forward(x, (3, 5))
    assert y.numel() > 2**31
    end = reference(x[:, :, -16:, -16:].float(), (3, 5))[:, :, 4:, 4:]
    torch.testing.assert_close(y[:, :, -12:, -12:].float(), end, rtol=2e-2, atol=2e-2)
