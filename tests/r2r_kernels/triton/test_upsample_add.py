from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r2r_kernels.triton import upsample_add
from tests.r2r_kernels.triton.comparison import FORMATS, assert_as_good


def reference(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    return F.pixel_shuffle(F.conv2d(x, weight), 2) + skip


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 7, 3, 17), (1, 48, 2, 5), (1, 16, 1, 1)])
def test_follows_the_reference(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    n, c, h, w = shape
    x = torch.randn(n, 2 * c, h, w).to(device, dtype).to(memory_format=layout)
    weight = (torch.randn(4 * c, 2 * c, 1, 1) / (2 * c) ** 0.5).to(device, dtype)
    skip, dy = (torch.randn(n, c, 2 * h, 2 * w).to(device, dtype).to(memory_format=layout) for _ in range(2))
    y = upsample_add.forward(x, weight, skip)
    assert y.stride() == skip.stride()
    assert_as_good([y, *upsample_add.backward(dy, x, weight)], reference, (x, weight, skip), (dy,))


def test_empty_batch(device: str) -> None:
    x, skip = torch.empty(0, 14, 3, 5, device=device), torch.empty(0, 7, 6, 10, device=device)
    weight = torch.ones(28, 14, 1, 1, device=device)
    assert upsample_add.forward(x, weight, skip).shape == skip.shape
    dx, dweight, _ = upsample_add.backward(skip, x, weight)
    assert dx.shape == x.shape
    assert not dweight.any()


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    x = torch.randn(1, 32, 6144, 5632, device=gpu, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    skip = torch.randn(1, 16, 12288, 11264, device=gpu, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 32, 1, 1, device=gpu, dtype=torch.bfloat16) / 6
    y = upsample_add.forward(x, weight, skip)
    assert y.numel() > 2**31
    end = reference(x[:, :, -4:, -4:].float(), weight.float(), skip[:, :, -8:, -8:].float())
    torch.testing.assert_close(y[:, :, -8:, -8:].float(), end, rtol=2e-2, atol=2e-2)
