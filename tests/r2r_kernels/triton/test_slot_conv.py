from __future__ import annotations

import pytest
import torch

from r2r_kernels import reference
from r2r_kernels.triton import slot_conv
from tests.r2r_kernels.triton.comparison import assert_as_good


@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 6, 3, 5, 4), 3), ((1, 4, 2, 1, 1), 4), ((1, 3, 5, 9, 8), 2), ((1, 2, 1, 1, 7), 1)]
)
def test_follows_the_reference(
    shape: tuple[int, int, int, int, int], kernel: int, dtype: torch.dtype, device: str
) -> None:
    tasks, slots, channels, height, width = shape
    x = torch.randn(shape).to(device, dtype)
    weight = torch.randn(tasks, channels, kernel, 3, 3).to(device, dtype)
    bias = torch.randn(tasks, channels).to(device, dtype)
    dy = torch.randn(tasks, slots - kernel + 1, channels, height, width).to(device, dtype)
    got = [slot_conv.forward(x, weight, bias), *slot_conv.backward(dy, x, weight)]
    assert_as_good(got, reference.slot_conv, (x, weight, bias), (dy,))


def test_empty(device: str) -> None:
    x, weight = torch.empty(0, 5, 2, 3, 3, device=device), torch.empty(0, 2, 2, 3, 3, device=device)
    bias = torch.empty(0, 2, device=device)
    y = slot_conv.forward(x, weight, bias)
    assert y.shape == (0, 4, 2, 3, 3)
    assert [g.shape for g in slot_conv.backward(y, x, weight)] == [x.shape, weight.shape, bias.shape]


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    x = torch.randn(1, 65, 512, 256, 256, device=gpu, dtype=torch.bfloat16)
    weight, bias = torch.randn(1, 512, 2, 3, 3).to(x), torch.randn(1, 512).to(x)
    y = slot_conv.forward(x, weight, bias)
    assert torch.equal(y[:, -2:], slot_conv.forward(x[:, -3:].contiguous(), weight, bias))
