from __future__ import annotations

import pytest
import torch

from r2r_kernels import reference
from r2r_kernels.operators.layout import memory_format
from r2r_kernels.triton import simple_gate
from tests.r2r_kernels.triton.comparison import CASES, FORMATS, assert_as_good


@pytest.mark.parametrize(("shape", "layout"), [*CASES, ((2, 1, 40, 60), torch.contiguous_format)])
def test_follows_the_reference(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    n, c, h, w = shape
    x = torch.randn(n, 2 * c, h, w).to(device, dtype).to(memory_format=layout)
    dy = torch.randn(shape).to(device, dtype)
    y, dx = simple_gate.forward(x), simple_gate.backward(dy, x)
    assert y.is_contiguous(memory_format=memory_format(x))
    assert dx.is_contiguous(memory_format=memory_format(x))
    assert_as_good([y, dx], reference.simple_gate, (x,), (dy,))


def test_empty_batch(device: str) -> None:
    x = torch.empty(0, 14, 3, 5, device=device)
    assert simple_gate.forward(x).shape == (0, 7, 3, 5)
    assert simple_gate.backward(x[:, :7], x).shape == x.shape


@pytest.mark.gpu
def test_more_than_2_to_31_elements(gpu: str) -> None:
    x = torch.randn(1, 16, 16384, 16400, device=gpu, dtype=torch.bfloat16)
    for layout in FORMATS:
        y = simple_gate.forward(x.contiguous(memory_format=layout))
        assert torch.equal(y[:, :, -8:], reference.simple_gate(x[:, :, -8:]))
